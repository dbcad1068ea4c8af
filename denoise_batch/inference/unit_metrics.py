"""What an actor tells Prometheus of its work, through Ray: docs/cluster.md lists the metrics."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from denoise_batch.inference.ledger import Receipt

if TYPE_CHECKING:
    from denoise_batch.inference.ledger import Failure

_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class UnitMetrics:
    """Counts one actor's images, bad rows, failed attempts, and the seconds of each stage.

    A few calls a second, each a few microseconds; where Ray has no metrics, nothing is counted and nothing fails.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._counted, self._since = 0, time.monotonic()
        with contextlib.suppress(Exception):
            from ray.util.metrics import Counter, Gauge, Histogram

            self._metrics = {
                "images": Counter("denoise_batch_images", "Images denoised, those of attempts that fail later too."),
                "rate": Gauge("denoise_batch_images_per_second", "Images a second of each actor, lately."),
                "bad": Counter("denoise_batch_bad_rows", "Rows without a usable image.", tag_keys=("reason",)),
                "failed": Counter("denoise_batch_failed_attempts", "Attempts at units that came to nothing."),
                "seconds": Histogram(
                    "denoise_batch_stage_seconds",
                    "Seconds that a unit spent in each stage; stages overlap.",
                    boundaries=list(_SECONDS),
                    tag_keys=("stage",),
                ),
            }

    def begin(self) -> None:
        """A unit is begun."""
        self._counted, self._since = 0, time.monotonic()

    def progress(self, rows: int) -> None:
        """So many rows of the unit are done."""
        now = time.monotonic()
        fresh, seconds = rows - self._counted, now - self._since
        self._counted, self._since = rows, now
        with contextlib.suppress(Exception):
            if fresh > 0:
                self._metrics["images"].inc(fresh)
            if seconds > 0:
                self._metrics["rate"].set(fresh / seconds)

    def end(self, answer: Receipt | Failure) -> None:
        """The unit is done, or came to nothing."""
        with contextlib.suppress(Exception):
            if not isinstance(answer, Receipt):
                self._metrics["failed"].inc()
                self._metrics["rate"].set(0.0)
                return
            self.progress(answer.rows_in)
            self._metrics["rate"].set(answer.rows_in / max(answer.seconds["total"], 1e-6))
            for stage, seconds in answer.seconds.items():
                self._metrics["seconds"].observe(seconds, tags={"stage": stage})
            for reason, count in answer.bad.items():
                self._metrics["bad"].inc(count, tags={"reason": reason})
