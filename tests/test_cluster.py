"""How Ray is started, and why it does not start here, as far as it can be told without starting it."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import ray

from denoise_batch import cluster
from denoise_batch.cluster import capacity
from denoise_batch.errors import DenoiseBatchError, JobFailed, RequestError, ResourceExhausted
from denoise_batch.inference import worker_watch
from denoise_batch.inference.pool_size import PoolSize

if TYPE_CHECKING:
    from collections.abc import Iterator

StartChild: TypeAlias = Callable[[str], "subprocess.Popen[bytes]"]


@pytest.fixture
def child() -> Iterator[StartChild]:
    """Starts a child that sleeps, and calls itself as it is told."""
    children: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> subprocess.Popen[bytes]:
        children.append(subprocess.Popen([name, "-c", "import time; time.sleep(60)"], executable=sys.executable))
        return children[-1]

    yield start
    for process in children:
        process.kill()
        process.wait()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Ray would keep its logs."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def test_a_full_disk_is_named_before_ray_waits_for_its_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    with pytest.raises(ResourceExhausted) as caught, cluster.connect():
        pass
    assert caught.value.message == f"{folder}: the disk that Ray keeps its logs on is full"
    assert "RAY_TMPDIR" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/x"), ResourceExhausted, "/x: the file system is read-only"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ResourceExhausted, "/ray: the disk quota is used up"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), JobFailed, "/x: Permission denied"),
        (Exception("The node timed out.\nMore."), JobFailed, "Ray cannot be started here: The node timed out."),
        (Exception(), JobFailed, "Ray cannot be started here: Exception"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_keeps_ray_from_starting_is_named(error: Exception, kind: type[Exception], words: str) -> None:
    found = cluster._not_started(error)
    assert type(found) is kind
    assert words in found.message
    assert found.hint


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
@pytest.mark.parametrize("before", ["", "2"])
def test_workers_have_one_heap_unless_their_job_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, address: str | None, before: str
) -> None:
    """Ray refuses a driver that names what the job's own `runtime_env` names."""
    given: list[tuple[Any, str | None]] = []

    def init(**named: Any) -> None:
        given.append((named.get("runtime_env"), os.environ.get("MALLOC_ARENA_MAX")))
        raise RuntimeError("enough")

    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    if before:
        monkeypatch.setenv("MALLOC_ARENA_MAX", before)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(cluster, "_check_reachable", lambda _: None)
    with pytest.raises(DenoiseBatchError, match="enough"), cluster.connect(address=address, data_workers=1):
        pass
    handed = {"env_vars": {"MALLOC_ARENA_MAX": "1"}} if address and not before else None
    assert given == [(handed, before or "1")]  # what is started here hands its own environment on
    assert os.environ.get("MALLOC_ARENA_MAX", "") == before


def test_an_address_where_nothing_listens_is_refused_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_REACHED_SECONDS", 1.0)
    monkeypatch.setattr("ray._private.services.find_node_ids", lambda: {"ab"})
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        cluster._check_reachable(f"127.0.0.1:{port}")
        cluster._check_reachable(f"localhost:{port}")
    begun = time.monotonic()
    with pytest.raises(RequestError, match=rf"Ray at 127\.0\.0\.1:{port} cannot be reached: Connection refused"):
        cluster._check_reachable(f"127.0.0.1:{port}")
    assert time.monotonic() - begun < 10
    for address in ("auto", "nonsense"):
        cluster._check_reachable(address)  # Ray says what is wrong with it


