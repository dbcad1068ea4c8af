"""`infer` killed at a sample of its steps on the disk; `benchmarks/commit_steps.py` kills at all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "commit_steps.py"


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("more", [[], ["--no-swap", "--scenarios", "folder-overwrite,file-overwrite"]])
def test_a_kill_at_any_step_loses_nothing_and_shows_nothing_half_done(more: list[str]) -> None:
    command = [sys.executable, str(SCRIPT), "--sample", "6", "--chains", "1", "--jobs", "1", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    total = done.stdout.splitlines()[-1].split()
    assert total[0] == "all"
    assert int(total[2]) >= 12  # kills
