"""A handler for a signal that is to end the process, whatever the main thread was about when it came.

An exception that is raised by a signal's handler is lost where the main thread happens to be inside a destructor or a
weak reference's callback, which Python lets no exception out of (imports have some), or inside foreign code that passes
over all of them.
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_AGAIN_SECONDS: Final = 0.5


class Insistent:
    """Raises an exception in the main thread, and again every half second for as long as nobody handles it.

    Args:
        error: makes the exception.
        twice: a second signal, not sent from here, interrupts what cleans up after the first.

    Attributes:
        came: whether the signal came.
    """

    def __init__(self, error: Callable[[], BaseException], *, twice: bool = False) -> None:
        self.came = False
        self._error = error
        self._twice = twice
        self._sent_from_here = False
        self._raised: BaseException | None = None
        self._timer: threading.Timer | None = None
        self._closed = False
        self._lock = threading.Lock()

    def __call__(self, number: int, _frame: object) -> None:
        self.came = True
        again, self._sent_from_here = self._sent_from_here, False
        self._arm(number)
        if not self._being_handled() or (self._twice and not again):
            self._raised = self._error()
            raise self._raised

    def close(self) -> None:
        """From now on the signal is left to whoever handles it next."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()

    def _arm(self, number: int) -> None:
        if self._timer is not None and self._timer.is_alive():
            return  # it also waits where a signal comes a second time
        self._timer = threading.Timer(_AGAIN_SECONDS, self._send, [number])
        self._timer.daemon = True
        self._timer.start()

    def _send(self, number: int) -> None:
        self._timer = None
        with self._lock:
            main: Any = threading.main_thread().ident
            if not self._closed:
                self._sent_from_here = True
                signal.pthread_kill(main, number)

    def _being_handled(self) -> bool:
        """Whether the main thread is in a `finally`, `except` or `with` that the exception has led to."""
        pending, seen = [sys.exc_info()[1]], set[int]()
        while pending:
            error = pending.pop()
            if error is None or id(error) in seen:
                continue
            if error is self._raised:
                return True
            seen.add(id(error))
            pending += [error.__context__, error.__cause__]
        return False
