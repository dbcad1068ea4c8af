"""A job followed to its end: its progress shown, its result, its errors and its exit code taken for our own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import re
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from denoise_batch import job
from denoise_batch.console import PROGRAM, RESUMABLE
from denoise_batch.errors import DenoiseBatchError, Interrupted, JobFailed, NetworkError, Terminated
from denoise_batch.redaction import redact
from denoise_batch.submission.jobs import state

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from denoise_batch.progress import Progress
    from denoise_batch.submission.dashboard import Cluster
    from denoise_batch.submission.jobs import JobState

_POLL_SECONDS = 2.0
_LOST_SECONDS = 120.0
"""How long a cluster may be out of reach while a job is followed."""
_RECONNECT_SECONDS = 1.0
_LAST_WORDS_SECONDS = 10.0
_DONE_OF_ALL = re.compile(r"([\d,]+)(?: of |/)([\d,]+)")


@dataclass(slots=True)
class Transcript:
    """What a job has said until now, taken apart.

    Attributes:
        result: lines of its stdout.
        error, hint: of the error that it ended with.
        last: the last line that was neither, for a job that never came to speak.
    """

    on_progress: Callable[[str, float | None], None]
    on_note: Callable[[str], None]
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
        elif text.startswith("note: "):
            self.on_note(text)
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
    other = progress.note if verbose else lambda _: None
    transcript = Transcript(progress.update, progress.note, other, [])
    progress.note(f"submit: {job_id} on {redact(cluster.url)} (Ray {cluster.ray_version})")
    again = f"{PROGRAM} submit --address {redact(cluster.url)}"
    on = f"follow it with: {again} --follow {job_id}; stop it with: {again} --stop {job_id}"
    try:
        ended = _until_stopped(_follow(cluster, job_id, transcript))
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


def _until_stopped(work: Coroutine[Any, Any, JobState]) -> JobState:
    """Runs it. A signal cancels it: a handler that raises would do so in whatever task runs, where nobody looks.

    Raises:
        Terminated: SIGTERM came.
        KeyboardInterrupt: Ctrl-C came.
    """
    if threading.current_thread() is not threading.main_thread():
        return asyncio.run(work)
    came: list[signal.Signals] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    async def run() -> JobState:
        task = asyncio.current_task()
        assert task is not None

        def stop(number: signal.Signals) -> None:
            came.append(number)
            task.cancel()

        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                asyncio.get_running_loop().add_signal_handler(number, stop, number)
        return await work

    try:
        return asyncio.run(run())
    except asyncio.CancelledError as error:
        if came[:1] == [signal.SIGINT]:
            raise KeyboardInterrupt from error
        raise Terminated("stopped by SIGTERM", hint="") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


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
            found = await _state(cluster, job_id)
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


async def _state(cluster: Cluster, job_id: str) -> JobState:
    """How the job stands. Not `asyncio.to_thread`: a request without an answer would keep us from ending."""
    asked: concurrent.futures.Future[JobState] = concurrent.futures.Future()
    asked.set_running_or_notify_cancel()

    def ask() -> None:
        try:
            asked.set_result(state(cluster, job_id))
        except BaseException as error:
            asked.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return await asyncio.wrap_future(asked)


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
