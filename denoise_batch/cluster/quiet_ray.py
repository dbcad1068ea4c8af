"""What Ray says and shows unasked, kept off the screen and out of others' sight while `cluster` uses it."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoise_batch.cluster.lean_ray import replaced
from denoise_batch.storage.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


def log_that_cannot_be_written(verbose: bool) -> AbstractContextManager[None]:
    """Where the disk of Ray's log is full, `logging` would print a traceback for each line of it."""
    return replaced(logging, "raiseExceptions", verbose)


def no_secrets_in_job() -> AbstractContextManager[None]:
    """Ray tells the whole cluster the command line of each job: without what is secret in its URIs."""
    from ray._private import utils

    return replaced(utils, "get_entrypoint_name", lambda: shlex.join(map(redact, sys.argv)))


@contextlib.contextmanager
def private_token() -> Iterator[None]:
    """The token that lets one into the Ray started here is for its user alone; Ray makes it readable to all.

    Where Ray cannot keep it in ~/.ray, a folder of this process's own has it until that ends.
    """
    token = Path(os.path.expanduser("~/.ray/auth_token"))  # noqa: PTH111 (no error where nobody has a home)
    before = token.exists()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, AttributeError):  # of another Ray than this one
            from ray._private.authentication import authentication_token_setup as setup

            save = _saved_somewhere(setup.generate_and_save_token)
            stack.enter_context(replaced(setup, "generate_and_save_token", save))
        yield
    if not before:
        with contextlib.suppress(OSError):
            token.chmod(0o600)


def _saved_somewhere(save: Callable[[], None]) -> Callable[[], None]:
    """Ray's function that makes a token and saves it in ~/.ray → one that has another place where that fails."""

    def save_somewhere() -> None:
        try:
            save()
        except (OSError, RuntimeError):  # it cannot be written; there is no home
            import secrets
            import tempfile

            folder = os.environ.get("RAY_TMPDIR") or None  # where Ray keeps all else; it may be to be made yet
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
            own = Path(tempfile.mkdtemp(prefix="denoise-batch-", dir=folder))
            atexit.register(_remove, own, os.getpid())
            path = own / "auth_token"
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123
                file.write(secrets.token_hex(32))
            # Ray's processes, and one more Ray that this process may start, find it by this.
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)

    return save_somewhere


def _remove(folder: Path, process: int) -> None:
    """Removes a folder at the end of the process that made it; others that were forked off it do not."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def muted(on: bool) -> Iterator[None]:
    """Drops what C code writes to stderr: Ray's core announces there that its log level was set."""
    if not on:
        yield
        return
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def messages_off_stdout(verbose: bool) -> AbstractContextManager[None]:
    """Ray prints cluster events (a worker died, …) to stdout, where the result belongs: to stderr, or not at all."""
    from ray._private import worker

    def to_stderr(data: dict[str, Any], **_: Any) -> None:
        if verbose:
            sys.stderr.writelines(f"{line}\n" for line in data["lines"])

    return replaced(worker, "print_to_stdstream", to_stderr)
