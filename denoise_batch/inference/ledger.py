"""What a run has done, so that it can die at any moment and go on: receipts, attempts, accounting.

A run's ledger is a folder of segments, one for each time the run was started, each a file of JSON lines that only
grows. A line is on disk before the driver acts on it. A segment's torn last line is what a crash leaves and
counts for nothing; a damaged line anywhere else is an error.

Lines:
    receipt   a unit is committed: its staged file, rows in, rows out, bad rows by reason, bytes, digest, …
    failure   an attempt at a unit failed, and why
    withdrawn a committed unit's file was lost; the unit is open again
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import xxhash

from denoise_batch.errors import ResumeError
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType

DIGEST = "xxh3-128"
"""The digest of every file that is written, hexadecimal: 10 GB/s on one core, where SHA-256 would take 0.4."""

_Bytes = bytes  # `Ledger.bytes` hides the name
_NONE: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Receipt:
    """A unit's finished, verified file.

    Attributes:
        unit: its index in the plan.
        attempt: which attempt it was, from 1.
        file: the staged file's name.
        rows_in, rows_out: rows read, rows written; the difference was set aside.
        bad: bad rows by reason.
        bytes: the file's size.
        digest: of the file, `DIGEST` hexadecimal.
        bad_file, bad_bytes, bad_digest: the staged list of bad rows, if any.
        quarantine_file, quarantine_bytes, quarantine_digest: the staged file of rows that were set aside, if any.
        seconds: wall time by stage (read, decode, forward, encode, write, verify) and in total.
        fingerprint: what the pixels depend on beside the plan: device, precision, threads, batch, versions.
        dark_on_light: good rows that look so (`images.dark_on_light`), whatever they were taken for.
        poor: good rows of whose image the model expects next to nothing (`ExtraColumns.poor`).
    """

    unit: int
    attempt: int
    file: str
    rows_in: int
    rows_out: int
    bytes: int
    digest: str
    bad: dict[str, int] = field(default_factory=dict)
    bad_file: str = ""
    bad_bytes: int = 0
    bad_digest: str = ""
    quarantine_file: str = ""
    quarantine_bytes: int = 0
    quarantine_digest: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    dark_on_light: int = 0
    poor: int = 0

    @property
    def staged(self) -> list[str]:
        """The names of all its staged files, that of the data first."""
        return [name for name in (self.file, self.bad_file, self.quarantine_file) if name]

    @property
    def beside(self) -> dict[str, tuple[int, str]]:
        """Size and digest of the staged files beside that of the data, as far as it says them."""
        files = (
            (self.bad_file, self.bad_bytes, self.bad_digest),
            (self.quarantine_file, self.quarantine_bytes, self.quarantine_digest),
        )
        return {name: (size, digest) for name, size, digest in files if digest}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt at a unit that came to nothing.

    Attributes:
        reason: one line.
        final: whether the whole job must stop at once (a bad row under `--on-bad-row fail`, a full disk, …).
        kind: the error's class in `errors`, for those that stop the job.
    """

    unit: int
    attempt: int
    reason: str
    final: bool = False
    kind: str = ""
    hint: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Ledger:
    """The record of one run, open for writing in a segment of its own.

    Attributes:
        session: how often this run was started, from 1; staged files carry it in their name, so that an orphan of an
            earlier session can never be taken for a file of this one.
        receipts: the committed units, by index, without their `seconds`: there may be millions of them.
        seconds: wall time by stage of all units that were committed, summed.
        failures: failed attempts of units not committed yet, in this and earlier sessions.
        failed_attempts: how many attempts failed in all sessions, those of units that are committed by now included.
    """

    _file = -1

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
        segments = sorted(folder.glob("*.jsonl"))
        self._replay((str(segment), segment.read_bytes()) for segment in segments)
        self.session = 1 + (int(segments[-1].stem) if segments else 0)
        if read_only:
            return
        # O_APPEND keeps a line whole; the file is new, so nothing can follow a torn line of an earlier session.
        self._file = os.open(
            folder / f"{self.session:06d}.jsonl",
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC,
            0o644,
        )
        publishing.sync(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file >= 0:
            os.close(self._file)

    def commit(self, receipt: Receipt) -> None:
        """Makes a unit's file count. On return the receipt is on disk.

        Raises:
            ValueError: the unit is committed already; counting it twice would double its rows.
        """
        if receipt.unit in self.receipts:
            raise ValueError(f"unit {receipt.unit} is committed already")
        self._append(_line("receipt", receipt.to_json()))
        self._keep(receipt)

    def fail(self, failure: Failure) -> None:
        """Records a failed attempt. On return it is on disk."""
        self._append(_line("failure", failure.to_json()))
        self._count_failure(failure)

    def withdraw(self, unit: int, reason: str) -> None:
        """Makes a committed unit open again: its file was lost outside of our doing."""
        receipt = self.receipts.pop(unit)
        self._append(_line("withdrawn", {"unit": unit, "attempt": receipt.attempt, "reason": reason}))

    @property
    def session_name(self) -> str:
        """Part of the names of staged files."""
        return f"s{self.session:04d}"

    @property
    def rows_in(self) -> int:
        return sum(receipt.rows_in for receipt in self.receipts.values())

    @property
    def rows_out(self) -> int:
        return sum(receipt.rows_out for receipt in self.receipts.values())

    @property
    def bytes(self) -> int:
        """Of all committed files."""
        return sum(receipt.bytes for receipt in self.receipts.values())

    @property
    def dark_on_light(self) -> int:
        """Good rows of all committed units that look so."""
        return sum(receipt.dark_on_light for receipt in self.receipts.values())

    @property
    def poor(self) -> int:
        """Good rows of all committed units of whose image the model expects next to nothing."""
        return sum(receipt.poor for receipt in self.receipts.values())

    def bad_rows(self) -> dict[str, int]:
        """Bad rows of all committed units, by reason."""
        total: dict[str, int] = {}
        for receipt in self.receipts.values():
            for reason, count in receipt.bad.items():
                total[reason] = total.get(reason, 0) + count
        return total

    def _keep(self, receipt: Receipt) -> None:
        for stage, seconds in receipt.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        # A third of the memory: what is the same for many receipts is held once.
        self.receipts[receipt.unit] = replace(
            receipt, seconds=_NONE, bad=receipt.bad or _NONE, fingerprint=sys.intern(receipt.fingerprint)
        )
        self.failures.pop(receipt.unit, None)

    def _count_failure(self, failure: Failure) -> None:
        self.failures.setdefault(failure.unit, []).append(failure)
        self.failed_attempts += 1

    def _append(self, line: _Bytes) -> None:
        """On return the line is on disk."""
        view = memoryview(line)
        while view:
            view = view[os.write(self._file, view) :]
        os.fdatasync(self._file)

    def _replay(self, segments: Iterable[tuple[str, _Bytes]]) -> None:
        """Takes in what was written before: the name and the content of each segment, in their order."""
        self.receipts: dict[int, Receipt] = {}
        self.seconds: dict[str, float] = {}
        self.failures: dict[int, list[Failure]] = {}
        self.failed_attempts = 0
        for name, content in segments:
            # What follows the last line feed was being written when the run died.
            for number, line in enumerate(content.split(b"\n")[:-1], start=1):
                digest, _, body = line.partition(b" ")
                if xxhash.xxh3_64_hexdigest(body).encode() != digest:
                    raise ResumeError(
                        f"{name}: line {number} is damaged",
                        hint="give --overwrite to start afresh, or restore the file",
                    )
                self._take(*json.loads(body))

    def _take(self, kind: str, record: dict[str, Any]) -> None:
        if kind == "receipt":
            self._keep(Receipt(**record))
        elif kind == "withdrawn":
            self.receipts.pop(record["unit"], None)
        else:
            self._count_failure(Failure(**record))


def _line(kind: str, record: dict[str, Any]) -> bytes:
    body = json.dumps([kind, record], separators=(",", ":")).encode()
    return b"%s %s\n" % (xxhash.xxh3_64_hexdigest(body).encode(), body)
