"""Connects to Ray: a cluster where an address is given, else Ray in this machine's own processes.

with connect(address=None, cpus=None, verbose=False):
    ...
"""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from denoise_batch.cluster import lean_ray, quiet_ray
from denoise_batch.cluster.lost_ray import HOST_AND_PORT, dead_process, is_gone
from denoise_batch.errors import (
    DenoiseBatchError,
    JobFailed,
    RequestError,
    ResourceExhausted,
    Terminated,
    first_line,
    ran_out,
)
from denoise_batch.process.cores import cores_here
from denoise_batch.process.environment import environment, no_job, refuse_unsafe_switches
from denoise_batch.process.freed_memory import ONE_HEAP
from denoise_batch.process.interruption import Insistent
from denoise_batch.storage.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Iterator

# Ray's C++ core writes warnings to stderr by itself, one for each actor of Ray Data's.
_QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal"}
_RAY_OF_OUR_OWN = {
    # Where the driver is killed, its Ray's own service goes with it; processes left behind would wait a minute for it
    # to come back, as it may in a cluster.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    # As nice as the command itself. Ray's own 15 leaves workers a thirtieth of a core that another program wants.
    "RAY_worker_niceness": "0",
}

_REACHED_SECONDS = 10.0
_CHECK_ADDRESS = (
    "check --address and RAY_ADDRESS, that the cluster runs the same Ray version, and that this machine is part of it"
)
_FROM_ELSEWHERE = (
    "on a machine of the cluster give HEAD:6379; from elsewhere: denoise-batch submit --address http://HEAD:8265"
)
_FULL_BYTES = 1 << 20
CALLS_RAY = "calls-ray-"
"""How the names of our own threads begin that call Ray, and may do so still when their work is over."""
_SLEEPS_FOR_EVER = "Prefetcher"
"""A thread of Ray Data's that waits for blocks to fetch, of which `infer` asks for none."""
_THREAD_SECONDS, _KILLED_SECONDS = 1.0, 3.0


@contextlib.contextmanager
def connect(
    *,
    address: str | None = None,
    cpus: int | None = None,
    data_workers: int | None = None,
    training: bool = False,
    verbose: bool = False,
) -> Iterator[dict[str, Any]]:
    """Starts or joins Ray, quietly, and leaves it at the end. A Ray that already runs in this process is used.

    Args:
        address: a cluster's address; None takes RAY_ADDRESS, else starts Ray here.
        cpus: for a Ray that is started here, the CPUs it may use; None is all that this process may.
        data_workers: for a Ray that works on datasets of `infer` alone: there is work for so many workers. One that is
            started here goes without all that these do not use (`lean_ray`).
        training: the same, for a Ray that trains (and may work on datasets as well).
        verbose: let Ray's own log through.

    Yields:
        The cluster's resources, as `ray.cluster_resources()` gives them.

    Raises:
        RequestError: the cluster cannot be reached, or this process is a Ray Client's.
        ResourceExhausted, JobFailed: Ray does not start on this machine.
        Terminated: SIGTERM came.
    """
    refuse_unsafe_switches()
    with environment({} if verbose else _QUIET):
        import ray

        if ray.is_initialized():
            _refuse_client()
            yield ray.cluster_resources()
            return
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        with contextlib.ExitStack() as stack:
            if address == "local":
                stack.enter_context(environment(_RAY_OF_OUR_OWN))
                stack.enter_context(lean_ray.orphans_adopted())
            yield stack.enter_context(_joined(address, cpus, data_workers, training=training, verbose=verbose))


