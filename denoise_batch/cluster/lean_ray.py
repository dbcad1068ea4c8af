"""A Ray that is started for one run of `infer` or `train` on this machine, without what such a run has no use for.

Ray as it comes starts nine processes of its own beside its workers. On two cores they take longer than a small run,
and each wakes up now and then while the workers compute. Needed are two of them: its service (GCS) and the node's
process (raylet). Left out here are

- the autoscaler's monitor, the dashboard's server and the log monitor: one machine, no dashboard, workers' output stays
  in its files;
- both agents of the node, one for metrics and one for runtime environments: nobody asks for either. The node does not
  live without agents, so two processes that sleep stand in for them;
- the actors of Ray Data that keep accounts for its dashboard, share a cluster out among its users, and know on which
  machine an actor is.

Workers of `infer` import what they will need as soon as they are started, while the driver still connects.

`train` keeps the agent for runtime environments, since Ray Train gives its processes such; no worker is started ahead,
as none without one would be taken. `training.one_machine` has what of Ray Train is left out besides.

`end_orphans` ends those processes of a Ray started here that Ray itself leaves behind.

All of this is beneath Ray's public interface, so it is done with the versions that it was tried with alone; any other
Ray starts as it comes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

SYSTEM_CONFIG: dict[str, Any] = {"enable_metrics_collection": False}
"""Settings of Ray's core that go with it."""
PRELOADING: dict[str, Any] = {"preload_python_modules": ["denoise_batch.inference.worker_imports"]}
"""The same, for `infer` alone."""

_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_KILLED_SECONDS = 3.0
_SCRIPT_WITHIN = 4
"""Words of a command line within which Ray names the program or the script, as in `python -I -S SCRIPT`."""
_TRIED = ("2.60.",)
"""How the names of the versions begin."""


def is_tried() -> bool:
    """Whether this Ray is one whose inside is known."""
    import ray

    return str(ray.__version__).startswith(_TRIED)


_STAND_IN = "/agent_stand_in.py"
"""How the path of an agent's stand-in ends."""
_AGENT_STAND_IN = """
import os, time
node = os.getppid()
while os.getppid() == node:
    time.sleep(1)
"""


