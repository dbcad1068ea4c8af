"""One Ray for all integration tests of a session: starting it costs seconds."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from denoise_batch.cluster import connect

if TYPE_CHECKING:
    from collections.abc import Iterator


# Of clusters that tests start, too: with Ray's own niceness of 15 a worker takes minutes to start beside another test.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of two CPUs in this process, as `train` starts it; `connect` finds it running and uses it.

    Clusters, and all that Ray starts there besides, are in `test_clusters` and `test_submit`.
    """
    with connect(cpus=2, training=True):
        yield


_HANGING_SECONDS = 600
"""Ray waits without an end, so each test has one: far from the minute or two that it takes on two idle cores, since
what starts processes takes several times as long on a machine that others use, too."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.integration)
            item.add_marker(pytest.mark.timeout(_HANGING_SECONDS))
