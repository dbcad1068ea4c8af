"""A signal ends what the main thread does, even where its exception is lost at first; cleaning up is left alone."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from denoise_batch.process.interruption import Insistent

if TYPE_CHECKING:
    from collections.abc import Iterator


class StoppedError(Exception):
    pass


@pytest.fixture
def handler() -> Iterator[Insistent]:
    made = Insistent(StoppedError)
    before = signal.signal(signal.SIGTERM, made)
    yield made
    made.close()
    signal.signal(signal.SIGTERM, before)


def wait(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_lost_in_a_destructor_comes_again(handler: Insistent) -> None:
    class Deaf:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    deaf = Deaf()
    del deaf
    assert handler.came
    with pytest.raises(StoppedError):
        wait(10)


@pytest.mark.usefixtures("handler")
def test_an_exception_that_foreign_code_passes_over_comes_again() -> None:
    try:
        signal.raise_signal(signal.SIGTERM)
    except Exception:
        passed_over = True
    assert passed_over
    with pytest.raises(StoppedError):
        wait(10)


@pytest.mark.parametrize("other", [False, True], ids=["itself", "as the cause of another"])
def test_what_cleans_up_is_not_disturbed(handler: Insistent, other: bool) -> None:
    cleaned = False

    def work() -> None:
        nonlocal cleaned
        try:
            signal.raise_signal(signal.SIGTERM)
        except StoppedError as error:
            if other:
                raise ValueError from error
            raise
        finally:
            wait(1.3)
            signal.raise_signal(signal.SIGTERM)  # nor by a second signal
            cleaned = True
            handler.close()

    with pytest.raises(ValueError if other else StoppedError):
        work()
    assert cleaned


def test_a_second_signal_from_outside_may_interrupt_what_cleans_up() -> None:
    handler = Insistent(StoppedError, twice=True)
    before = signal.signal(signal.SIGTERM, handler)
    cleaned = 0

    def work() -> None:
        nonlocal cleaned
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            wait(1.3)  # its own repetitions leave it alone
            cleaned += 1
            signal.raise_signal(signal.SIGTERM)
            cleaned += 1

    try:
        with pytest.raises(StoppedError):
            work()
    finally:
        handler.close()
        signal.signal(signal.SIGTERM, before)
    assert cleaned == 1


def test_nothing_comes_once_it_is_closed(handler: Insistent) -> None:
    with pytest.raises(StoppedError):
        signal.raise_signal(signal.SIGTERM)
    handler.close()
    wait(0.8)
