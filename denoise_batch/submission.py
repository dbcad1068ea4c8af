"""The same command on a Ray cluster, through Ray Jobs: submit, follow, look, stop.

    cluster = reach("http://localhost:8265")
    job = submit(cluster, command)
    ending = follow(cluster, job, on_line)

Everything that a request can be refused for without the cluster's files is found before anything is uploaded. The
package itself goes along, so that the cluster runs this very code; what it needs must be installed there.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoise_batch import __version__, job
from denoise_batch.bundle import DEFAULT_FOLDER
from denoise_batch.console import PROGRAM, RESUMABLE
from denoise_batch.errors import (
    DenoiseBatchError,
    FlagError,
    Interrupted,
    JobFailed,
    NetworkError,
    RequestError,
    Terminated,
)
from denoise_batch.redaction import has_secrets, redact

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    from denoise_batch.console import ParsedCommand
    from denoise_batch.progress import Progress

PORT = 8265
"""Ray's dashboard, which takes jobs, where an address names no port."""

_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_PACKAGE = Path(__file__).parent
_TIMEOUT_SECONDS = 10.0
_REQUEST_SECONDS = 60.0
_POLL_SECONDS = 2.0
_LOST_SECONDS = 120.0
"""How long a cluster may be out of reach while a job is followed."""
_RECONNECT_SECONDS = 1.0
_LAST_WORDS_SECONDS = 10.0
_STOP_SECONDS = 60.0
_GRACE_SECONDS = "15"
"""Between SIGTERM and SIGKILL; Ray's default of 3 is short for a busy head. Nothing is lost by SIGKILL but the word."""
_KILLED = 128
"""Shells add the signal's number to it."""
_STOPPED_CODE = Terminated.exit_code
_TALKATIVE = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
_DONE_OF_ALL = re.compile(r"([\d,]+)(?: of |/)([\d,]+)")


# --- before anything is sent ------------------------------------------------------------------------------------------


def check_command(command: ParsedCommand) -> None:
    """Refuses a command that cannot do on a cluster what it would do here.

    Raises:
        FlagError: it is `submit` itself, names a cluster, a relative path or a secret, or would take another model.
    """
    if command.name == "submit":
        raise FlagError("submit cannot be submitted", hint="name the command that the cluster should run")
    if command.address is not None:
        raise FlagError(
            "--address belongs to submit: the job uses the cluster that it runs on",
            hint=f"{PROGRAM} submit --address {redact(command.address)} -- {command.name} …",
        )
    job.check_paths(command)
    for argument in command.arguments:
        if has_secrets(argument):
            raise FlagError(
                f"{redact(argument)}: its user, password or query would stand in the cluster's list of jobs",
                hint="leave them out, and give the cluster's machines the right to read it (a role, or variables that "
                "the store's client reads)",
            )
    may_name_model = command.name in {"infer", "evaluate"}
    if may_name_model and not command.has("--model") and (DEFAULT_FOLDER.exists() or DEFAULT_FOLDER.is_symlink()):
        raise FlagError(
            f"./{DEFAULT_FOLDER} is the model here, but it is not on the cluster",
            hint="name a folder that the cluster's machines see with --model; for the model that ships with us, submit "
            "from another folder",
        )


def read_runtime_env(path: Path) -> dict[str, Any]:
    """A runtime environment from a YAML file: packages and variables that the cluster's machines are to have.

    Raises:
        FlagError: it cannot be read, or says where the code comes from, which is ours to say.
    """
    hint = "give a YAML file of a Ray runtime environment, such as jobs/runtime_env.yaml"
    try:
        path.read_text(encoding="utf-8")  # before Ray loads, which takes a while
        from ray.dashboard.modules.dashboard_sdk import parse_runtime_env_args

        # Ray's own reader, which is `yaml.safe_load`.
        content = parse_runtime_env_args(runtime_env=str(path))
    except OSError as error:
        raise FlagError(f"--runtime-env {path}: {error.strerror or error}", hint=hint) from error
    except Exception as error:  # whatever its parser raises for what is no YAML
        raise FlagError(f"--runtime-env {path} is no YAML: {' '.join(str(error).split())}", hint=hint) from error
    if not isinstance(content, dict) or not isinstance(content.get("env_vars", {}), dict):
        raise FlagError(f"--runtime-env {path} holds no settings", hint="see jobs/runtime_env.yaml for one")
    ours = sorted({"working_dir", "py_modules"} & content.keys())
    if ours:
        raise FlagError(f"--runtime-env {path} sets {ours[0]}", hint="leave it out: submit sends its own code")
    return content


