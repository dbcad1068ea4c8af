"""Joining parts into one file: in a process of its own, which must not outlive the run's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_DRIVER = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from denoise_batch.inference import merging

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=merging.end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(60)
"""


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        # Where nothing adopts orphans a dead one keeps its number.
        return not Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.slow
def test_the_joining_process_ends_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(_DRIVER)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as driver:
        assert driver.stdout is not None
        joining = int(driver.stdout.readline())
        driver.send_signal(signal.SIGKILL)
    until = time.monotonic() + 20
    while _alive(joining) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _alive(joining)
