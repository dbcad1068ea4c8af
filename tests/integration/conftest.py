"""One Ray for all integration tests of a session: starting it costs seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from denoise_batch.cluster import connect

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of two CPUs in this process; `connect` finds it running and uses it."""
    with connect(cpus=2):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker(pytest.mark.integration)