@contextlib.contextmanager
def _joined(
    address: str, cpus: int | None, data_workers: int | None, *, training: bool, verbose: bool
) -> Iterator[dict[str, Any]]:
    """`connect` where no Ray runs in this process, and an address is known."""
    import ray

    local = address == "local"
    if "://" in address:
        raise RequestError(
            f"Ray at {redact(address)} cannot be joined: this is the address of a dashboard, or of Ray's client server",
            hint=_FROM_ELSEWHERE,
        )
    quiet: dict[str, Any] = {} if verbose else {"logging_level": "ERROR", "log_to_driver": False}
    here: dict[str, Any] = {"num_cpus": cpus or cores_here(), "include_dashboard": False} if local else {}
    if local and full_ray_disk():
        raise _not_started(OSError())  # at once: Ray would wait half a minute for processes that cannot start
    if not local:
        _check_reachable(address)
    # What stands in the environment already may come from the job's own `runtime_env`, and Ray takes no name twice.
    workers_have = {} if data_workers is None or ONE_HEAP.keys() & os.environ.keys() else ONE_HEAP
    if workers_have and not local:
        here["runtime_env"] = {"env_vars": workers_have}
    # A hook of the user's may give workers an environment of their own, which one of the agents left out would make.
    lean = local and (training or data_workers is not None) and "RAY_RUNTIME_ENV_HOOK" not in os.environ
    before = signal.getsignal(signal.SIGTERM)  # ray.init puts one of its own there, and leaves it
    spared = set(lean_ray.children()) if local else None
    try:
        with (
            quiet_ray.muted(not verbose),
            quiet_ray.no_secrets_in_job(),
            quiet_ray.private_token(),
            contextlib.ExitStack() as stack,
        ):
            stack.enter_context(environment(workers_have))  # what is started here hands it on
            if local:
                stack.enter_context(no_job())
            if lean:
                lean = stack.enter_context(
                    lean_ray.only_what_is_used(0 if training else data_workers or 1, show_logs=verbose)
                )
            if lean:
                here["_system_config"] = lean_ray.SYSTEM_CONFIG | ({} if training else lean_ray.PRELOADING)
            ray.init(address=address, **quiet, **here)
    except (KeyboardInterrupt, DenoiseBatchError):
        _shut_down(spared)
        raise
    except SystemExit as error:  # what ray.init makes of a SIGTERM that comes while it runs
        _shut_down(spared)
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
        raise Terminated("stopped by SIGTERM", hint="run the same command again to go on from here") from error
    except Exception as error:  # Ray raises the plainest of them for a process that does not start
        _shut_down(spared)
        if local:
            raise _not_started(error) from error
        raise RequestError(f"Ray at {address} cannot be used: {first_line(error)}", hint=_CHECK_ADDRESS) from error
    try:
        with (
            quiet_ray.messages_off_stdout(verbose),
            _terminated_by_sigterm(before),
            quiet_ray.log_that_cannot_be_written(verbose),
            lean_ray.data_of_one_machine() if lean else contextlib.nullcontext(),
        ):
            yield ray.cluster_resources()
    finally:
        _shut_down(spared)


def _refuse_client() -> None:
    """Raises RequestError where this process reaches its Ray through Ray Client, which knows nothing of nodes."""
    from ray.util.client import ray as client

    if client.is_connected():
        raise RequestError(
            "this process is connected to Ray by Ray Client (ray://…), through which neither infer nor train can work",
            hint=f"call ray.shutdown() first; {_FROM_ELSEWHERE}",
        )


def _check_reachable(address: str) -> None:
    """Tries the address for some seconds: Ray would for a quarter of an hour, without a word.

    Raises:
        RequestError: nothing listens there, or no node of Ray's runs on this machine.
    """
    found = HOST_AND_PORT.fullmatch(address)
    if found is None:
        return  # Ray knows what it means, or says at once that it does not
    host, port = found["host"].strip("[]"), int(found["port"])
    until, error = time.monotonic() + _REACHED_SECONDS, OSError()
    hosts = [host]
    if host in {"localhost", "127.0.0.1"}:  # Ray takes that for this machine's own address, where alone it may listen
        from ray.util import get_node_ip_address

        hosts.append(get_node_ip_address())
    while True:
        for name in hosts:
            try:
                socket.create_connection((name, port), timeout=3.0).close()
            except (OSError, OverflowError) as failed:
                error = failed if isinstance(failed, OSError) else OSError(str(failed))
            else:
                _check_node_here(address)
                return
        if time.monotonic() > until:
            raise RequestError(
                f"Ray at {redact(address)} cannot be reached: {error.strerror or error}", hint=_CHECK_ADDRESS
            ) from error
        time.sleep(0.5)


def _check_node_here(address: str) -> None:
    """A driver works through a node of its own machine. Ray tells one by its process, and waits a minute for it.

    Raises:
        RequestError: there is no such process, of any cluster.
    """
    from ray._private import services

    if not lean_ray.is_tried() or not hasattr(services, "find_node_ids"):
        return
    until = time.monotonic() + _REACHED_SECONDS
    while not services.find_node_ids():
        if time.monotonic() > until:
            raise RequestError(
                f"Ray at {redact(address)} cannot be joined from this machine, on which no node of Ray's runs",
                hint=_FROM_ELSEWHERE,
            )
        time.sleep(0.5)


