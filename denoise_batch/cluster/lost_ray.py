"""Notices that the Ray which this process uses is gone, without asking Ray.

Once its service (GCS) is gone, whatever asks for it waits, and in the end Ray's core ends this process without a word:
after a minute in a cluster, after five seconds where Ray was started here.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from typing import TYPE_CHECKING

from denoise_batch.errors import JobFailed
from denoise_batch.storage.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOST_AND_PORT = re.compile(r"(?P<host>\[[^\]]+\]|[^/:\[\]]+):(?P<port>[0-9]{1,5})")

_LOOK_SECONDS = 1.0
_REFUSED_SECONDS = 40.0  # it may come back; what is left of Ray's minute is for the message
_CONNECT_SECONDS = 3.0
_OWN_SECONDS, _HEAD_SECONDS = 2.0, 10.0  # for the main thread to come back from Ray, of what is left until Ray's end
_SERVICE = "gcs_server"
_NEVER_REPLACED = (_SERVICE, "raylet")

_end: Callable[[JobFailed], None] | None = None


@contextlib.contextmanager
def ended_by(end: Callable[[JobFailed], None]) -> Iterator[None]:
    """While it lasts, what ends this process, and says why, where the main thread does not come back from Ray.

    Ray Data asks the service for something more when it is interrupted, and no signal ends that wait.
    """
    global _end
    before, _end = _end, end
    try:
        yield
    finally:
        _end = before


@contextlib.contextmanager
def watched(found: Callable[[JobFailed], None]) -> Iterator[None]:
    """While it lasts, a thread looks every second whether Ray is still there.

    Args:
        found: called from that thread, once, with what happened. Where the block is not left soon after, `ended_by`
            ends this process: Ray's core would.
    """
    address, left = _head_address(), threading.Event()
    threading.Thread(target=_watch, args=(address, left, found), daemon=True, name="ray-watch").start()
    try:
        yield
    finally:
        left.set()


def _watch(address: str | None, left: threading.Event, found: Callable[[JobFailed], None]) -> None:
    refused: float | None = None  # since when
    while not left.wait(_LOOK_SECONDS):
        name = dead_process()
        if name is not None:
            verdict, seconds = _process_died(name), _OWN_SECONDS if name == _SERVICE else None
            break
        if address is None or _answers(address):
            refused = None
            continue
        refused = refused or time.monotonic()
        if time.monotonic() - refused > _REFUSED_SECONDS:
            verdict, seconds = _head_lost(address), _HEAD_SECONDS
            break
    else:
        return
    found(verdict)
    if seconds is not None and not left.wait(seconds) and _end is not None:
        _end(verdict)


def dead_process() -> str | None:
    """The process, which Ray never replaces, that the Ray started here has lost; None where it has all, or in a
    cluster."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    dead = {name for name, _ in node.dead_processes()} if node is not None else set()
    return next((name for name in _NEVER_REPLACED if name in dead), None)


def is_gone() -> bool:
    """Whether Ray is connected and its service gone, here or in a cluster: what asks for it may end this process."""
    import ray

    if not ray.is_initialized():
        return False
    address = _head_address()
    return dead_process() == _SERVICE or (address is not None and not _answers(address))


def _head_address() -> str | None:
    """Of the cluster's service; None where Ray was started here, or is not connected."""
    import ray
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    if node is None or node.all_processes or not ray.is_initialized():
        return None
    address = str(ray.get_runtime_context().gcs_address)
    return address if HOST_AND_PORT.fullmatch(address) else None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError):
        return False
    return True


def _process_died(name: str) -> JobFailed:
    return JobFailed(
        f"Ray's own process on this machine ({name}) died: it was killed, or memory ran out",
        hint="what is done is kept; run the same command again to go on",
    )


def _head_lost(address: str) -> JobFailed:
    return JobFailed(
        f"the cluster's head at {redact(address)} does not answer any more",
        hint="what is done is kept; run the same command again once it is up",
    )
