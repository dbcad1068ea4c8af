"""A driver of `infer` without Ray and without work: every unit is answered at once by a receipt that is made up."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def driver_alone(finish: int | None = None, on_first: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While it lasts, `infer` plans, commits and publishes as ever, and its units' files are empty.

    Args:
        finish: units to answer; then the run is interrupted. None: all of them.
        on_first: called when the first unit is given out.
    """
    from denoise_batch.cluster.capacity import Node
    from denoise_batch.errors import Interrupted
    from denoise_batch.inference import infer as module
    from denoise_batch.inference.ledger import Receipt

    stages = dict.fromkeys(("read", "decode", "forward", "encode", "write", "verify", "total"), 1.234)
    machine = "Some GPU of a long name; threads 2; batch 16384; torch 2.13.0; pyarrow 26.0.1"
    answered = 0

    def answers(assignments: Any, options: Any, *_: Any, **__: Any) -> Any:
        nonlocal answered
        if not answered:
            on_first()
        for assignment in assignments:
            if answered == finish:
                raise Interrupted("interrupted on purpose", hint="")
            answered += 1
            Path(options.staging, assignment.name).write_bytes(b"")
            unit = assignment.unit
            yield Receipt(
                unit.index,
                1,
                assignment.name,
                unit.rows,
                unit.rows,
                0,
                "0" * 32,
                seconds=dict(stages),
                fingerprint=machine,
            )

    with (
        mock.patch.object(module, "process_units", answers),
        mock.patch.object(module, "check_seen_by_nodes"),
        mock.patch.object(
            module,
            "capacity",
            SimpleNamespace(living_nodes=lambda: [Node(2, 0)], nodes_to_come=list, lost_nodes=set),
        ),
        mock.patch.object(module, "connect", return_value=contextlib.nullcontext()),
        contextlib.suppress(Interrupted),
    ):
        yield