def _urls(address: str | None) -> list[str]:
    """Where the cluster's dashboard may be, by what a person gave.

    Raises:
        FlagError: nothing was given, or nothing that leads to a dashboard.
    """
    name = next((name for name in _ADDRESS_VARIABLES if os.environ.get(name)), None)
    source = "--address" if address else name
    address = address or (os.environ[name] if name else None)
    hint = (
        f"give --address http://HEAD:{PORT}, or set {_ADDRESS_VARIABLES[0]}; `ray dashboard cluster.yaml` brings a "
        f"cluster's dashboard to http://localhost:{PORT}"
    )
    if not address:
        raise FlagError("no cluster is named", hint=hint)
    scheme, slashes, rest = address.rpartition("://")
    if slashes:
        if scheme not in {"http", "https"}:
            raise FlagError(f"{source} {redact(address)} is not the address of a dashboard", hint=hint)
        return [address.rstrip("/")]
    if rest in {"auto", "local"}:
        raise FlagError(f"{source} {rest} does not name a cluster", hint=hint)
    host, colon, port = rest.rpartition(":")
    if not colon or not port.isdigit():
        return [f"http://{rest}:{PORT}"]
    # RAY_ADDRESS has the port of Ray's own protocol; the dashboard is beside it.
    return [f"http://{rest}"] + ([f"http://{host}:{PORT}"] if int(port) != PORT else [])


def _token() -> str | None:
    """The token for clusters that want one, from where Ray itself takes it.

    Raises:
        FlagError: the file that is named for it cannot be read.
    """
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if token:
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path("~/.ray/auth_token").expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError) as error:
        if named:
            reason = getattr(error, "strerror", None) or "is no text"
            raise FlagError(
                f"RAY_AUTH_TOKEN_PATH {path}: {reason}", hint="name a file that holds the cluster's token"
            ) from error
        return None


