"""What Ray says and shows unasked, kept off the screen and out of others' sight while `cluster` uses it."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoise_batch.lean_ray import replaced
from denoise_batch.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Iterator
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
    """The token that lets one into the Ray started here is for its user alone; Ray makes it readable to all."""
    token = Path("~/.ray/auth_token").expanduser()
    before = token.exists()
    yield
    if not before:
        with contextlib.suppress(OSError):
            token.chmod(0o600)


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
