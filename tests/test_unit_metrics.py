"""Metrics fail nobody: not where Ray has none, nor where they break."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from denoise_batch.inference.ledger import Failure, Receipt
from denoise_batch.inference.unit_metrics import UnitMetrics

if TYPE_CHECKING:
    import pytest

RECEIPT = Receipt(
    unit=0,
    attempt=1,
    file="a.parquet",
    rows_in=100,
    rows_out=100,
    bytes=1,
    digest="",
    bad={"null": 3},
    seconds={"read": 0.5, "total": 2.0},
    fingerprint="",
)


class Recorder:
    """Stands for one of Ray's metrics."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        self.calls.append((value, tags))

    set = observe = inc


def test_what_is_counted() -> None:
    metrics = UnitMetrics()
    recorders = {name: Recorder() for name in ("images", "rate", "bad", "failed", "seconds")}
    metrics._metrics = recorders
    metrics.begin()
    for rows in (40, 40, 90):
        metrics.progress(rows)
    metrics.end(RECEIPT)
    metrics.begin()
    metrics.end(Failure(0, 1, "damaged"))
    assert [value for value, _ in recorders["images"].calls] == [40, 50, 10]
    assert recorders["bad"].calls == [(3, {"reason": "null"})]
    assert recorders["seconds"].calls == [(0.5, {"stage": "read"}), (2.0, {"stage": "total"})]
    assert recorders["failed"].calls == [(1.0, None)]
    assert [value for value, _ in recorders["rate"].calls[-2:]] == [50.0, 0.0]


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.util.metrics", None)  # its import fails
    metrics = UnitMetrics()
    metrics.begin()
    metrics.progress(10)
    metrics.end(RECEIPT)
    metrics.end(Failure(0, 1, "damaged"))
    assert metrics._metrics == {}
