"""Cores that a container, a batch system or `taskset` leaves to a process, whatever the machine has."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from denoise_batch.process import control_groups
from denoise_batch.process.cores import THREADS, cores_here, limit_threads, threads_here

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One of 64 cores that all may be used, without control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(control_groups, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(control_groups, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.delenv(THREADS, raising=False)


def groups(folder: Path, own: str, **files: str) -> None:
    """Writes what /proc says this process is in, and the files of groups, by path with `__` for `/`."""
    (folder / "own").write_text(own)
    for name, content in files.items():
        path = folder / "cgroup" / name.replace("__", "/").replace("_max", ".max").replace("cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_without_limits_all_that_the_process_may_run_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cores_here() == 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 7})
    assert [threads_here(threads) for threads in (1, 2, 16)] == [1, 2, 2]
    groups(tmp_path, "0::/\n", cpu_max="max 100000\n")
    assert cores_here() == 2
    limit_threads()
    assert THREADS not in os.environ  # the libraries see to this themselves
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores_here() == 64


@pytest.mark.parametrize(
    ("quota", "whole"), [("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("9000000 100000", 64)]
)
def test_a_containers_share_of_time_counts(tmp_path: Path, quota: str, whole: int) -> None:
    groups(tmp_path, "0::/\n", cpu_max=f"{quota}\n")
    assert cores_here() == whole
    limit_threads()
    assert os.environ.get(THREADS) == (str(whole) if whole < 64 else None)


def test_what_the_environment_says_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups(tmp_path, "0::/\n", cpu_max="200000 100000\n")
    monkeypatch.setenv(THREADS, "7")
    limit_threads()
    assert os.environ[THREADS] == "7"


def test_the_smallest_of_the_groups_around_the_process(tmp_path: Path) -> None:
    own = "0::/user/job/step\n"
    groups(tmp_path, own, user__job__step__cpu_max="max 100000\n", user__job__cpu_max="300000 100000\n")
    assert cores_here() == 3
    groups(tmp_path, own, user__cpu_max="800000 100000\n", user__job__step__cpu_max="400000 200000\n")
    assert cores_here() == 2
    groups(tmp_path, "0::/elsewhere\n")
    assert cores_here() == 64


def test_the_older_kind_of_groups(tmp_path: Path) -> None:
    """A container of it sees its own group as the root, under a path that is the host's."""
    own = "12:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n1:name=systemd:/docker/1f\n"
    groups(tmp_path, own, **{"cpu,cpuacct__cfs_quota_us": "400000\n", "cpu,cpuacct__cfs_period_us": "100000\n"})
    assert cores_here() == 4
    groups(tmp_path, own, **{"cpu,cpuacct__cfs_quota_us": "-1\n", "memory__cfs_quota_us": "1\n"})
    assert cores_here() == 64
