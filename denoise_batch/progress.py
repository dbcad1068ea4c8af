"""One line of progress on stderr: rewritten in place on a terminal, printed every few seconds elsewhere.

with Progress() as progress:
    progress.update("12,800 of 60,000 rows", 0.21)
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from denoise_batch.inference.report import InferProgress
    from denoise_batch.training.progress import TrainProgress

_TERMINAL_SECONDS = 0.1
_LOG_SECONDS = 5.0
_BAR_CELLS = 20
_LONG_SECONDS = 1800.0


class Progress:
    """Shows the newest of the texts it is given.

    Args:
        stream: where to; stderr unless told.
        clock: seconds from any start, rising.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"  # which shows \r\x1b[K as it is
        self._shown_at = clock() if not self._terminal else float("-inf")
        self._shown: str | None = None
        self._pending: str | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, text: str, fraction: float | None = None) -> None:
        """Shows `text` if enough time has passed since the last one, else keeps it for `close`.

        Args:
            text: one line.
            fraction: 0..1 done, where known; draws a bar on a terminal.
        """
        self._pending = self._with_bar(text, fraction) if self._terminal else text
        if self._clock() - self._shown_at >= (_TERMINAL_SECONDS if self._terminal else _LOG_SECONDS):
            self._show()

    def note(self, text: str) -> None:
        """Prints a line that stays, in the place of the progress line, which starts anew."""
        if self._terminal and self._shown is not None:
            self._write("\r\x1b[K")
        self._write(f"{text}\n")
        self._shown = self._pending = None

    def close(self) -> None:
        """Shows the newest text if it is not shown yet, and ends the line."""
        if self._pending is not None and self._pending != self._shown:
            self._show()
        if self._terminal and self._shown is not None:
            self._write("\n")
        self._shown = self._pending = None

    def _show(self) -> None:
        assert self._pending is not None
        self._write(f"\r\x1b[K{self._pending}" if self._terminal else f"{self._pending}\n")
        self._shown, self._shown_at = self._pending, self._clock()

    def _with_bar(self, text: str, fraction: float | None) -> str:
        if fraction is not None:
            cells = int(min(max(fraction, 0.0), 1.0) * _BAR_CELLS)
            text = f"[{'#' * cells}{'.' * (_BAR_CELLS - cells)}] {text}"
        # A line that wraps cannot be rewritten.
        return text[: self._columns() - 1]

    def _columns(self) -> int:
        """The width of the terminal that the line is on; COLUMNS comes first, as in `shutil`, which asks stdout."""
        if not os.environ.get("COLUMNS"):
            with contextlib.suppress(OSError, ValueError):
                if columns := os.get_terminal_size(self._stream.fileno()).columns:  # 0 where nobody has set it
                    return columns
        return shutil.get_terminal_size().columns

    def _write(self, text: str) -> None:
        # Progress that nobody can read any more (stderr closed, a broken pipe) must not stop a job.
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            pass


def infer_line(now: InferProgress) -> tuple[str, float]:
    """A denoising run's progress: the line, and the share that is done."""
    if now.waiting:
        return f"infer: waiting for {now.waiting}", now.rows / max(1, now.total_rows)
    parts = [f"infer: {now.phase}, {now.rows:,} of {now.total_rows:,} rows"]
    if now.rate:
        parts.append(f"{now.rate:,.0f} images/s")
    if now.bad_rows:
        parts.append(f"{now.bad_rows:,} bad")
    if now.seconds_left is not None:
        parts.append(f"{duration(now.seconds_left)} left")
    return ", ".join(parts), now.rows / max(1, now.total_rows)


def training_line(now: TrainProgress) -> tuple[str, float]:
    """A training's progress: the line, and the share that is done."""
    parts = [f"train: epoch {now.epoch}{f'/{now.epochs}' if now.epochs else ''}"]
    if now.loss is not None:
        parts.append(f"loss {now.loss:.4f}")
    if now.psnr is not None:
        parts.append(f"{now.psnr:.2f} dB")
    if now.images_per_second:
        parts.append(f"{now.images_per_second:,.0f} images/s")
    if now.trained:
        parts.append("finishing the model")
    elif now.seconds_left is not None:
        parts.append(f"{duration(now.seconds_left)} left")
    share = now.images / now.total_images if now.total_images else 0.0
    return ", ".join(parts), 1.0 if now.trained else share  # which a training that stops early does not come to


def epoch_note(now: TrainProgress, minutes: float | None) -> str | None:
    """What to know of a training that keeps nothing for more than half an hour; None of others, or if not known yet.

    Args:
        minutes: that the training takes, where the clock ends it.
    """
    if now.epoch_seconds is None or min(now.epoch_seconds, 60.0 * (minutes or math.inf)) <= _LONG_SECONDS:
        return None
    takes = f"note: an epoch takes about {duration(now.epoch_seconds)} here"
    if now.epoch == 1 and minutes is not None and now.epoch_seconds > 60.0 * minutes:
        return f"{takes}, longer than --minutes: nothing is kept before the end"
    return f"{takes}, and nothing is kept before its end"


def duration(seconds: float) -> str:
    """`4.2 s`, `37 s`, `3 min 05 s` or `2 h 11 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