# --- the cluster ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that answers, and lets us in.

    Attributes:
        url: its dashboard.
        ray_version: what it runs.
        client: Ray's `JobSubmissionClient`.
    """

    url: str
    ray_version: str
    client: Any


@dataclass(frozen=True, slots=True)
class JobState:
    """What the cluster says of a job.

    Attributes:
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        exit_code: the command's own; 143 where it was stopped; None while it goes on.
        message: Ray's word on it.
    """

    id: str
    status: str
    exit_code: int | None
    message: str

    @property
    def ended(self) -> bool:
        return self.exit_code is not None

    def to_json(self) -> dict[str, Any]:
        return {"submission_id": self.id, "status": self.status, "exit_code": self.exit_code}

    def line(self) -> str:
        code = f", exit code {self.exit_code}" if self.ended else ""
        return f"{self.id}: {self.status.lower()}{code}"


def reach(address: str | None) -> Cluster:
    """Finds the cluster's dashboard and makes sure that it lets us in and runs our version of Ray.

    Args:
        address: `http://HEAD:8265`; None takes RAY_API_SERVER_ADDRESS, else RAY_ADDRESS.

    Raises:
        FlagError: no address was given.
        NetworkError: nothing answers there, or not Ray.
        RequestError: it does not let us in, or runs another version of Ray.
    """
    urls = _urls(address)
    failure: NetworkError | None = None
    for url in urls:
        try:
            version, headers = _ask_version(url)
        except NetworkError as error:
            failure = failure or error
            continue
        ours = importlib.metadata.version("ray")
        if version != ours:
            raise RequestError(
                f"{redact(url)} runs Ray {version}, this installation has Ray {ours}: jobs need the same on both sides",
                hint=f"install ray=={version} here, or start the cluster with Ray {ours} (cluster.yaml pins it)",
            )
        return Cluster(url, version, _client(url, headers))
    assert failure is not None
    raise failure


def _ask_version(url: str) -> tuple[str, dict[str, str]]:
    """The cluster's version of Ray, and the headers that it wants.

    The token is sent where RAY_AUTH_MODE says so or the cluster asks for one, never unasked.
    """
    import requests

    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    token = _token() if mode == "token" else None
    for _ in range(2):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = requests.get(f"{url}/api/version", headers=headers, timeout=_TIMEOUT_SECONDS)
            status = answer.status_code
        except (requests.RequestException, ValueError) as error:
            reason = "no answer in time" if isinstance(error, requests.Timeout) else "nothing answers there"
            raise NetworkError(
                f"no Ray dashboard at {redact(url)}: {reason}",
                hint="check --address and that the cluster is up; a dashboard listens on its head's loopback alone "
                f"unless told otherwise: `ray dashboard cluster.yaml` brings it to http://localhost:{PORT}",
            ) from error
        if status == 401 and token is None and mode != "disabled":
            token = _token()
            if token is not None:
                continue
        break
    if status in {401, 403}:
        what = "wants a token, and there is none here" if token is None else "does not accept the token that is here"
        raise RequestError(
            f"{redact(url)} {what}",
            hint="put the cluster's token (on its head: ray get-auth-token) into ~/.ray/auth_token or RAY_AUTH_TOKEN, "
            "and leave RAY_AUTH_MODE unset or `token`",
        )
    try:
        version = answer.json()["ray_version"] if status == 200 else None
    except (ValueError, KeyError, TypeError):
        version = None
    if not isinstance(version, str):
        raise NetworkError(
            f"{redact(url)} answers, but not as a Ray dashboard does (HTTP {status})",
            hint=f"give the address of the cluster's dashboard, http://HEAD:{PORT}",
        )
    return version, headers


class _HttpError(Exception):
    """The dashboard refused a request."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text.strip().splitlines()[-1] if text.strip() else 'no reason given'}")
        self.status = status


def _client(url: str, headers: dict[str, str]) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Ray's client, which by itself would wait for ever and hide the status in a text."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": _REQUEST_SECONDS, **options})

        def _raise_error(self, response: Any) -> None:
            raise _HttpError(response.status_code, response.text)

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    # Ray lets its variables override the address that it is given.
    with _unset(_ADDRESS_VARIABLES), _explained(url):
        return Client(url, headers=headers)


