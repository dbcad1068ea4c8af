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
from typing import TYPE_CHECKING, Any, TypeVar

from denoise_batch.console import PROGRAM, RESUMABLE
from denoise_batch.errors import DenoiseBatchError, Interrupted, JobFailed, NetworkError, Terminated
from denoise_batch.storage.redaction import redact
from denoise_batch.submission.jobs import state, whole_log
from denoise_batch.submission.marks import LOG, RESULT

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from denoise_batch.progress import Progress
    from denoise_batch.submission.dashboard import Cluster
    from denoise_batch.submission.jobs import JobState

_T = TypeVar("_T")

_POLL_SECONDS = 2.0
_LOST_SECONDS = 120.0
"""How long a cluster may be out of reach while a job is followed."""
_RECONNECT_SECONDS = 1.0
_SILENT_SECONDS = 60.0
"""A log that brings nothing for so long is taken up anew: its connection may have died without a word."""
_LAST_WORDS_SECONDS = 10.0
_WHOLE_LOG_SECONDS = 60.0
_DONE_OF_ALL = re.compile(r"([\d,]+)(?: of |/)([\d,]+)")


@dataclass(slots=True)
class Transcript:
    """What a job has said until now, taken apart.

    Attributes:
        result: lines of its stdout.
        error, hint: of the error that it ended with.
        last: the last line that was neither, for a job that never came to speak.
        unread: why the log is not known to its end; empty where it is.
    """

    on_progress: Callable[[str, float | None], None]
    on_note: Callable[[str], None]
    on_other: Callable[[str], None]
    result: list[str]
    error: str = ""
    hint: str = ""
    last: str = ""
    unread: str = ""

    def take(self, line: str) -> None:
        """Takes the log's next line."""
        if line.startswith(RESULT):
            self.result.append(line.removeprefix(RESULT))
            return
        self.on_other(line)
        if not line.startswith(LOG):
            self.last = line or self.last
            return
        text = line.removeprefix(LOG)
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
        NetworkError: the cluster was out of reach for two minutes; the job may go on. Or it has ended, and its log
            cannot be read; with the job's exit code where that is not 0.
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
    _check_ending(ended, transcript, f"read it again with: {again} --follow {job_id}")
    return transcript


def _check_ending(ended: JobState, transcript: Transcript, unread_hint: str) -> None:
    """Raises what a job ended with, or that it is not known."""
    if ended.exit_code == 0 and not transcript.unread:
        return
    if ended.status == "STOPPED":
        kept = ended.id.rpartition("-")[0] in RESUMABLE
        hint = "what is done is kept: submit the same command again to go on" if kept else "submit it again"
        raise Terminated(f"{ended.id} was stopped", hint=hint)
    if transcript.error and ended.exit_code:
        error = DenoiseBatchError(transcript.error, hint=transcript.hint or "submit -v shows the whole log")
    elif transcript.unread:
        # Of Ray's word on a failure the first line is its own, such as that a machine is gone; more may be the log's.
        said = ended.message.strip().partition("\n")[0].partition(", last available logs")[0]
        why = f" ({said})" if ended.exit_code and said else ""
        error = NetworkError(f"{ended.line()}{why}; its log cannot be read: {transcript.unread}", hint=unread_hint)
    else:
        reason = transcript.last or (ended.message.strip().splitlines() or ["no reason given"])[-1]
        error = JobFailed(f"{ended.id} failed: {reason}", hint="submit -v --follow shows the whole log of the job")
    error.exit_code = ended.exit_code or error.exit_code
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
    tail: asyncio.Task[bool] | None = None
    lost: float | None = None
    known, patience = 0, _SILENT_SECONDS
    while True:
        if tail is None:
            lines.rewind()
            tail = asyncio.create_task(_tail(cluster.client, job_id, lines))
        await asyncio.wait({tail}, timeout=_POLL_SECONDS)
        try:
            found = await _in_thread(lambda: state(cluster, job_id))
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
            complete = False
            with contextlib.suppress(asyncio.TimeoutError):
                complete = await asyncio.wait_for(tail, _LAST_WORDS_SECONDS)
            if not complete:
                transcript.unread = await _read_again(cluster, job_id, lines)
            lines.close()
            return found
        if lines.taken > known:
            known, patience = lines.taken, _SILENT_SECONDS
        if tail.done():
            tail.result()  # what is no broken connection is a fault of ours
            tail = None
            await asyncio.sleep(_RECONNECT_SECONDS)
        elif found.status == "RUNNING" and time.monotonic() - lines.heard > patience:
            tail.cancel()
            await asyncio.wait({tail})
            # Longer each time: the cluster goes on serving a log that nobody reads until the log has a line more.
            tail, patience = None, 2 * patience


async def _read_again(cluster: Cluster, job_id: str, lines: _Lines) -> str:
    """Reads the log of a job that has ended in one piece; gives why it is not whole, "" where it is."""
    try:
        text = await asyncio.wait_for(_in_thread(lambda: whole_log(cluster, job_id)), _WHOLE_LOG_SECONDS)
    except TimeoutError:
        return "no answer in time"
    except NetworkError as error:
        return error.message
    lines.rewind()
    lines.add(text)
    return "" if len(text) >= lines.taken else "the cluster no longer has all of it"


async def _in_thread(ask: Callable[[], _T]) -> _T:
    """What the cluster answers. Not `asyncio.to_thread`: a request without an answer would keep us from ending."""
    asked: concurrent.futures.Future[_T] = concurrent.futures.Future()
    asked.set_running_or_notify_cancel()

    def run() -> None:
        try:
            asked.set_result(ask())
        except BaseException as error:
            asked.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(asked)


async def _tail(client: Any, job_id: str, lines: _Lines) -> bool:
    """The log as it comes, until it ends (True) or the connection does (False)."""
    import aiohttp

    # RuntimeError is what Ray's client makes of a connection that broke.
    with contextlib.suppress(RuntimeError, aiohttp.ClientError, OSError):
        async for text in client.tail_job_logs(job_id):
            lines.add(text)
        return True
    return False


class _Lines:
    """Whole lines out of pieces of a log. Read again from its beginning, it goes on where it was.

    Attributes:
        taken: characters of the log until now.
        heard: when the last piece came, or the log was taken up; of the monotonic clock, in seconds.
    """

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take, self.taken, self._seen, self._rest = take, 0, 0, ""
        self.heard = time.monotonic()

    def rewind(self) -> None:
        self._seen = 0
        self.heard = time.monotonic()

    def add(self, text: str) -> None:
        new = text[max(0, self.taken - self._seen) :]
        self._seen += len(text)
        self.taken = max(self.taken, self._seen)
        self.heard = time.monotonic()
        *whole, self._rest = (self._rest + new).split("\n")
        for line in whole:
            self._take(line)

    def close(self) -> None:
        if self._rest:
            self._take(self._rest)
        self._rest = ""
