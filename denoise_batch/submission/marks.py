"""Ray Jobs keeps stdout and stderr in one log: marks before each line, by which `submit` tells them apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO

RESULT = "[result] "
"""Before each line that the command writes to stdout."""

LOG = "[log] "
"""Before each line that it writes to stderr: progress, errors, hints."""


class Marked:
    """A text stream that puts a mark before each line; everything else is the stream's own."""

    def __init__(self, stream: TextIO, mark: str) -> None:
        self._stream, self._mark, self._begun = stream, mark, False

    def write(self, text: str | bytes) -> int:
        if isinstance(text, bytes):  # click's way with help, where a stream passes for a binary one
            text = text.decode(errors="replace")
        for line in text.splitlines(keepends=True):
            self._stream.write(line if self._begun else self._mark + line)
            self._begun = not line.endswith("\n")
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