@contextlib.contextmanager
def only_what_is_used(workers: int, *, show_logs: bool = False) -> Iterator[bool]:
    """While it lasts, `ray.init` starts a Ray without the processes named above.

    Args:
        workers: the most that there will be use for, without runtime environments; 0 where all have one.
        show_logs: the driver shows what workers print, which the log monitor brings.

    Yields:
        Whether it will: False where this Ray is not the one that is known.
    """
    from ray._private import node, ray_constants, services

    head = getattr(node, "Node", None)
    starts = [(head, name) for name in ("start_monitor", "start_log_monitor", "start_api_server")]
    if (
        not is_tried()
        or not all(hasattr(*place) for place in [*starts, (services, "start_ray_process")])
        or not _agent_ports()
    ):
        yield False
        return
    start_process = services.start_ray_process

    def start(command: list[str], process_type: str, *args: Any, **kwargs: Any) -> Any:
        if process_type == ray_constants.PROCESS_TYPE_RAYLET:
            command = _without_agents(command, workers)
        return start_process(command, process_type, *args, **kwargs)

    def no_dashboard(self: Any, **_: Any) -> None:
        self._webui_url = ""

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(head, "start_monitor", _nothing))
        stack.enter_context(replaced(head, "start_api_server", no_dashboard))
        if not show_logs:
            stack.enter_context(replaced(head, "start_log_monitor", _nothing))
        stack.enter_context(replaced(services, "start_ray_process", start))
        # Under `uv run` Ray would make each worker an environment like the driver's. Here they share it.
        stack.enter_context(replaced(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", False))
        yield True


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Puts something else in the place of a module's or a class's attribute, if it has one of this name."""
    missing = object()
    before = vars(owner).get(name, missing)  # not getattr, which unwraps static methods
    if before is missing:
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _agent_ports() -> list[str]:
    """The names of the ports that a node's agents tell it, each in a file; none where that is done otherwise."""
    from ray import _raylet

    names = ("METRICS_AGENT", "METRICS_EXPORT", "DASHBOARD_AGENT_LISTEN", "RUNTIME_ENV_AGENT")
    found = [getattr(_raylet, f"{name}_PORT_NAME", "") for name in names]
    return found if all(found) and hasattr(_raylet, "persist_port") else []


def _without_agents(command: list[str], workers: int) -> list[str]:
    """The node's command line, its agents replaced by processes that sleep; it is told their ports as by agents.

    Without workers (`only_what_is_used`) the agent for runtime environments stays.
    """
    import ray

    options = dict(word.split("=", 1) for word in command if "=" in word)
    *others, of_environments = _agent_ports()
    for number, name in enumerate([*others, of_environments] if workers else others, start=1):
        ray._raylet.persist_port(options["--session_dir"], options["--node_id"], name, number)
    stand_in = Path(options["--session_dir"] + _STAND_IN)
    stand_in.write_text(_AGENT_STAND_IN)
    sleeping = subprocess.list2cmdline([sys.executable, "-I", "-S", str(stand_in)])
    # Where there are GPUs a worker has one: more workers would load torch for nothing.
    resources = options["--static_resource_list"].split(",")
    numbers = dict(zip(resources[::2], map(float, resources[1::2]), strict=True))
    at_once = min(workers, int(options["--num_prestart_python_workers"]), int(numbers.get("GPU", 0)) or workers)
    instead = {"--dashboard_agent_command": sleeping, "--num_prestart_python_workers": str(at_once)}
    if workers:
        instead["--runtime_env_agent_command"] = sleeping
    names = [word.partition("=")[0] for word in command]
    return [f"{name}={instead[name]}" if name in instead else word for name, word in zip(names, command, strict=True)]


@contextlib.contextmanager
def orphans_adopted() -> Iterator[None]:
    """While it lasts, a descendant whose parent dies, as agents of Ray's do, becomes a child of this process, which can
    then end it."""
    before = ctypes.c_int()
    try:
        prctl = ctypes.CDLL(None).prctl
        prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    except (OSError, AttributeError):
        yield
        return
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def family(spared: set[int]) -> set[int]:
    """The children of this process that are Ray's, but for the spared, and what these have started."""
    parents = {process: parent for process, parent, _ in _processes()}
    found, more = set[int](), set(_ray_children(spared))
    while more:
        found |= more
        more = {process for process, parent in parents.items() if parent in found} - found
    return found


def end_orphans(spared: set[int], known: set[int]) -> None:
    """Kills the children of this process that are Ray's, but for the spared, and takes note of their ends.

    Args:
        known: processes of Ray's of which no zombies are to stay either: some end by themselves.
    """
    until, ended = time.monotonic() + _KILLED_SECONDS, set(known)
    while (left := _ray_children(spared)) and time.monotonic() < until:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        ended.update(left)
        time.sleep(0.05)
    while (ended := {process for process in ended if _has_yet_to_end(process)}) and time.monotonic() < until:
        time.sleep(0.05)


def _has_yet_to_end(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] == 0
    except ChildProcessError:  # it is another's, or is gone
        return False


def _ray_children(spared: set[int]) -> list[int]:
    """Those living children of this process that are Ray's, but for the spared."""
    import ray

    package = os.fsencode(Path(ray.__file__).parent) + b"/"

    def is_rays(command: bytes) -> bool:
        # Its programs, and its scripts behind the interpreter's flags. Python itself may be in a folder named ray.
        first = command.split(b"\0")[:_SCRIPT_WITHIN]
        named = any(word.startswith(package) or word.endswith(_STAND_IN.encode()) for word in first)
        return named or command.startswith(b"ray::")

    return [process for process, command in children().items() if process not in spared and is_rays(command)]


def children() -> dict[int, bytes]:
    """The command lines of this process's living children."""
    found = {}
    for process, parent, state in _processes():
        if parent == os.getpid() and state != "Z":
            with contextlib.suppress(OSError):
                found[process] = Path(f"/proc/{process}/cmdline").read_bytes()
    return found


def _processes() -> Iterator[tuple[int, int, str]]:
    """Each process, its parent and its state."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(") ")[2].split()[:2]
                yield int(entry.name), int(parent), state


class _Call:
    """Something that has `remote`, as a method of an actor does, and does nothing."""

    remote = staticmethod(_nothing)


class _NobodyListens:
    """Stands in for an actor whose answers nobody waits for."""

    def __getattr__(self, name: str) -> _Call:
        if name.startswith("__"):  # what pickle looks for
            raise AttributeError(name)
        return _Call()


class _WholeMachine:
    """Stands in for Ray Data's share of a cluster: this run is the only one, and has all of it."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        import ray

        self._nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}

    def request_resources(self, *_args: Any, **_kwargs: Any) -> None:
        """There is no autoscaler that could be asked."""

    def cancel_request(self) -> None:
        """Nothing was asked for."""

    def get_reserved_resources(self) -> dict[str, dict[str, float]]:
        return self._nodes


@contextlib.contextmanager
def data_of_one_machine() -> Iterator[None]:
    """While it lasts, Ray Data runs without actors of its own; Ray must be one that `only_what_is_used` started."""
    try:
        from ray.data._internal import stats
        from ray.data._internal.cluster_autoscaler import rate_based_cluster_autoscaler as autoscaler
        from ray.data._internal.execution.operators import actor_pool_map_operator as pool
    except ImportError:
        yield
        return
    with contextlib.ExitStack() as stack:
        for owner, name, instead in (
            (stats, "get_or_create_stats_actor", _NobodyListens),
            (getattr(stats, "_StatsManager", stats), "gen_dataset_id_from_stats_actor", lambda: uuid.uuid4().hex),
            (autoscaler, "DefaultAutoscalingCoordinator", _WholeMachine),
            (pool, "get_or_create_actor_location_tracker", _NobodyListens),
            (pool, "get_actor_locations", lambda _: {}),  # then it takes what each actor said when it was ready
        ):
            stack.enter_context(replaced(owner, name, instead))
        yield
