"""The source distribution: all of a checkout, so that what the README promises of one holds there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml")
PARTS += ("cluster.yaml", "constraints.txt", ".gitignore", ".rayignore")
FOLDERS = ("benchmarks", "denoise_batch", "docs", "jobs", "tests")


@pytest.mark.slow
def test_a_source_distribution_has_what_a_checkout_has(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    checkout = tmp_path / "checkout"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in PARTS:
        shutil.copy(ROOT / name, checkout)
    expected = {str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()}
    build = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(checkout / "dist" / done.stdout.split()[-1]) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    assert not expected - found
