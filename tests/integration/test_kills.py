"""Real runs killed at random moments: a sample of `benchmarks/kill_sweep.py`, in a process with Rays of its own.

Drivers are killed in `test_infer` and `test_store_infer`, nodes in `test_clusters`; two runs race in `test_infer`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_sweep.py"
MUST_BE_ZERO = ("rows_lost", "rows_doubled", "byte_differences", "incomplete_sights", "strays", "failed_runs", "faults")


def test_kills_lose_nothing_double_nothing_and_show_nothing_incomplete(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "1", "--kinds", "midwrite"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "figures.json")], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [tally["kind"] for tally in figures["kills"]] == ["midwrite"]
    for tally in figures["kills"]:
        assert tally["kills"] >= 1
        assert {name: tally[name] for name in MUST_BE_ZERO if tally[name]} == {}
        assert tally["sights"] > 0
