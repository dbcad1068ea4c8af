"""What surrounds every command: results to stdout, errors as two lines to stderr, signals, exit codes.

Exit codes: 0 done; 1 the job ran and something failed; 2 the request cannot be met; 130 and 143 interrupted by Ctrl-C
and SIGTERM.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import os
import select
import shlex
import signal
import sys
import threading
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from denoise_batch.cluster.lost_ray import ended_by
from denoise_batch.errors import (
    LINE_CONTROLS,
    DenoiseBatchError,
    FlagError,
    Interrupted,
    RequestError,
    Terminated,
    ran_out,
)
from denoise_batch.process.cores import limit_threads
from denoise_batch.process.interruption import Insistent
from denoise_batch.storage.redaction import redact, without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from denoise_batch.progress import Progress

PROGRAM = "denoise-batch"
RESUMABLE = ("train", "infer")
_PATH_METAVARS = {"IN", "OUT", "PATH", "FOLDER", "PARQUET", "PNG"}
"""How the command line names what is a path, in every command."""


def print_result(content: dict[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
    """Prints a result as JSON or as lines; what ends a line within one of them is a name's, and escaped."""
    shown = (line.translate(LINE_CONTROLS) for line in lines)
    print_out(json.dumps(content, indent=2, default=str) if as_json else "\n".join(shown))


class _ReaderGoneError(Exception):
    """Whoever read stdout has gone (`| head`)."""


def print_out(text: str) -> None:
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError as error:
        _drop_stdout()
        raise _ReaderGoneError from error


def _drop_stdout() -> None:
    """Lets the null device take what is left: Python would complain when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)
    except (OSError, TypeError, ValueError):  # it is no file of the system's
        return False
    return bool(poll.poll(0))


def _prepare_streams() -> None:
    """Puts the null device where stdin, stdout or stderr is closed (`2>&-`), and has every text written somehow."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next file that is opened would get this number, and with it what C code or a child writes there. So
            # does the null device: it is the lowest that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 (as long as the process)
    for stream in (sys.stdout, sys.stderr):
        # Where a locale has no `×`, or a file's name is not text. Python's strict handler can do neither, that of the
        # locale C only the latter; all others can do both.
        errors = getattr(stream, "errors", None)
        fails = errors == "strict" or (errors == "surrogateescape" and codecs.lookup(stream.encoding).name != "utf-8")
        if fails and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def rows_done(progress: Progress, verb: str) -> Callable[[int, int], None]:
    def update(done: int, total: int) -> None:
        progress.update(f"{verb}: {done:,} of {total:,} rows", done / total if total else 1.0)

    return update


def bytes_done(progress: Progress, verb: str) -> Callable[[int, int], None]:
    def update(done: int, total: int) -> None:
        progress.update(f"{verb}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", done / total if total else 1.0)

    return update


class _Session:
    """What the error handler must know about the command line that is running."""

    arguments: tuple[str, ...] = ()

    @property
    def verbose(self) -> bool:
        # Read from the arguments, because an error may come before they are parsed.
        return any(argument in {"-v", "--verbose"} for argument in self.arguments)

    @property
    def command(self) -> str:
        return next((argument for argument in self.arguments if not argument.startswith("-")), "")

    def again(self) -> str:
        shown = [redact(argument) for argument in self.arguments]
        left_out = "" if shown == list(self.arguments) else " (with what its URIs had of user, password and query)"
        return shlex.join([PROGRAM, *shown]) + left_out

    def without_secrets(self, text: str) -> str:
        """What any part of us, or a library, made of the arguments, without what may be secret in them."""
        for argument in self.arguments:
            text = without_secrets(text, argument)
        return text


session = _Session()


def run_command(app: typer.Typer, arguments: Sequence[str], *, before: Callable[[], None] = lambda: None) -> int:
    """Runs a command line and gives its exit code; the result and the errors are printed.

    Args:
        before: called first; its errors are shown as the command's own.
    """
    _prepare_streams()  # before any file is opened
    session.arguments = tuple(arguments)
    limit_threads()
    if not session.verbose and not sys.warnoptions:
        warnings.simplefilter("ignore")
    # It warns where it finds no folder for its cache.
    logging.getLogger("matplotlib").setLevel(logging.NOTSET if session.verbose else logging.ERROR)
    try:
        with _ended_by_signals(), ended_by(_end):
            _check_working_folder()
            before()
            # Not `app()`: that would turn a broken pipe anywhere, and every usage error, into exits of its own.
            command = typer.main.get_command(app)
            with command.make_context(PROGRAM, list(arguments)) as context:
                command.invoke(context)
    except typer.Exit as ending:
        return ending.exit_code
    except KeyboardInterrupt as error:
        return _fail(Interrupted("interrupted", hint=_after_interruption()), error)
    except Interrupted as error:
        if session.command != "submit":  # which says itself what becomes of the job
            error.hint = _after_interruption()
        return _fail(error, error)
    except DenoiseBatchError as error:
        return _fail(error, error)
    except _ReaderGoneError:
        return 1
    except BrokenPipeError as error:
        if not _reader_gone():
            return _fail(_explained(error), error)
        _drop_stdout()  # help, which typer prints past `print_out`
        return 1
    except Exception as error:
        return _fail(_explained(error), error)
    return 0