def test_a_machine_without_a_node_of_rays_is_refused_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray waits a minute for one, and then says that it cannot connect."""
    monkeypatch.setattr(cluster, "_REACHED_SECONDS", 0.0)
    monkeypatch.setattr("ray._private.services.find_node_ids", set)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(RequestError, match="on which no node of Ray's runs") as caught:
            cluster._check_reachable(f"127.0.0.1:{port}")
    assert "denoise-batch submit" in caught.value.hint


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "https://head"])
@pytest.mark.parametrize("named", [True, False])
def test_an_address_that_no_driver_can_use_is_refused_before_ray_is_asked(
    monkeypatch: pytest.MonkeyPatch, address: str, named: bool
) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was asked"))
    if not named:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(RequestError, match=f"^Ray at {address} cannot be joined: ") as caught,
        cluster.connect(address=address if named else None),
    ):
        pass
    assert "HEAD:6379" in caught.value.hint
    assert "denoise-batch submit" in caught.value.hint


def test_a_process_that_is_a_ray_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util.client import ray as client

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", dict)
    with cluster.connect() as resources:
        assert resources == {}
    monkeypatch.setattr(client, "is_connected", lambda: True)
    with pytest.raises(RequestError, match="Ray Client") as caught, cluster.connect():
        pass
    assert "denoise-batch submit" in caught.value.hint


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_process_that_used_ray_is_as_it_was_before(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    names = ("RAY_gcs_rpc_server_reconnect_timeout_s", "RAY_worker_niceness", "RAY_BACKEND_LOG_LEVEL")
    given: list[Any] = []
    for name in names:
        monkeypatch.delenv(name, raising=False)

    def adopts() -> int:
        flag = ctypes.c_int()
        ctypes.CDLL(None).prctl(37, ctypes.byref(flag), 0, 0, 0)
        return flag.value

    def init(**_: Any) -> None:
        given.extend([*map(os.environ.get, names), adopts()])
        raise RuntimeError("enough")

    before = adopts()
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(cluster, "_check_reachable", lambda _: None)
    with pytest.raises(DenoiseBatchError, match="enough"), cluster.connect(address=address):
        pass
    assert given == ([None, None, "fatal", before] if address else ["5", "0", "fatal", 1])
    assert not set(names) & os.environ.keys()
    assert adopts() == before


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_ray_of_our_own_makes_no_environment_of_a_clusters_job(
    monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    given: list[str | None] = []

    def init(**_: Any) -> None:
        given.append(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))
        raise RuntimeError("enough")

    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(cluster, "_check_reachable", lambda _: None)
    with pytest.raises(DenoiseBatchError, match="enough"), cluster.connect(address=address, data_workers=1):
        pass
    assert given == ["{}" if address else None]
    assert os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"] == "{}"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_only_processes_of_a_ray_of_our_own_are_ended(
    monkeypatch: pytest.MonkeyPatch, address: str | None, child: StartChild
) -> None:
    """Nor is anything that a cluster's drivers share."""
    raylet = f"{Path(ray.__file__).parent}/core/src/ray/raylet/raylet"
    before, started = child(raylet), []
    killed = []

    def init(**_: Any) -> None:
        started.extend([child(raylet), child("/home/ray/anaconda3/bin/python")])
        raise KeyboardInterrupt

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("ray.get_actor", lambda name, **_: name)
    monkeypatch.setattr("ray.kill", killed.append)
    monkeypatch.setattr(cluster, "_check_reachable", lambda _: None)
    monkeypatch.setattr(cluster, "_THREAD_SECONDS", 0.05)
    monkeypatch.setattr(cluster, "_KILLED_SECONDS", 0.05)
    answer = threading.Event()
    thread = threading.Thread(target=answer.wait, args=(10,), name=f"{cluster.CALLS_RAY}test", daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt), cluster.connect(address=address):
        pass
    answer.set()
    ended = [process.poll() is not None for process in (before, *started)]
    assert ended == [False, address is None, False]
    assert killed == ([] if address else ["ActorLocationTracker"])


@pytest.mark.usefixtures("folder")
def test_a_limit_on_the_size_of_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))
    assert "ulimit -f" in cluster._not_started(Exception("timed out")).message


def test_a_process_with_ray_ends_with_its_own_code_whatever_its_core_does() -> None:
    script = (
        "import atexit, sys, os, types; from denoise_batch import cluster\n"
        "sys.modules['ray'] = types.ModuleType('ray')\n"
        "class Crash:\n"
        "    def __del__(self): os.kill(os.getpid(), 11)\n"
        "kept = Crash(); atexit.register(print, 'ended Ray'); print('result')\n"
        "cluster.leave(130)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "result\nended Ray\n")


def test_ray_is_not_shut_down_while_the_watch_may_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end this process, code 1, before the error is shown."""
    asked, answer = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        asked.set()
        answer.wait(10)

    monkeypatch.setattr(capacity, "waiting_for", lambda *_: None)
    monkeypatch.setattr(worker_watch, "_WATCH_SECONDS", 0.01)
    monkeypatch.setattr(worker_watch, "full_ray_disk", slow)
    monkeypatch.setattr(worker_watch, "_FULL_DISK_SECONDS", 0.0)
    monkeypatch.setattr(cluster, "_THREAD_SECONDS", 0.05)
    monkeypatch.setattr(cluster, "_KILLED_SECONDS", 0.05)
    monkeypatch.setattr(cluster, "dead_process", lambda: "raylet")  # nothing of it is asked
    with worker_watch.Watch(None, PoolSize(1, 1, 1, 1, 0.9, 0.0)):
        assert asked.wait(10)
    assert not cluster._callers_ended(own=True)
    answer.set()
    until = time.monotonic() + 10
    while not cluster._callers_ended(own=True):
        assert time.monotonic() < until


@pytest.mark.parametrize(("name", "waited_for"), [("iter_threaded", True), ("Prefetcher", False)])
def test_ray_is_not_shut_down_while_a_thread_of_ray_data_may_call_it(
    monkeypatch: pytest.MonkeyPatch, name: str, waited_for: bool
) -> None:
    """Ray Data leaves the thread that takes answers behind where nobody takes them any more."""
    answer = threading.Event()

    def take() -> None:
        answer.wait(10)

    take.__module__ = "ray.data._internal.block_batching.util"
    monkeypatch.setattr(cluster, "_THREAD_SECONDS", 0.05)
    monkeypatch.setattr(cluster, "_KILLED_SECONDS", 0.05)
    monkeypatch.setattr(cluster, "dead_process", lambda: "raylet")  # nothing of it is asked
    thread = threading.Thread(target=take, name=name, daemon=True)
    thread.start()
    assert cluster._callers_ended(own=True) is not waited_for
    answer.set()
    thread.join(10)
    assert cluster._callers_ended(own=True)
