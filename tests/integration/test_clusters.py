"""Real clusters of several nodes on this machine, of which some die and others join while runs go on."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch.bundle.history import read_history
from denoise_batch.inference.ledger import Ledger
from denoise_batch.inference.run_folder import work_folder

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from kill_runs import Nodes, actors, kill, open_files, parent, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import WriteImages

UNITS, ROWS, POISON = 16, 1500, 5
WAIT_S = 240.0

# One attempt, and once Ray has noticed the lost node (15 s later, and then the other file is there) no long wait for
# another: it would cost the test its seconds again. Ray Data looks for new machines every 20 s; where the first file
# appears, it looks at once.
_INFER = """
import contextlib, pathlib, sys, threading, time
from denoise_batch import cli
from denoise_batch.cluster import capacity
from denoise_batch.inference import infer

def look_at_once(joined, lost):
    import ray
    while not joined.exists():
        time.sleep(0.2)
    looked, before = False, capacity.lost_nodes()
    while not looked or infer.NODE_LOSS_SECONDS > 1:
        time.sleep(0.2)
        with contextlib.suppress(Exception):
            if capacity.lost_nodes() - before:
                infer.NODE_LOSS_SECONDS = 1.0
                lost.touch()
            if not looked:
                coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
                ray.get(coordinator.get_reserved_resources.remote("test", recompute=True))
                looked = True

infer.ATTEMPTS = 1
files = [pathlib.Path(name) for name in sys.argv[1:3]]
threading.Thread(target=look_at_once, args=files, daemon=True).start()
sys.exit(cli.run(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head and two nodes, one CPU each."""
    cluster = Nodes(2, tmp_path_factory.mktemp("cluster") / "log")
    try:
        yield cluster
    finally:
        cluster.clean()


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _until(process: subprocess.Popen[str], what: Callable[[], Any], named: str) -> Any:
    def look() -> Any:
        assert process.poll() is None, process.communicate()[0]
        return what()

    return wait_for(look, WAIT_S, named, pause=0.1)


def test_training_goes_on_when_one_of_its_nodes_is_killed(
    nodes: Nodes, tmp_path: Path, digits: Any, write_images: WriteImages
) -> None:
    """Two workers on two of three nodes: the one that is lost is replaced on the third."""
    data, out = write_images(tmp_path / "clean.parquet", digits[0].repeat(5, axis=0)), tmp_path / "model"
    history = tmp_path / ".model.training" / "history.csv"
    command = [sys.executable, "-m", "denoise_batch.cli", "train", "--address", nodes.address, "--data", str(data)]
    command += ["--out", str(out), "--architecture", "seed", "--epochs", "8", "--workers", "2"]
    with _running(command) as process:
        _until(process, lambda: history.exists() and len(history.read_text().splitlines()) > 2, "two epochs")
        workers = actors(nodes.session, "RayTrainWorker")
        assert len(workers) == len({parent(pid) for pid in workers}) == 2
        nodes.tell(f"kill {nodes.victims('RayTrainWorker')[0]}")
        text, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, text
    rows = read_history(out / "history.csv")
    assert [row.epoch for row in rows] == list(range(1, 9))
    assert rows[-1].val_psnr_noisy > rows[0].val_psnr_noisy
    assert "  workers: 2" in text


def _metrics(nodes: Nodes) -> dict[str, dict[tuple[str, str], float]]:
    """What the nodes' Prometheus endpoints say of each of our actors, by name and by stage or reason."""
    actors: dict[str, dict[tuple[str, str], float]] = {}
    for port in nodes.folder.glob("metrics_export_port_*"):
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port.read_text()}/metrics") as said,
        ):
            for line in said.read().decode().splitlines():
                found = re.match(r"ray_denoise_batch_(\w+)\{(.*)\} ([-+.e\d]+)$", line)
                if found:
                    label = re.search(r'(?:stage|reason)="(\w+)"', found[2])
                    (worker,) = re.findall(r'WorkerId="(\w+)"', found[2])
                    actors.setdefault(worker, {})[found[1], label[1] if label else ""] = float(found[3])
    return actors


def test_actors_count_for_prometheus(nodes: Nodes, tmp_path: Path, digits: Any, write_images: WriteImages) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0], bad=np.arange(len(digits[0])) < 7)
    command = ["infer", str(source), str(tmp_path / "out.parquet"), "--address", nodes.address, "--max-bad", "1"]
    subprocess.run([sys.executable, "-m", "denoise_batch.cli", *command], check=True, timeout=WAIT_S)
    wanted = {("images_total", ""): len(digits[0]), ("bad_rows_total", "null"): 7}
    wanted |= {("stage_seconds_count", stage): 1 for stage in ("read", "decode", "forward", "encode", "write", "total")}

    def told() -> list[dict[tuple[str, str], float]]:
        # One actor has the one unit.
        return [actor for actor in _metrics(nodes).values() if {key: actor.get(key, 0.0) for key in wanted} == wanted]

    (actor,) = wait_for(told, 60, "metrics of an actor")  # they tell their machine's agent every ten seconds
    assert actor["images_per_second", ""] > 0
    assert actor["stage_seconds_sum", "total"] > 0


