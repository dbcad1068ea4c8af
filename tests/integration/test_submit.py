"""`submit` against a real head: a dashboard and a token, on loopback, with folders of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest

from denoise_batch import cli
from denoise_batch.inference.run_folder import work_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import WriteImages

_START_SECONDS = 90
_PORTS = (
    "port", "dashboard-port", "ray-client-server-port", "node-manager-port", "object-manager-port",
    "runtime-env-agent-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port",
)  # fmt: skip


class Head:
    """A cluster of one node with a token, as `ray start --head` starts it, in a folder of its own.

    Attributes:
        url: its dashboard.
        environment: for a process that may use it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "token").write_text(secrets.token_hex(32))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        self.environment["RAY_worker_niceness"] = "0"
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self.url = f"http://127.0.0.1:{self._ports['dashboard-port']}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # The cluster's `python` is the one that runs the test; RAY_TMPDIR keeps its address out of other Rays' sight.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--temp-dir", str(self.folder),
            "--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--num-cpus", "2",
            "--object-store-memory", "100000000", "--disable-usage-stats",
            *(word for name, port in self._ports.items() for word in (f"--{name}", str(port))),
        ]  # fmt: skip
        started = self.folder / "start.log"
        with started.open("w") as log:
            self._process = subprocess.Popen(
                command,
                env={**self.environment, "PATH": path, "RAY_TMPDIR": str(self.folder)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        token = (self.folder / "token").read_text()
        request = urllib.request.Request(f"{self.url}/api/version", headers={"Authorization": f"Bearer {token}"})
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                urllib.request.urlopen(request, timeout=5).close()
                return
            except OSError:
                assert self._process.poll() is None, started.read_text()
                assert time.monotonic() < deadline, started.read_text()
                time.sleep(0.3)

    def kill(self) -> None:
        """Ends it with all its processes, the jobs' drivers among them, as a machine that loses its power does."""
        assert self._process is not None
        for pid in _processes_of(self._process.pid, self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def submit(self, *arguments: object) -> subprocess.Popen[str]:
        """`denoise-batch submit` in a process of its own."""
        program = "import sys; from denoise_batch import cli; sys.exit(cli.run(sys.argv[1:]))"
        return subprocess.Popen(
            [sys.executable, "-c", program, "submit", *map(str, arguments)],
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def _processes_of(head: int, folder: Path) -> set[int]:
    """The head's process, what it started, and what else names its folder: nothing of any other Ray's."""
    parents: dict[int, int] = {}
    found = {head}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if str(folder).encode() in (path / "cmdline").read_bytes():
                found.add(int(path.name))
        except OSError:
            continue
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A running head; ended whatever happens."""
    folder = Path("/tmp", f"denoise-{secrets.token_hex(4)}")  # sockets' names must be short
    folder.mkdir(mode=0o700)
    running = Head(folder)
    try:
        running.start()
        yield running
    finally:
        running.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def client(head: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Head:
    """This process, let in by the head, in an empty folder."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", head.environment["RAY_AUTH_TOKEN_PATH"])
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.url)
    monkeypatch.chdir(tmp_path)
    return head


def _committed(out: Path) -> int:
    """Receipts on disk."""
    ledger = work_folder(out) / "ledger"
    return sum(path.read_bytes().count(b'["receipt",') for path in ledger.glob("*.jsonl")) if ledger.is_dir() else 0


def _until_committed(out: Path, job: subprocess.Popen[str] | None = None) -> None:
    """Waits for one more unit of the run at `out` than there are."""
    deadline, before = time.monotonic() + 80, _committed(out)
    while _committed(out) <= before:
        assert time.monotonic() < deadline
        assert job is None or job.poll() is None, job.stderr and job.stderr.read()
        time.sleep(0.05)


def test_what_was_stopped_and_lost_its_head_goes_on_and_refusals_are_told(
    client: Head,
    tmp_path: Path,
    digits: Any,
    write_images: WriteImages,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for index in range(8):  # 3,600 rows a file, and a unit for each
        write_images(source / f"{index}.parquet", digits[0].repeat(12, axis=0))
    infer = ["infer", str(source), str(out), "--batch-size", "16", "--json"]

    # Stopped half-way: whoever follows it is told so by 143.
    job = client.submit("--", *infer)
    assert job.stderr is not None
    first = job.stderr.readline()
    (job_id,) = re.findall(r"^submit: (infer-[0-9a-f]{12}) on http", first)
    _until_committed(out, job)
    assert cli.run(["submit", "--status", job_id]) == 0
    assert capsys.readouterr().out == f"{job_id}: running\n"
    assert cli.run(["submit", "--stop", job_id]) == 0
    assert capsys.readouterr().out == f"{job_id}: stopped, exit code 143\n"
    shown, told = job.communicate(timeout=30)
    assert (job.returncode, shown) == (143, "")
    assert told.splitlines()[-2:] == [
        f"error: {job_id} was stopped",
        "hint: what is done is kept: submit the same command again to go on",
    ]
    assert not out.exists()

    # The same command goes on, until the head loses its power.
    assert cli.run(["submit", "--no-wait", "--", *infer]) == 0
    _until_committed(out)
    client.kill()
    assert not out.exists()
    resumable = _committed(out)
    client.start()
    capsys.readouterr()

    # On another head it finishes.
    assert cli.run(["submit", "--", *infer]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert 2 <= report["resumed_units"] <= resumable
    assert (report["rows_in"], report["rows_out"], report["units"]) == (28_800, 28_800, 8)
    assert "infer: " in shown.err
    assert "INFO" not in shown.err
    assert pq.read_table(out).drop_columns("denoised").equals(pq.read_table(source))
    assert cli.run(["inspect", str(out), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []

    # What the cluster refuses is refused here: exit 2, in the job's own words.
    assert cli.run(["submit", "--no-wait", "--", *infer, "--compression", "lz4"]) == 0
    refused = capsys.readouterr().out.strip()
    assert cli.run(["submit", "--follow", refused]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[-2] == f"error: {out} exists, it differs in compression ('zstd' then, 'lz4' now)"


@pytest.mark.usefixtures("client")
def test_the_head_lets_in_whoever_has_its_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["submit", "--status", "infer-0"]) == 2
    assert "has no job infer-0" in capsys.readouterr().err
    infer = ["submit", "--", "infer", "/in.parquet", "/out.parquet"]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    assert cli.run(infer) == 2
    assert "does not accept the token" in capsys.readouterr().err
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert cli.run(infer) == 2
    assert "wants a token" in capsys.readouterr().err
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{_free_ports(1)[0]}")
    assert cli.run(infer) == 2
    assert "no Ray dashboard at" in capsys.readouterr().err
