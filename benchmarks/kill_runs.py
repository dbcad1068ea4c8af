"""Real runs of `infer` that can be killed, in parts or as a whole: the driver, its session, an actor, a node.

Run as a program it is what is killed: `kill_runs.py drive JSON` is a driver, `kill_runs.py nodes COUNT` a Ray cluster
of several nodes on this machine, which takes `kill PID` and `add` on stdin. Used by `kill_sweep.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_S = 240.0
_RAYS_OWN = tuple(
    f"ray::{name}".encode()
    for name in ("DashboardAgent", "RuntimeEnvAgent", "_StatsActor", "_AutoscalingCoordinatorActor", "ActorLocation")
)


def wait_for(what: Callable[[], Any], seconds: float, named: str, pause: float = 0.02) -> Any:
    """What `what` gives as soon as that is true; TimeoutError, naming it, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{named}: waited for {seconds:.0f} s")
        time.sleep(pause)
    return found


# --- processes --------------------------------------------------------------------------------------------------------


def session_of(process: int) -> int | None:
    """The session of a living process: everything that a driver starts shares its session."""
    try:
        return os.getsid(process)
    except ProcessLookupError:
        return None


def members(session: int) -> list[int]:
    """The living processes of a session, zombies left out."""
    return [pid for pid in _all_processes() if session_of(pid) == session and _status(pid)[:1] not in {"Z", "X", ""}]


def orphans(session: int) -> list[int]:
    """The members of a dead driver's session but for what is Ray's own and has no part in any run.

    Ray's two agents always take a minute: so long they try to tell Ray's dead service of their raylet's end. Ray Data's
    actors for its own accounts end within seconds nearly always, and now and then not within minutes.
    """
    return [pid for pid in members(session) if not _command(pid).startswith(_RAYS_OWN)]


def actors(session: int, kind: str = "MapWorker") -> list[int]:
    """Ray Data's actors in a session, or those of another class."""
    return [pid for pid in members(session) if _command(pid).startswith(f"ray::{kind}".encode())]


def parent(process: int) -> int:
    fields = _status(process).split()
    return int(fields[1]) if len(fields) > 1 else 0


def open_files(process: int, folder: Path) -> list[str]:
    """The files below a folder that a process holds open."""
    found = []
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                name = str(entry.readlink())
                if name.startswith(f"{folder}{os.sep}"):
                    found.append(name)
    return found


def kill(process: int, number: int = signal.SIGKILL) -> bool:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True


def kill_session(session: int) -> None:
    """Ends every process of a session, those that are being started included."""

    def gone() -> bool:
        left = members(session)
        for process in left:
            kill(process)
        return not left

    wait_for(gone, 30, f"session {session} does not die")


def _all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def name_of(process: int) -> str:
    return _command(process).replace(b"\0", b" ").decode(errors="replace")[:80].strip()


def _status(process: int) -> str:
    """State and parent, as /proc/PID/stat gives them behind the name, which may hold anything."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2]
    except OSError:
        return ""


# --- a driver ---------------------------------------------------------------------------------------------------------


class Driver:
    """One session of a run, in a process group and session of its own.

    Attributes:
        units: committed so far, as it says itself.
        phase: as in `InferProgress`; empty before the first word.
        steps: how many steps on the disk it took; known at its end.
    """

    def __init__(self, settings: dict[str, Any], log: Path, kill_at: int | None = None) -> None:
        self.units, self.phase, self.steps = 0, "", 0
        self.first_receipt: float | None = None
        self.begun = time.monotonic()
        request = json.dumps({"settings": settings, "kill_at": kill_at})
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "drive", request],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self.session = self.process.pid
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        before = None
        for line in self.process.stdout:
            told = json.loads(line)
            self.phase = told.get("phase", self.phase)
            self.units = told.get("units", self.units)
            self.steps = told.get("steps", 0)
            before = self.units if before is None else before
            if self.first_receipt is None and self.units > before:
                self.first_receipt = time.monotonic()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def until(self, what: Callable[[], Any], named: str, pause: float = 0.01) -> bool:
        """Waits until something is so; False where the driver ended before."""
        return wait_for(lambda: "ended" if not self.running else what() and "so", WAIT_S, named, pause) == "so"

    def finish(self) -> int:
        """Waits for the end. The exit code; negative where a signal ended it."""
        code = self.process.wait(WAIT_S)
        self._reader.join(10)
        return code

    def clean(self) -> None:
        """Ends all that is left of it."""
        if self.running:
            kill(self.process.pid)
        self.process.wait()
        kill_session(self.session)


def drive(request: str) -> int:
    from fault_steps import Steps

    from denoise_batch.errors import DenoiseBatchError
    from denoise_batch.inference.infer import InferProgress, InferSettings, OutputShape, infer

    fields = json.loads(request)
    settings = fields["settings"]
    steps = Steps(Path(settings["output"]).parent, fields["kill_at"])
    steps.watch()

    def tell(told: InferProgress) -> None:
        print(json.dumps({"phase": told.phase, "units": told.units}), flush=True)

    settings |= {"inputs": tuple(settings["inputs"]), "model": Path(settings["model"])}
    settings["shape"] = OutputShape(settings.get("shape", "auto"))
    try:
        infer(InferSettings(**settings), tell)
    except DenoiseBatchError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        return 2
    print(json.dumps({"steps": len(steps.names)}), flush=True)
    return 0


# --- a cluster of nodes -----------------------------------------------------------------------------------------------


class Nodes:
    """A Ray cluster whose nodes can be killed: a head and `count` others, one CPU each."""

    def __init__(self, count: int, log: Path) -> None:
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "nodes", str(count)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self.session = self.process.pid
        told = self._answer()
        self.address: str = told["address"]
        self.folder = Path(told["folder"])
        self.raylets: list[int] = told["raylets"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        timer = threading.Timer(WAIT_S, lambda: kill_session(self.session))
        timer.start()
        for line in self.process.stdout:
            if line.startswith("{"):  # Ray, too, prints
                timer.cancel()
                found: dict[str, Any] = json.loads(line)
                return found
        raise TimeoutError("the cluster of nodes does not answer")

    def tell(self, command: str) -> None:
        """`kill RAYLET` or `add`; on return it is done."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        self.raylets = self._answer()["raylets"]

    def victims(self, kind: str = "MapWorker") -> list[int]:
        """Raylets of nodes, the head left out, on which an actor lives."""
        return [raylet for raylet in {parent(pid) for pid in actors(self.session, kind)} if raylet in self.raylets]

    def clean(self) -> None:
        kill(self.process.pid)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        kill_session(self.session)


def serve_nodes(count: int) -> int:
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    nodes = {_raylet(node): node for node in [cluster.add_node(**size) for _ in range(count)]}
    folder = cluster.head_node.get_session_dir_path()
    print(json.dumps({"address": cluster.address, "folder": folder, "raylets": list(nodes)}), flush=True)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "kill":
            cluster.remove_node(nodes.pop(int(argument)), allow_graceful=False)
        else:
            node = cluster.add_node(**size)
            nodes[_raylet(node)] = node
        print(json.dumps({"raylets": list(nodes)}), flush=True)
    return 0


def _raylet(node: Any) -> int:
    found: int = node.all_processes["raylet"][0].process.pid
    return found


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("drive", "nodes"):
        sys.exit("usage: kill_runs.py drive JSON | nodes COUNT; other scripts start it, as kill_sweep.py does")
    sys.exit(drive(sys.argv[2]) if sys.argv[1] == "drive" else serve_nodes(int(sys.argv[2])))