def _kill_whoever_takes(unit: int, nodes: Nodes, staging: Path, over: threading.Event, deaths: list[int]) -> None:
    """What a unit that kills its worker looks like from outside."""
    while not over.wait(0.1):  # its file is open for seconds
        for pid in actors(nodes.session):
            if any(f"unit-{unit:07d}." in name for name in open_files(pid, staging)) and kill(pid):
                deaths.append(pid)


def test_a_node_dies_and_one_joins_while_a_unit_kills_its_workers(
    nodes: Nodes, tmp_path: Path, digits: Any, write_images: WriteImages
) -> None:
    while len(nodes.raylets) < 2:
        nodes.tell("add")
    source, out, joined, lost = (tmp_path / name for name in ("in", "out", "joined", "lost"))
    source.mkdir()
    for number in range(UNITS):
        ids = pa.array(range(number * ROWS, (number + 1) * ROWS))
        write_images(source / f"{number:02d}.parquet", digits[0].repeat(ROWS // 300, axis=0), id=ids)
    staging, over, deaths = work_folder(out) / "staging", threading.Event(), list[int]()
    command = ["infer", str(source), str(out), "--address", nodes.address, "--batch-size", "4"]
    poison = threading.Thread(target=_kill_whoever_takes, args=(POISON, nodes, staging, over, deaths))
    poison.start()
    try:
        with _running([sys.executable, "-c", _INFER, str(joined), str(lost), *command]) as process:
            _until(process, lambda: len({parent(pid) for pid in actors(nodes.session)}) == 3, "actors on three nodes")
            assert all(
                b"MALLOC_ARENA_MAX=1\0" in Path(f"/proc/{pid}/environ").read_bytes() for pid in actors(nodes.session)
            )
            _until(process, lambda: _committed(out), "a receipt")
            known, asleep = set(nodes.raylets), set[int]()

            def fresh() -> list[int]:
                """The new node's actors."""
                return [pid for pid in actors(nodes.session) if parent(pid) in set(nodes.raylets) - known]

            def hold() -> None:
                """All other actors stand still, so that there is work left for the new node's.

                One that the poison has just killed starts anew, and would do all that is left by itself.
                """
                others = set(actors(nodes.session)) - set(fresh())
                asleep.update(pid for pid in others if kill(pid, signal.SIGSTOP))

            def until(what: Callable[[], Any], named: str) -> Any:
                def look() -> Any:
                    hold()
                    return what()

                return _until(process, look, named)

            try:
                hold()
                nodes.tell("add")
                joined.touch()
                until(fresh, "the new node's actor")
                done = _committed(out)
                until(lambda: _committed(out) > done, "a receipt of its")
                # Last: what is given to a lost node, until Ray has noticed, comes back for the wave after this one.
                victims = until(lambda: known.intersection(nodes.victims()), "an actor on a node that was there")
                nodes.tell(f"kill {victims.pop()}")
                # Or what was on it would be charged for its end, where Ray is slow to notice.
                until(lost.exists, "Ray's notice of the lost node")
            finally:
                for pid in asleep:
                    kill(pid, signal.SIGCONT)
            text, _ = process.communicate(timeout=WAIT_S)
            assert process.returncode == 1, text
    finally:
        over.set()
        poison.join()
    assert deaths
    assert re.search(rf"error: 1 of {UNITS} units failed: unit {POISON} \(.*{POISON:02d}\.parquet", text)
    assert not out.exists()
    with Ledger(work_folder(out) / "ledger") as ledger:
        assert sorted(ledger.receipts) == [unit for unit in range(UNITS) if unit != POISON]

    # Without the poison the same command finishes; every row is there once.
    again = subprocess.run(
        [sys.executable, "-m", "denoise_batch.cli", *command],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    table = pq.read_table(out)
    assert table["id"].to_pylist() == list(range(UNITS * ROWS))
    assert table.drop_columns("denoised").equals(pq.read_table(source))
    assert np.count_nonzero(table["denoised"].is_null()) == 0


def _committed(out: Path) -> int:
    """Receipts on disk."""
    ledger = work_folder(out) / "ledger"
    return sum(path.read_bytes().count(b'["receipt",') for path in ledger.glob("*.jsonl")) if ledger.is_dir() else 0