def _check_working_folder() -> None:
    """Raises RequestError where it was deleted, which every relative path would suffer from; help and version go on."""
    try:
        os.getcwd()  # noqa: PTH109 (as good, and no more is wanted)
    except FileNotFoundError as error:
        if session.command and not {"-h", "--help"} & set(session.arguments):
            raise RequestError(
                "the working folder does not exist any more", hint="cd to a folder that does, then run again"
            ) from error


@dataclass(frozen=True, slots=True)
class GivenPath:
    """A path of a command line, given or by default.

    Attributes:
        name: of the argument or flag: `IN`, `--model`.
    """

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class ParsedCommand:
    """A command line that is sound, not run.

    Attributes:
        arguments: the words, from the command's name on.
        paths: what names a file, a folder or a URI.
        address: the Ray cluster that it names itself.
    """

    arguments: tuple[str, ...]
    paths: tuple[GivenPath, ...]
    address: str | None

    @property
    def name(self) -> str:
        return self.arguments[0]

    def has(self, name: str) -> bool:
        """Whether a path of this name was given."""
        return any(path.name == name for path in self.paths)


def parse_command(app: typer.Typer, arguments: Sequence[str]) -> ParsedCommand:
    """Parses a command line as `run_command` would, without running it; `--help` in it is answered.

    Raises:
        Exception: whatever `run_command` turns into a usage error.
    """
    if not arguments or arguments[0].startswith("-"):  # of no command
        return ParsedCommand(tuple(arguments), (), None)
    top: Any = typer.main.get_command(app)
    with top.make_context(PROGRAM, list(arguments)) as context:
        name, command, rest = top.resolve_command(context, list(arguments))
        with command.make_context(name, list(rest), parent=context) as parsed:
            values = dict(parsed.params)
    paths = []
    for parameter in command.params:
        value = values.get(parameter.name)
        if getattr(parameter, "metavar", None) not in _PATH_METAVARS or value is None:
            continue
        shown = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
        paths += [GivenPath(shown, str(one)) for one in (value if isinstance(value, list | tuple) else [value])]
    return ParsedCommand(tuple(arguments), tuple(paths), values.get("address"))


def _explained(error: Exception) -> DenoiseBatchError:
    """An error that no module of ours raised, as one that can be shown."""
    # Typer's usage errors have moved between modules over its versions; their interface has not.
    format_message = getattr(error, "format_message", None)
    if format_message is not None:
        message = _missing_arguments(error) or str(format_message()).rstrip(".")
        message = message.replace("Value error, ", "")  # pydantic's words
        path = getattr(getattr(error, "ctx", None), "command_path", PROGRAM)
        return FlagError(message[:1].lower() + message[1:], hint=f"see {path} --help")
    if isinstance(error, OSError) and error.errno is not None:
        exhausted = ran_out(error, "what was written")
        if exhausted is not None:
            return exhausted
        if error.filename is not None:
            return DenoiseBatchError(
                f"{error.filename}: {error.strerror}", hint="look at this file, its folder and its disk, then run again"
            )
    text = str(error).strip().splitlines()
    return DenoiseBatchError(
        f"unexpected {type(error).__name__}{f': {text[0]}' if text else ''}",
        hint="run the same command with -v for the traceback; it is a bug, please report it",
    )


def _missing_arguments(error: Any) -> str | None:
    """What a command takes, where one of its arguments is several paths: of `infer IN` the IN would count as OUT."""
    if getattr(getattr(error, "param", None), "nargs", 1) != -1:
        return None
    arguments = [parameter for parameter in error.ctx.command.params if parameter.param_type_name == "argument"]
    return f"missing argument: give {' and '.join(parameter.metavar for parameter in arguments)}"


def _fail(shown: DenoiseBatchError, cause: BaseException) -> int:
    with contextlib.suppress(OSError):
        if session.verbose:
            for part in traceback.format_exception(cause):
                _note(session.without_secrets(part.rstrip("\n")))
        _note(f"error: {session.without_secrets(' '.join(shown.message.split()))}")
        _note(f"hint: {' '.join(shown.hint.split())}")
    return shown.exit_code


def _end(error: DenoiseBatchError) -> None:
    """Ends this process with an error, whatever the main thread is about."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr.isatty():
            _note("")  # the line of progress has no end yet
        _fail(error, error)
        sys.stderr.flush()
    os._exit(error.exit_code)


def _after_interruption() -> str:
    if session.command in RESUMABLE:
        return f"what is done is kept; go on with: {session.again()}"
    if session.command == "demo":
        overwrite = "" if "--overwrite" in session.arguments else " --overwrite"
        return f"what it made so far is left in its folder; begin anew with: {session.again()}{overwrite}"
    nothing = "" if session.command == "evaluate" else "no output was written; "  # it may have drawn some pictures
    return f"{nothing}start again with: {session.again()}"


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM raises Terminated, so that what is half done is cleaned up. Ray replaces the handler: see `cluster`.

    Ctrl-C raises KeyboardInterrupt, as it does anyway, but is never lost; a second one interrupts the cleaning up. What
    a shell started in the background ignores it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    handlers = {signal.SIGTERM: Insistent(lambda: Terminated("stopped by SIGTERM", hint="start again"))}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = Insistent(KeyboardInterrupt, twice=True)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            handler.close()
            signal.signal(number, before[number])
