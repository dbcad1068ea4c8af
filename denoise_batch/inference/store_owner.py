"""Which run may write an output in an object store: stores have no locks, so runs watch each other.

Each session writes `owner.json`, the last one counts, and a beat of its own every few seconds. Who finds another
owner waits and looks: one that still beats is working, and this run is refused; one that does not is dead. Whoever
sees that it is not the owner any more stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from denoise_batch.errors import OutputError, StoreError

if TYPE_CHECKING:
    from types import TracebackType

    from denoise_batch.storage.store_prefix import StorePrefix

BEAT_S = 10.0
SILENCE_S = 35.0
"""Without a beat for this long, another run counts as dead."""

_LOOK_S = 2.0
_held: set[str] = set()  # tokens of this process's own sessions


class Owner:
    """Held while a session writes.

    Args:
        store: the output.
        folder: of the run's own objects in it.

    Attributes:
        token: of this session alone.
    """

    def __init__(self, store: StorePrefix, folder: str) -> None:
        self.store, self.folder = store, folder
        self.token = uuid.uuid4().hex[:12]
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        """Takes the output, once nobody else writes it.

        Raises:
            OutputError: another run does.
            StoreError: the store does not let us write.
        """
        other = self._owner()
        if other is not None and not _died_here(other):
            self._watch(other)
        self.store.put(f"{self.folder}/owner.json", json.dumps({"token": self.token, **_this_process()}).encode())
        self.store.delete(name for name in self.store.sizes(self.folder) if name.startswith(self._beat_of("")))
        _held.add(self.token)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        _held.discard(self.token)
        # What is left of an owner costs the next run a look; no reason to fail.
        with contextlib.suppress(StoreError, OSError):
            self.store.delete([self._beat_of(self.token)])
            if (self._owner() or {}).get("token") == self.token:
                self.store.delete([f"{self.folder}/owner.json"])

    def check(self, *, ask: bool = False) -> None:
        """Stops a run that another one has taken the output from.

        Args:
            ask: the store, now, rather than go by the last beat.

        Raises:
            OutputError: another run is the owner.
        """
        if ask and not self._lost:
            self._lost = (self._owner() or {}).get("token") != self.token
        if self._lost:
            raise OutputError(
                f"another run has taken over the output {self.store}",
                hint="leave it to that run; run this command again once it has ended",
            )

    def _owner(self) -> dict[str, Any] | None:
        content = self.store.read(f"{self.folder}/owner.json")
        try:
            found = json.loads(content) if content is not None else None
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def _watch(self, other: dict[str, Any]) -> None:
        """Returns once the other run is gone or has been silent for long enough."""
        beat = self._beat_of(str(other.get("token")))
        first, until = self.store.read(beat), time.monotonic() + SILENCE_S
        while time.monotonic() < until:
            time.sleep(_LOOK_S)
            if self._owner() is None:
                return
            if self.store.read(beat) != first:
                raise OutputError(
                    f"another run is writing {self.store} (process {other.get('pid')} on {other.get('host')})",
                    hint="wait for it, stop it, or give another output",
                )

    def _beat(self) -> None:
        count = 0
        while not self._stop.is_set():
            count += 1
            # A store that does not answer now says nothing about who the owner is.
            with contextlib.suppress(StoreError, OSError):
                self.store.put(self._beat_of(self.token), str(count).encode())
                if (self._owner() or {}).get("token") != self.token:
                    self._lost = True
                    return
            self._stop.wait(BEAT_S)

    def _beat_of(self, token: str) -> str:
        return f"{self.folder}/beat-{token}"


def nobody_owns(store: StorePrefix, folder: str) -> bool:
    """Whether no run holds the output, or one that died on this machine; of other machines it takes time to know."""
    other = Owner(store, folder)._owner()
    return other is None or _died_here(other)


def _this_process() -> dict[str, Any]:
    return {"host": platform.node(), "machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _machine() -> str:
    """This boot of this machine, and which process numbers are meant: those of a container are its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116 (of what the link leads to)
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in ticks since boot: its number may be given again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _died_here(other: dict[str, Any]) -> bool:
    machine, pid = other.get("machine"), other.get("pid")
    if not machine or machine != _machine() or not isinstance(pid, int):
        return False
    if pid == os.getpid() and other.get("started") == _started(pid):
        return other.get("token") not in _held  # its mark could not be deleted
    return _started(pid) != other.get("started")
