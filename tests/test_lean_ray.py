"""The command lines of a Ray for one run alone, and that a Ray of another make is left as it is."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from denoise_batch.cluster import lean_ray

if TYPE_CHECKING:
    from pathlib import Path


def node_command(folder: Path, resources: str = "CPU,4,memory,1000") -> list[str]:
    return [
        "raylet",
        f"--session_dir={folder}",
        "--node_id=0123",
        f"--static_resource_list={resources}",
        "--num_prestart_python_workers=4",
        "--dashboard_agent_command=python dashboard/agent.py --head",
        "--runtime_env_agent_command=python runtime_env/agent/main.py",
        "--head",
    ]


def test_sleeping_processes_stand_in_for_the_agents(tmp_path: Path) -> None:
    before = node_command(tmp_path)
    command = lean_ray._without_agents(before, 9)
    assert [word.partition("=")[0] for word in command] == [word.partition("=")[0] for word in before]
    options = dict(word.split("=", 1) for word in command if "=" in word)
    sleeping = f"{sys.executable} -I -S {tmp_path}/agent_stand_in.py"
    assert options["--dashboard_agent_command"] == options["--runtime_env_agent_command"] == sleeping
    assert options["--num_prestart_python_workers"] == "4"
    # The node waits for files with the agents' ports.
    assert len(list(tmp_path.iterdir())) == 1 + len(lean_ray._agent_ports()) == 5


def test_a_training_keeps_the_agent_that_makes_environments(tmp_path: Path) -> None:
    before = node_command(tmp_path)
    command = lean_ray._without_agents(before, 0)
    options = dict(word.split("=", 1) for word in command if "=" in word)
    assert "--runtime_env_agent_command=python runtime_env/agent/main.py" in command
    assert options["--dashboard_agent_command"].endswith("agent_stand_in.py")
    assert options["--num_prestart_python_workers"] == "0"  # none without an environment would be taken
    assert len(list(tmp_path.iterdir())) == 1 + 3


@pytest.mark.parametrize(
    ("resources", "workers", "started"),
    [("CPU,4", 1, 1), ("CPU,4", 3, 3), ("CPU,4,GPU,2", 9, 2), ("CPU,4,GPU,2", 1, 1)],
)
def test_no_more_workers_start_at_once_than_there_is_use_for(
    tmp_path: Path, resources: str, workers: int, started: int
) -> None:
    command = lean_ray._without_agents(node_command(tmp_path, resources), workers)
    assert f"--num_prestart_python_workers={started}" in command


def test_a_ray_that_is_made_otherwise_starts_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import node, services

    before = services.start_ray_process
    with lean_ray.only_what_is_used(1) as lean:
        assert lean
        assert services.start_ray_process is not before
    assert services.start_ray_process is before
    with monkeypatch.context() as patched, lean_ray.only_what_is_used(1) as lean:
        assert lean
        patched.setattr("ray.__version__", "2.61.0")
        with lean_ray.only_what_is_used(1) as again:
            assert not again
    monkeypatch.delattr(node.Node, "start_api_server")
    with lean_ray.only_what_is_used(1) as lean:
        assert not lean
        assert services.start_ray_process is before


@pytest.mark.parametrize(
    ("command", "rays"),
    [
        (["/site/ray/core/src/ray/gcs/gcs_server", "--log_dir=/x"], True),
        (["/home/ray/anaconda3/bin/python", "-u", "/site/ray/dashboard/agent.py"], True),
        (["python", "-I", "-S", "/tmp/ray/session_1/agent_stand_in.py"], True),
        (["ray::IDLE"], True),
        (["/home/ray/anaconda3/bin/python", "-m", "http.server"], False),
        (["/home/ray/anaconda3/bin/python", "/home/ray/site/ray/mine.py"], False),
        (["tail", "-f", "/tmp/ray/session_1/logs/raylet.out"], False),
    ],
)
def test_a_process_is_rays_by_its_program_or_script(
    command: list[str], rays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.__file__", "/site/ray/__init__.py")
    line = "\0".join([*command, ""]).encode()
    monkeypatch.setattr(lean_ray, "children", lambda: {7: line, 8: line})
    assert lean_ray._ray_children({8}) == ([7] if rays else [])


_NODE = """
import subprocess, sys
ends = "import os, time; node = os.getppid()\\nwhile os.getppid() == node: time.sleep(0.01)"
for name, code in (("ray::A", "import time; time.sleep(60)"), ("agent", ends)):
    print(subprocess.Popen([name, "-c", code], executable=sys.argv[1]).pid, end=" ")
print(flush=True)
sys.stdin.read()
"""
"""A node's process and its two: one has to be killed, one ends by itself with the node."""
_ORPHANS = """
import ctypes, subprocess, sys, time
from pathlib import Path
from denoise_batch.cluster import lean_ray

def adopts():
    flag = ctypes.c_int()
    ctypes.CDLL(None).prctl(37, ctypes.byref(flag), 0, 0, 0)
    return flag.value

def python(name, code):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([name, "-c", code, sys.executable], executable=sys.executable, text=True, **pipes)

sleep = "import time; time.sleep(60)"
mine = python("mine", sleep)
with lean_ray.orphans_adopted():
    inside = adopts()
    node = python("ray::node", open(sys.argv[1]).read())
    rays = {node.pid, *map(int, node.stdout.readline().split())}
    known = lean_ray.family({mine.pid})
    node.kill()
    node.wait()
    time.sleep(0.3)
    lean_ray.end_orphans({mine.pid}, known)
left = [process for process, parent, _ in lean_ray._processes() if process in rays]
print(known == rays, len(rays), left, mine.poll(), inside, adopts())
mine.kill()
"""


def test_orphans_are_ended_without_a_trace_and_no_more_adopted_afterwards(tmp_path: Path) -> None:
    node = tmp_path / "node.py"
    node.write_text(_NODE)
    command = [sys.executable, "-c", _ORPHANS, str(node)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert (done.stdout, done.stderr) == ("True 3 [] None 1 0\n", "")


def test_the_stand_in_for_an_actor_travels_to_workers() -> None:
    actor = pickle.loads(pickle.dumps(lean_ray._NobodyListens()))
    assert actor.update_actor_location.remote("actor", "node") is None
