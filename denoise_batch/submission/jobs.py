"""Jobs on a cluster: starting one with this very code, how it stands, and stopping it."""

from __future__ import annotations

import secrets
import shlex
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import denoise_batch
from denoise_batch.errors import FlagError, NetworkError, Terminated, first_line
from denoise_batch.storage.redaction import redact
from denoise_batch.submission.dashboard import HttpError, explained

if TYPE_CHECKING:
    from denoise_batch.console import ParsedCommand
    from denoise_batch.submission.dashboard import Cluster

_PACKAGE = Path(denoise_batch.__file__).parent
_JOB = "denoise_batch.submission.job"  # not imported: it imports the whole command line
_STOP_SECONDS = 60.0
_GRACE_SECONDS = "15"
"""Between SIGTERM and SIGKILL; Ray's default of 3 is short for a busy head. Nothing is lost by SIGKILL but the word."""
_KILLED = 128
"""Shells add the signal's number to it."""
_STOPPED_CODE = Terminated.exit_code


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


def new_id(command: ParsedCommand) -> str:
    """An id that says what the job is."""
    return f"{command.name}-{secrets.token_hex(6)}"


def submit(cluster: Cluster, command: ParsedCommand, job_id: str, runtime_env: dict[str, Any]) -> None:
    """Uploads the package, unless the cluster has this very one, and starts the command there.

    Raises:
        FlagError: the runtime environment is not one.
        NetworkError: the cluster does not take it.
    """
    import requests

    variables = {"RAY_JOB_STOP_WAIT_TIME_S": _GRACE_SECONDS, **runtime_env.get("env_vars", {})}
    with tempfile.TemporaryDirectory(prefix="denoise-batch-") as folder:
        # A copy: compiled files differ from run to run, and what differs is uploaded again.
        shutil.copytree(_PACKAGE, Path(folder, _PACKAGE.name), ignore=shutil.ignore_patterns("__pycache__"))
        with explained(cluster.url):
            try:
                cluster.client.submit_job(
                    # The job starts in the upload, so this module is found there before any that is installed.
                    entrypoint=shlex.join(["python", "-m", _JOB, *command.arguments]),
                    submission_id=job_id,
                    runtime_env={**runtime_env, "env_vars": variables, "working_dir": folder},
                    metadata={"denoise_batch": denoise_batch.__version__},
                )
            except requests.RequestException:  # some are ValueErrors, and none speaks of the runtime environment
                raise
            except (TypeError, ValueError) as error:
                hint = "see jobs/runtime_env.yaml for one"
                raise FlagError(f"--runtime-env: {first_line(error)}", hint=hint) from error


def state(cluster: Cluster, job_id: str) -> JobState:
    """How a job stands.

    Raises:
        FlagError: the cluster has no such job.
        NetworkError: the cluster does not answer.
    """
    with explained(cluster.url):
        try:
            found = cluster.client.get_job_info(job_id)
        except HttpError as error:
            if error.status != 404:
                raise
            raise FlagError(
                f"{redact(cluster.url)} has no job {job_id}", hint="the cluster's dashboard lists its jobs"
            ) from error
    status, message = str(getattr(found.status, "value", found.status)), found.message or ""
    return JobState(job_id, status, _exit_code(status, found.driver_exit_code), message)


def whole_log(cluster: Cluster, job_id: str) -> str:
    """What a job has written until now, in one piece.

    Raises:
        NetworkError: the cluster does not give it.
    """
    with explained(cluster.url):
        text: str = cluster.client.get_job_logs(job_id)
    return text


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
            with explained(cluster.url):
                cluster.client.stop_job(job_id)
            asked = True
        if time.monotonic() > deadline:
            raise NetworkError(f"{job_id} does not end", hint="look at the cluster's dashboard; its head may be busy")
        time.sleep(0.2)