def full_ray_disk() -> str | None:
    """Ray's folder on this machine, where its disk is full: none of Ray's processes starts without its log."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    folder = Path(node.get_session_dir_path()) if node is not None else _ray_folder()
    while not folder.exists():
        folder = folder.parent
    return str(folder) if shutil.disk_usage(folder).free < _FULL_BYTES else None


def _ray_folder() -> Path:
    """Where a Ray that is started here keeps its logs and sockets."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")


def ray_disk_is_full(folder: str) -> ResourceExhausted:
    return ResourceExhausted(
        f"{folder}: the disk that Ray keeps its logs on is full",
        hint="make room there, or name a folder on another disk in RAY_TMPDIR; then run the same command again to go "
        "on",
    )


def _not_started(error: Exception) -> DenoiseBatchError:
    """Why Ray does not start on this machine, as far as can be told."""
    folder = full_ray_disk()
    if folder is not None:
        return ray_disk_is_full(folder)
    if isinstance(error, OSError):
        name = error.filename or _ray_folder()
        return ran_out(error, name) or JobFailed(
            f"Ray cannot be started here: {name}: {error.strerror or error}",
            hint="name a folder that can be written in RAY_TMPDIR, then run again",
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Its object store is a file of gigabytes, and a process that goes beyond the limit is killed.
    if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
        return ResourceExhausted(
            f"Ray cannot be started here, where the size of files is limited (ulimit -f): {lines[0]}",
            hint="run again in a shell without that limit",
        )
    return JobFailed(
        f"Ray cannot be started here: {lines[0]}",
        hint=f"look at Ray's logs in {_ray_folder()}/session_latest/logs, and at the limits that ulimit -a shows",
    )


def leave(code: int) -> NoReturn:
    """Ends this process as `sys.exit` does, past Ray's core.

    Where Ray's start was interrupted its core may crash when Python takes it apart, and the exit code would be that of
    the crash.
    """
    if "ray" in sys.modules:
        atexit._run_exitfuncs()  # Ray's own among them, which ends its processes
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _shut_down(spared: set[int] | None) -> None:
    """Leaves Ray, and ends the processes of one of our own, whatever signal comes a second time: else some would stay.

    Args:
        spared: the children that this process had before it started a Ray; None where that is a cluster's. Of the
            others those are ended as well that Ray does not know of, being half started, or does not wait for: a worker
            that has loaded torch takes longer to end than the rest.
    """
    import ray

    with _deaf():
        known = lean_ray.family(spared) if spared is not None else set()
        if is_gone():
            atexit.unregister(ray.shutdown)  # which would wait for it, and end this process before the error is shown
        elif _callers_ended(own=spared is not None):
            ray.shutdown()
        # Else Ray does so when Python ends: what happened has been said by then.
        if spared is not None:
            lean_ray.end_orphans(spared, known)


def _callers_ended(*, own: bool) -> bool:
    """Lets threads end that call Ray: one that does so after its shutdown ends this process, code 1, without a word.

    Args:
        own: Ray was started here, and nobody else uses it.
    """
    import ray

    threads = [thread for thread in threading.enumerate() if _may_call_ray(thread)]
    for thread in threads:
        thread.join(_THREAD_SECONDS)
    if any(thread.is_alive() for thread in threads) and dead_process() is None:
        # It waits for an actor of Ray Data's own, which cannot start where every worker dies; a cluster's is for all.
        with contextlib.suppress(Exception):
            if own:
                ray.kill(ray.get_actor("ActorLocationTracker", namespace="ActorLocationTracker"))
        until = time.monotonic() + _KILLED_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _may_call_ray(thread: threading.Thread) -> bool:
    """Whether it is one of ours that does, or one of Ray Data's, of which some have a class and some a function."""
    if thread.name.startswith(CALLS_RAY):
        return True
    target = getattr(thread, "_target", None)  # gone, like all that a thread was given, once it has ended
    from_data = any(str(getattr(made, "__module__", "")).startswith("ray.data.") for made in (type(thread), target))
    return from_data and thread.name != _SLEEPS_FOR_EVER


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C and SIGTERM do nothing meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextlib.contextmanager
def _terminated_by_sigterm(before: Any) -> Iterator[None]:
    """SIGTERM raises Terminated in the main thread. `ray.init` installs a handler of its own: this comes after it.

    Args:
        before: the handler to leave behind.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # Ray's calls look for signals while they wait, but let no other exception through than this one.
    terminate = Insistent(KeyboardInterrupt)
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not terminate.came:
            raise
        # Whatever Ray made of the interruption.
        raise Terminated("stopped by SIGTERM", hint="run the same command again to go on from here") from error
    finally:
        terminate.close()
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
