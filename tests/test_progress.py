"""One line of progress: rewritten on a terminal, now and then elsewhere, and always the last one."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios
from dataclasses import replace

import pytest

from denoise_batch.inference.report import InferProgress
from denoise_batch.progress import Progress, duration, epoch_note, infer_line, training_line
from denoise_batch.training.progress import TrainProgress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tests themselves run on."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_every_few_seconds_and_the_last() -> None:
    stream, clock = io.StringIO(), _Clock()
    with Progress(stream, clock) as progress:
        for second in range(13):
            clock.now = float(second)
            progress.update(f"at {second}")
    assert stream.getvalue() == "at 5\nat 10\nat 12\n"


def test_a_terminal_has_one_line_with_a_bar() -> None:
    stream, clock = _Terminal(), _Clock()
    with Progress(stream, clock) as progress:
        progress.update("first", 0.0)
        progress.update("too soon", 0.2)
        clock.now = 1.0
        progress.update("half", 0.5)
    text = stream.getvalue()
    assert text.startswith("\r\x1b[K[....................] first\r\x1b[K")
    assert "too soon" not in text
    assert text.endswith("\r\x1b[K[##########..........] half\n")


@pytest.mark.parametrize(("columns", "shown"), [(None, 39), ("60", 59)])
def test_the_line_fits_the_terminal_it_is_on(columns: str | None, shown: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    master, slave = pty.openpty()
    with os.fdopen(master, "rb", buffering=0) as screen, os.fdopen(slave, "w") as stream:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
        with Progress(stream) as progress:
            progress.update("x" * 100, 0.5)
        seen = b""
        while not seen.endswith(b"\n"):  # it comes in pieces
            seen += screen.read(1000)
        assert seen == b"\r\x1b[K[##########..........] ".ljust(shown + 4, b"x") + b"\r\n"


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = _Terminal()
    with Progress(stream) as progress:
        progress.update("first", 0.0)
        progress.update("last", 1.0)
    assert stream.getvalue() == "last\n"


def test_a_note_takes_the_place_of_the_line() -> None:
    stream, clock = _Terminal(), _Clock()
    with Progress(stream, clock) as progress:
        progress.update("line")
        progress.update("dropped")
        progress.note("note")
        clock.now = 1.0
        progress.update("new")
    assert stream.getvalue() == "\r\x1b[Kline\r\x1b[Knote\n\r\x1b[Knew\n"


def test_nothing_to_show() -> None:
    stream = io.StringIO()
    with Progress(stream):
        pass
    assert stream.getvalue() == ""


def test_a_closed_stream_does_not_stop_a_job() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    stream.close()
    progress.update("line")
    progress.close()


def test_long_epochs_are_noted() -> None:
    now = TrainProgress(1, 10, 500, 1000, 0.1, None, 10.0, 75.0, 1, "cpu")
    assert epoch_note(now, None) is None
    assert epoch_note(replace(now, epoch_seconds=1800.0), None) is None
    long = replace(now, epoch_seconds=28800.0)
    kept = "note: an epoch takes about 8 h 00 min here, and nothing is kept before its end"
    assert epoch_note(long, None) == epoch_note(long, 600.0) == kept
    assert epoch_note(long, 20.0) is None
    assert epoch_note(long, 60.0) == (
        "note: an epoch takes about 8 h 00 min here, longer than --minutes: nothing is kept before the end"
    )
    assert epoch_note(replace(long, epoch=2), 60.0) == kept


def test_lines_for_training_and_denoising() -> None:
    now = TrainProgress(2, 10, 500, 1000, 0.1234, 17.5, 1234.5, 75.0, 1, "cpu")
    assert training_line(now) == ("train: epoch 2/10, loss 0.1234, 17.50 dB, 1,234 images/s, 1 min 15 s left", 0.5)
    over = replace(now, trained=True)  # its patience ended it
    assert training_line(over) == (
        "train: epoch 2/10, loss 0.1234, 17.50 dB, 1,234 images/s, finishing the model",
        1.0,
    )
    first = TrainProgress(1, None, 0, None, None, None, 0.0, None, 1, "cpu")
    assert training_line(first) == ("train: epoch 1", 0.0)
    infer = InferProgress("denoising", 1, 4, 250, 1000, 3, 2000.0, 4.0)
    assert infer_line(infer) == ("infer: denoising, 250 of 1,000 rows, 2,000 images/s, 3 bad, 4.0 s left", 0.25)


def test_durations() -> None:
    assert [duration(s) for s in (0.04, 9.94, 42, 61, 3599, 7384)] == [
        "0.0 s",
        "9.9 s",
        "42 s",
        "1 min 01 s",
        "59 min 59 s",
        "2 h 03 min",
    ]


def test_a_run_that_waits_says_for_what() -> None:
    waiting = InferProgress("starting", 0, 4, 0, 400, 0, waiting="1 GPU: the cluster has none free")
    assert infer_line(waiting) == ("infer: waiting for 1 GPU: the cluster has none free", 0.0)
