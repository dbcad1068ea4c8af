"""Every error that a user can meet, each with the hint that helps and its exit code.

DenoiseBatchError        exit 1   the job ran and something failed
├── JobFailed            exit 1   units failed, or too many rows are bad
├── DataChanged          exit 1   an input changed while it was read
├── ResourceExhausted    exit 1   disk, memory or quota ran out
├── StoreError           exit 1   an object store refused, or did not answer in all attempts
├── Interrupted          exit 130   Ctrl-C
│   └── Terminated       exit 143   SIGTERM
└── RequestError         exit 2   the request cannot be met
    ├── FlagError            a flag's value is impossible
    ├── MissingFileError     a path does not exist or cannot be read
    ├── ParquetError         a file is not Parquet, is damaged, or does not fit the others
    ├── ColumnError          no image column, two candidates, wrong size or type
    ├── OutputError          the output lies in the input, is locked or cannot be written
    │   └── OutputExists     it is there already
    ├── ResumeError          the unfinished run at this output is another run
    ├── ModelError           a model folder is missing, damaged or tampered with
    └── NetworkError         a download failed

The command line catches DenoiseBatchError alone, prints `error: MESSAGE` and `hint: HINT`, and exits.
A message is one line that names the file, column, row or flag.
"""

from __future__ import annotations

import errno

CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r"}
"""Messages name columns and files, whose names may be made to steer a terminal."""

LINE_CONTROLS = CONTROLS | {ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"}
"""The same for what is one line, which such names must not break. Other libraries' messages may have several."""


class DenoiseBatchError(Exception):
    """The root of the tree.

    Args:
        message: one line that names the file, column, row or flag.
        hint: one line that says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        message, hint = message.translate(CONTROLS), hint.translate(CONTROLS)
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword arguments do not survive pickling (Ray, multiprocessing) by themselves.
        return (_rebuild, (type(self), self.message, self.hint))


class JobFailed(DenoiseBatchError):
    """Units failed after all attempts, or more rows are bad than `--max-bad` allows."""


class DataChanged(DenoiseBatchError):
    """An input file changed between planning and reading."""


class ResourceExhausted(DenoiseBatchError):
    """Disk space, memory or a quota ran out."""


class StoreError(DenoiseBatchError):
    """An object store refused a request, or did not answer in all attempts."""


class Interrupted(DenoiseBatchError):
    """Ctrl-C (exit 130) or SIGTERM (exit 143)."""

    exit_code = 130


class Terminated(Interrupted):
    """SIGTERM."""

    exit_code = 143


class RequestError(DenoiseBatchError):
    """The request cannot be met; nothing was started."""

    exit_code = 2


class FlagError(RequestError):
    """A flag's value is impossible."""


class MissingFileError(RequestError):
    """A path does not exist or cannot be read."""


class ParquetError(RequestError):
    """A file is not Parquet, is damaged, or does not fit the others."""


class ColumnError(RequestError):
    """No image column, two candidates, or a column of the wrong size or type."""


class OutputError(RequestError):
    """The output lies inside the input, is locked or cannot be written."""


class OutputExists(OutputError):
    """The output is there already."""


class ResumeError(RequestError):
    """The unfinished run at this output is another run than the one asked for."""


class ModelError(RequestError):
    """A model folder is missing, damaged or tampered with."""


class NetworkError(RequestError):
    """A download failed."""


_RAN_OUT = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the disk quota is used up", "make room or have the quota raised"),
    errno.EROFS: ("the file system is read-only", "make it writable"),
    errno.EFBIG: ("a file would be larger than is allowed", "raise the limit (ulimit -f)"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many files are open on this machine", "end what holds them"),
}


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def ran_out(error: OSError, where: object) -> ResourceExhausted | None:
    """What the system says ran out, as an error that stops the job; None where it says something else.

    Args:
        where: the file or folder that the error is about, where it does not say so itself.
    """
    if error.errno not in _RAN_OUT:
        return None
    what, remedy = _RAN_OUT[error.errno]
    return ResourceExhausted(f"{error.filename or where}: {what}", hint=f"{remedy}, then run the same command again")


def _rebuild(kind: type[DenoiseBatchError], message: str, hint: str) -> DenoiseBatchError:
    return kind(message, hint=hint)
