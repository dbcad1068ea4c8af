"""A command as a Ray job: what runs on the cluster, for `submit` and for the entry points in jobs/.

    python -m denoise_batch.job infer /shared/in.parquet /shared/out.parquet     # as `submit` starts it
    run(["infer", …])                                                            # as jobs/infer.py does

Ray Jobs keeps stdout and stderr in one log. `submit` tells them apart by marks: this module puts one before each
line. Nothing but the standard library is imported before it is known that the rest is there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from denoise_batch.console import ParsedCommand

RESULT = "[result] "
"""Before each line that the command writes to stdout."""

LOG = "[log] "
"""Before each line that it writes to stderr: progress, errors, hints."""

NEEDED = (
    "matplotlib",
    "numpy",
    "PIL",
    "platformdirs",
    "pyarrow",
    "ray",
    "safetensors",
    "scipy",
    "tensorboardX",
    "torch",
    "typer",
    "xxhash",
)
"""The packages, as they are imported, that every node must have; a test compares them with pyproject.toml."""

_OLDEST_PYTHON = (3, 11)
_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray Jobs sets it, and nothing else does


def check_paths(command: ParsedCommand) -> None:
    """Refuses paths that mean another place on the cluster than where the command was written.

    Raises:
        FlagError: a path is relative: the job would look for it in a temporary folder of its own, and lose there
            what it writes.
    """
    from denoise_batch.bundle import shipped_folder
    from denoise_batch.errors import FlagError
    from denoise_batch.redaction import redact
    from denoise_batch.storage import is_uri

    for path in command.paths:
        # PATH is what `inspect` looks at.
        if path.name in {"--model", "--init", "PATH"} and shipped_folder(Path(path.value)):
            continue
        if is_uri(path.value) or Path(path.value).is_absolute():
            continue
        here = Path(path.value).absolute()
        meant = f": {here}, if the cluster's machines see that" if here.exists() else ""
        raise FlagError(
            f"{path.name} {redact(path.value)} is a relative path: a job would look for it in a temporary folder of "
            "its own",
            hint=f"give an absolute path on a file system that all the cluster's machines share{meant}",
        )


def run(arguments: Sequence[str], *, marked: bool = False) -> int:
    """Runs a command on the cluster that this process was started on, and gives its exit code.

    Args:
        marked: put marks before the lines, for `submit`.
    """
    if marked:
        sys.stdout = cast("TextIO", _Marked(sys.stdout, RESULT))
        sys.stderr = cast("TextIO", _Marked(sys.stderr, LOG))
    try:
        missing = _missing()
        if missing:
            sys.stderr.write(f"error: {missing}\n")
            sys.stderr.write(
                "hint: install the project on every node (cluster.yaml does), or name the packages in a runtime "
                "environment: --runtime-env jobs/runtime_env.yaml\n"
            )
            return 2
        from denoise_batch import cli, console

        def check() -> None:
            if _IN_A_JOB in os.environ:
                check_paths(console.parse_command(cli.app, arguments))

        return console.run_command(cli.app, arguments, before=check)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _missing() -> str | None:
    """What this machine lacks, in one line; None where all is there."""
    version = sys.version_info[:2]
    if version < _OLDEST_PYTHON:
        return f"the cluster runs Python {version[0]}.{version[1]}; it takes 3.11, 3.12 or 3.13"
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return f"{os.uname().nodename}: the cluster's Python ({sys.executable}) lacks {', '.join(absent)}"
    return None


class _Marked:
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


if __name__ == "__main__":
    from denoise_batch.cluster import leave

    leave(run(sys.argv[1:], marked=True))