@contextlib.contextmanager
def _unset(names: Sequence[str]) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """What Ray's client raises, as NetworkError."""
    import requests
    from ray.exceptions import RayError

    try:
        yield
    except (requests.RequestException, ConnectionError, RayError, _HttpError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise NetworkError(
            f"{redact(url)} failed: {reason[0]}", hint="look at the cluster's dashboard, then run the same again"
        ) from error


# --- jobs -------------------------------------------------------------------------------------------------------------


def new_id(command: ParsedCommand) -> str:
    """An id that says what the job is."""
    return f"{command.name}-{secrets.token_hex(6)}"


def submit(cluster: Cluster, command: ParsedCommand, job_id: str, runtime_env: dict[str, Any]) -> None:
    """Uploads the package, unless the cluster has this very one, and starts the command there.

    Raises:
        FlagError: the runtime environment is not one.
        NetworkError: the cluster does not take it.
    """
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": _GRACE_SECONDS, **runtime_env.get("env_vars", {})}
    with tempfile.TemporaryDirectory(prefix="denoise-batch-") as folder:
        # A copy: compiled files differ from run to run, and what differs is uploaded again.
        shutil.copytree(_PACKAGE, Path(folder, _PACKAGE.name), ignore=shutil.ignore_patterns("__pycache__"))
        with _explained(cluster.url):
            try:
                cluster.client.submit_job(
                    # The job starts in the upload, so this module is found there before any that is installed.
                    entrypoint=shlex.join(["python", "-m", job.__name__, *command.arguments]),
                    submission_id=job_id,
                    runtime_env={**runtime_env, "env_vars": variables, "working_dir": folder},
                    metadata={"denoise_batch": __version__},
                )
            except (TypeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise FlagError(f"--runtime-env: {reason}", hint="see jobs/runtime_env.yaml for one") from error


def state(cluster: Cluster, job_id: str) -> JobState:
    """How a job stands.

    Raises:
        FlagError: the cluster has no such job.
        NetworkError: the cluster does not answer.
    """
    with _explained(cluster.url):
        try:
            found = cluster.client.get_job_info(job_id)
        except _HttpError as error:
            if error.status != 404:
                raise
            raise FlagError(
                f"{redact(cluster.url)} has no job {job_id}", hint="the cluster's dashboard lists its jobs"
            ) from error
    status, message = str(getattr(found.status, "value", found.status)), found.message or ""
    return JobState(job_id, status, _exit_code(status, found.driver_exit_code), message)


def _exit_code(status: str, driver: int | None) -> int | None:
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return _STOPPED_CODE
    if status != "FAILED":
        return None
    # A process that a signal ended has a negative code here, 128 and more in a shell.
    return _KILLED - driver if driver is not None and driver < 0 else driver or 1


def stop(cluster: Cluster, job_id: str) -> JobState:
    """Stops a job (SIGTERM, and SIGKILL if it has not ended in time), and waits until it has ended.

    Raises:
        FlagError: the cluster has no such job.
        NetworkError: the cluster does not answer, or the job does not end.
    """
    deadline = time.monotonic() + _STOP_SECONDS
    asked = False
    while True:
        found = state(cluster, job_id)
        if found.ended:
            return found
        if not asked:
            with _explained(cluster.url):
                cluster.client.stop_job(job_id)
            asked = True
        if time.monotonic() > deadline:
            raise NetworkError(f"{job_id} does not end", hint="look at the cluster's dashboard; its head may be busy")
        time.sleep(0.2)


@dataclass(slots=True)
class Transcript:
    """What a job has said until now, taken apart.

    Attributes:
        result: lines of its stdout.
        error, hint: of the error that it ended with.
        last: the last line that was neither, for a job that never came to speak.
    """

    on_progress: Callable[[str, float | None], None]
    on_other: Callable[[str], None]
    result: list[str]
    error: str = ""
    hint: str = ""
    last: str = ""

    def take(self, line: str) -> None:
        """Takes the log's next line."""
        if line.startswith(job.RESULT):
            self.result.append(line.removeprefix(job.RESULT))
            return
        self.on_other(line)
        if not line.startswith(job.LOG):
            self.last = line or self.last
            return
        text = line.removeprefix(job.LOG)
        if text.startswith("error: "):
            self.error = text.removeprefix("error: ")
        elif text.startswith("hint: "):
            self.hint = text.removeprefix("hint: ")
        elif text.strip():
            self.on_progress(text, _share_done(text))


def _share_done(text: str) -> float | None:
    found = _DONE_OF_ALL.search(text)
    done, all_ = (int(part.replace(",", "") or 0) for part in found.groups()) if found else (0, 0)
    return done / all_ if all_ else None


def follow(cluster: Cluster, job_id: str, progress: Progress, *, verbose: bool) -> Transcript:
    """Shows a job's progress until it ends, and gives what it said.

    Args:
        verbose: show every line of its log, Ray's too.

    Raises:
        DenoiseBatchError: the job failed; with its own words and exit code.
        Terminated: it was stopped.
        Interrupted: we were; the job goes on.
        NetworkError: the cluster was out of reach for two minutes; the job may go on.
    """
    transcript = Transcript(progress.update, progress.note if verbose else lambda _: None, [])
    progress.note(f"submit: {job_id} on {redact(cluster.url)} (Ray {cluster.ray_version})")
    again = f"{PROGRAM} submit --address {redact(cluster.url)}"
    on = f"follow it with: {again} --follow {job_id}; stop it with: {again} --stop {job_id}"
    try:
        ended = _until_terminated(_follow(cluster, job_id, transcript))
    except (KeyboardInterrupt, Interrupted) as error:
        kind = Terminated if isinstance(error, Terminated) else Interrupted
        raise kind(f"no longer followed; {job_id} goes on", hint=on) from error
    except NetworkError as error:
        raise NetworkError(f"{error.message}; {job_id} may go on", hint=on) from error
    _check_ending(ended, transcript)
    return transcript


def _check_ending(ended: JobState, transcript: Transcript) -> None:
    """Raises what a job ended with."""
    if ended.exit_code == 0:
        return
    if ended.status == "STOPPED":
        kept = ended.id.rpartition("-")[0] in RESUMABLE
        hint = "what is done is kept: submit the same command again to go on" if kept else "submit it again"
        raise Terminated(f"{ended.id} was stopped", hint=hint)
    if transcript.error:
        error = DenoiseBatchError(transcript.error, hint=transcript.hint or "submit -v shows the whole log")
    else:
        reason = transcript.last or (ended.message.strip().splitlines() or ["no reason given"])[-1]
        error = JobFailed(f"{ended.id} failed: {reason}", hint="submit -v --follow shows the whole log of the job")
    error.exit_code = ended.exit_code or 1
    raise error


def _until_terminated(work: Coroutine[Any, Any, JobState]) -> JobState:
    """Runs it. SIGTERM cancels it: a handler that raises would do so in whatever task runs, where nobody looks.

    Raises:
        Terminated: SIGTERM came.
    """
    if threading.current_thread() is not threading.main_thread():
        return asyncio.run(work)

    async def run() -> JobState:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    before = signal.getsignal(signal.SIGTERM)
    try:
        return asyncio.run(run())
    except asyncio.CancelledError as error:
        raise Terminated("stopped by SIGTERM", hint="") from error
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


async def _follow(cluster: Cluster, job_id: str, transcript: Transcript) -> JobState:
    """Feeds a job's log to `transcript` until the job ends; takes the log up again where a connection broke."""
    lines = _Lines(transcript.take)
    tail: asyncio.Task[None] | None = None
    lost: float | None = None
    while True:
        if tail is None:
            lines.rewind()
            tail = asyncio.create_task(_tail(cluster.client, job_id, lines))
        await asyncio.wait({tail}, timeout=_POLL_SECONDS)
        try:
            found = await asyncio.to_thread(state, cluster, job_id)
            lost = None
        except NetworkError:
            lost = lost or time.monotonic()
            if time.monotonic() - lost > _LOST_SECONDS:
                tail.cancel()
                raise
            await asyncio.sleep(_POLL_SECONDS)
            if tail.done():
                tail = None
            continue
        if found.ended:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(tail, _LAST_WORDS_SECONDS)
            lines.close()
            return found
        if tail.done():
            tail.result()  # what is no broken connection is a fault of ours
            tail = None
            await asyncio.sleep(_RECONNECT_SECONDS)


async def _tail(client: Any, job_id: str, lines: _Lines) -> None:
    """The log as it comes, until it ends or the connection does."""
    import aiohttp

    # RuntimeError is what Ray's client makes of a connection that broke.
    with contextlib.suppress(RuntimeError, aiohttp.ClientError, OSError):
        async for text in client.tail_job_logs(job_id):
            lines.add(text)


class _Lines:
    """Whole lines out of pieces of a log. Read again from its beginning, it goes on where it was."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take, self._taken, self._seen, self._rest = take, 0, 0, ""

    def rewind(self) -> None:
        self._seen = 0

    def add(self, text: str) -> None:
        new = text[max(0, self._taken - self._seen) :]
        self._seen += len(text)
        self._taken = max(self._taken, self._seen)
        *whole, self._rest = (self._rest + new).split("\n")
        for line in whole:
            self._take(line)

    def close(self) -> None:
        if self._rest:
            self._take(self._rest)
        self._rest = ""
