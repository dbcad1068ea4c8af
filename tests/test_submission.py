"""What `submit` refuses before anything is sent, and what it makes of a cluster's answers; the cluster is a fake."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import requests

from denoise_batch import cli, console
from denoise_batch.errors import DenoiseBatchError, FlagError, Interrupted, NetworkError, RequestError, Terminated
from denoise_batch.progress import Progress
from denoise_batch.submission import dashboard, following, job, jobs, request
from denoise_batch.submission.marks import LOG, RESULT, Marked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ROOT = Path(__file__).parent.parent
RAY = importlib.metadata.version("ray")
INFER = ["infer", "/shared/in.parquet", "/shared/out.parquet"]


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No address, no token, and an empty folder to be in."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def parse(*arguments: str) -> console.ParsedCommand:
    return console.parse_command(cli.app, arguments)


# --- the command ------------------------------------------------------------------------------------------------------


def test_every_path_of_every_command_is_found() -> None:
    found = parse("infer", "/a", "s3://b/c", "/out", "--model", "/m")
    assert [(path.name, path.value) for path in found.paths] == [
        ("IN", "/a"), ("IN", "s3://b/c"), ("OUT", "/out"), ("--model", "/m"),
    ]  # fmt: skip
    for command, names in {
        ("train", "--data", "/d", "--mnist", "/n"): ["--out", "--data", "--mnist"],
        ("evaluate", "--model", "/a", "--model", "/b", "--figures", "/f"): ["--model", "--model", "--figures"],
        ("digits", "/o"): ["OUT"],
        ("corrupt", "/i", "/o"): ["IN", "OUT"],
        ("preview", "/i", "/o.png"): ["PARQUET", "PNG"],
        ("inspect", "/i"): ["PATH"],
        ("demo",): ["--out"],
    }.items():
        assert [path.name for path in parse(*command).paths] == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infer", "in.parquet", "/out"], r"IN in\.parquet is a relative path"),
        (["infer", "/in", "out"], r"OUT out is a relative path"),
        (["infer", "/in", "/out", "--model", "m"], r"--model m is a relative path"),
        (["train", "--data", "/d"], r"--out denoise-model is a relative path"),
        (["demo"], r"--out demo is a relative path"),
        (["inspect", "bounds-unit"], r"PATH bounds-unit is a relative path"),
        (["infer", "/in", "/out", "--address", "head:6379"], r"--address belongs to submit"),
        (["infer", "s3://KEY:SECRET@bucket/in", "/out"], r"^s3://bucket/in: its user, password or query"),
        (["infer", "s3://bucket/in?session_token=SECRET", "/out"], r"its user, password or query"),
        (["submit", "--", "infer", "/in", "/out"], r"submit cannot be submitted"),
    ],
)
def test_a_command_that_the_cluster_cannot_run_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(FlagError, match=message) as caught:
        request.check_command(parse(*arguments))
    assert "SECRET" not in caught.value.message + caught.value.hint


def test_a_folder_that_is_here_is_no_model_that_ships(tmp_path: Path) -> None:
    (tmp_path / "seed").mkdir()
    with pytest.raises(FlagError, match="--model seed is a relative path"):
        request.check_command(parse("infer", "/in", "/out", "--model", "seed"))


def test_a_relative_path_that_is_here_is_named_in_full(tmp_path: Path) -> None:
    (tmp_path / "in.parquet").touch()
    with pytest.raises(FlagError) as caught:
        request.check_command(parse("infer", "in.parquet", "/out"))
    assert str(tmp_path / "in.parquet") in caught.value.hint


@pytest.mark.parametrize(
    "arguments",
    [
        INFER,
        ["infer", "s3://bucket/in?region=eu-west-1", "/out"],
        ["infer", "/in", "s3://bucket/out"],
        ["infer", "/in", "/out", "--model", "seed"],
        ["train", "--data", "/d", "--out", "/m", "--init", "bounds-unet"],
        ["train", "--out", "/shared/model"],
        ["inspect", "bounds-unet"],
    ],
)
def test_a_command_for_the_cluster_passes(arguments: list[str]) -> None:
    request.check_command(parse(*arguments))


def test_the_model_of_this_folder_is_not_passed_over_silently(tmp_path: Path) -> None:
    (tmp_path / "denoise-model").mkdir()
    with pytest.raises(FlagError, match="is the model here"):
        request.check_command(parse(*INFER))
    request.check_command(parse(*INFER, "--model", "/shared/model"))


def refused(*arguments: str) -> tuple[int, list[str], list[str]]:
    """Runs a command line in a process of its own: exit code, lines of stderr, heavy modules that were loaded."""
    program = (
        "import json, sys; from denoise_batch import cli; code = cli.run(sys.argv[1:])\n"
        "print(json.dumps([code, [name for name in ('ray', 'torch') if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    code, loaded = json.loads(done.stdout.splitlines()[-1])
    return code, done.stderr.splitlines(), loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit"], "submit takes one of"),
        (["submit", "--stop", "a", "--status", "b"], "submit takes one of"),
        (["submit", "--", "nope"], "no such command 'nope'"),
        (["submit", "--", "infer", "/in"], "missing argument"),
        (["submit", "--", *INFER], "no cluster is named"),
        (["submit", "--address", "127.0.0.1:9", "--", *INFER], "no Ray dashboard at http://127.0.0.1:9: nothing"),
        (["submit", "--address", "ray://head:10001", "--", *INFER], "is not the address of a dashboard"),
        (["submit", "--address", "auto", "--", *INFER], "--address auto does not name a cluster"),
        (["submit", "--runtime-env", "absent.yaml", "--", *INFER], "absent.yaml: No such file"),
    ],
)
def test_refusals_are_two_lines_and_load_no_ray(arguments: list[str], message: str) -> None:
    code, lines, loaded = refused(*arguments)
    assert (code, len(lines), loaded) == (2, 2, [])
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[1].startswith("hint: ")


def test_help_of_the_command_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["submit", "--", "infer", "--help"]) == 0
    assert "denoise-batch infer" in capsys.readouterr().out


# --- the address ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "urls"),
    [
        ("http://head:8265/", ["http://head:8265"]),
        ("https://ray.example.com", ["https://ray.example.com"]),
        ("head", ["http://head:8265"]),
        ("head:8265", ["http://head:8265"]),
        ("head:6379", ["http://head:6379", "http://head:8265"]),
    ],
)
def test_where_the_dashboard_may_be(address: str, urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert dashboard._urls(address) == urls
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert dashboard._urls(None) == urls
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:1")
    assert dashboard._urls(None) == ["http://other:1"]
    assert dashboard._urls(address) == urls, "--address is stronger than the variables"


class Dashboard(ThreadingHTTPServer):
    """A server that answers /api/version as a cluster with a token does, and keeps the tokens that it was sent."""

    def __init__(self, token: str | None = None, version: str = RAY, answer: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.answer = token, answer or json.dumps({"version": "4", "ray_version": version})
        self.seen: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        self.server.seen.append(given)
        status = 200
        if self.server.token is not None:
            status = 401 if given is None else 200 if given == f"Bearer {self.server.token}" else 403
        self.send_response(status)
        self.end_headers()
        self.wfile.write(self.server.answer.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def running(**options: Any) -> Iterator[Dashboard]:
    with Dashboard(**options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_cluster_without_a_token_is_never_sent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    with running() as server:
        assert dashboard._ask_version(server.url) == (RAY, {})
    assert server.seen == [None]


@pytest.mark.parametrize("mode", [None, "token"])
@pytest.mark.parametrize("place", ["variable", "named file", "home"])
def test_a_cluster_that_asks_is_sent_the_token(
    mode: str | None, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if place == "variable":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    else:
        file = tmp_path / ("token" if place == "named file" else "home/.ray/auth_token")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("secret\n")
        if place == "named file":
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    with running(token="secret") as server:
        assert dashboard._ask_version(server.url) == (RAY, {"Authorization": "Bearer secret"})
    assert server.seen == ([None] if mode is None else []) + ["Bearer secret"]


def test_a_wrong_or_missing_token_and_what_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(token="secret") as server:
        with pytest.raises(RequestError, match="wants a token, and there is none here"):
            dashboard._ask_version(server.url)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
        with pytest.raises(RequestError, match="does not accept the token") as caught:
            dashboard._ask_version(server.url)
        assert "another" not in str(caught.value)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        with pytest.raises(RequestError, match="wants a token"):
            dashboard._ask_version(server.url)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nonexistent/token")
    with running() as server, pytest.raises(FlagError, match="RAY_AUTH_TOKEN_PATH /nonexistent/token: No such"):
        dashboard._ask_version(server.url)
    monkeypatch.delenv("RAY_AUTH_MODE")
    with running(answer="<html>") as server, pytest.raises(NetworkError, match="not as a Ray dashboard does"):
        dashboard._ask_version(server.url)


def test_another_version_of_ray_is_refused_and_both_are_named() -> None:
    with running(version="2.1.0") as server, pytest.raises(RequestError, match=rf"runs Ray 2\.1\.0.* Ray {RAY}"):
        dashboard.reach(server.url)


def test_the_dashboard_beside_ray_s_own_port_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server:
        monkeypatch.setattr(dashboard, "PORT", server.server_port)
        monkeypatch.setattr(dashboard, "_client", lambda *_: "client")
        assert dashboard.reach("127.0.0.1:9") == dashboard.Cluster(server.url, RAY, "client")


# --- jobs -------------------------------------------------------------------------------------------------------------


class Client:
    """Ray's client, for one job.

    Args:
        log: pieces of the log; an exception among them breaks the connection there, once: TimeoutError, of which
            nobody learns, so that the log stands still; the others with a word.
        statuses: one an answer; the last one stays.

    Attributes:
        whole: what it gives for the whole log; None for the pieces together.
        refusal: what it raises where a job is submitted.
    """

    def __init__(self, log: list[str | Exception], statuses: list[str], code: int | None = None) -> None:
        self.log, self.statuses, self.code = log, statuses, code
        self.submitted: dict[str, Any] = {}
        self.files: set[str] = set()
        self.stopped = 0
        self.whole: str | Exception | None = None
        self.refusal: Exception | None = None

    def get_job_info(self, job_id: str) -> Any:
        status = self.statuses[0] if len(self.statuses) == 1 else self.statuses.pop(0)
        if status == "unknown":
            raise dashboard.HttpError(404, f"Job {job_id} does not exist")
        if status == "lost":
            raise ConnectionError("gone")
        return SimpleNamespace(status=SimpleNamespace(value=status), message="its\nmessage", driver_exit_code=self.code)

    async def tail_job_logs(self, _job_id: str) -> AsyncIterator[str]:
        for index, piece in enumerate(self.log):
            if isinstance(piece, Exception):
                del self.log[index]
                if isinstance(piece, TimeoutError):
                    await asyncio.sleep(60)
                raise piece
            yield piece

    def get_job_logs(self, _job_id: str) -> str:
        if isinstance(self.whole, Exception):
            raise self.whole
        return "".join(map(str, self.log)) if self.whole is None else self.whole

    def submit_job(self, **request: Any) -> None:
        if self.refusal is not None:
            raise self.refusal
        folder = Path(request["runtime_env"]["working_dir"])
        self.files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        self.submitted = request

    def stop_job(self, _job_id: str) -> bool:
        self.stopped += 1
        self.statuses = ["RUNNING", "STOPPED"]
        return True


def cluster(log: list[str | Exception], statuses: list[str], code: int | None = None) -> dashboard.Cluster:
    return dashboard.Cluster("http://head:8265", RAY, Client(log, statuses, code))


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(following, "_RECONNECT_SECONDS", 0.01)
    monkeypatch.setattr(following, "_LAST_WORDS_SECONDS", 0.5)


def follow(on: dashboard.Cluster, *, verbose: bool = False, job_id: str = "infer-1") -> tuple[list[str], list[str]]:
    """Result and stderr of a job that is followed."""
    shown = io.StringIO()
    with Progress(shown, clock=iter(range(0, 10**6, 100)).__next__) as progress:
        said = following.follow(on, job_id, progress, verbose=verbose)
    return said.result, shown.getvalue().splitlines()


def test_what_is_uploaded_and_started() -> None:
    on = cluster([], ["PENDING"])
    jobs.submit(on, parse("infer", "/in put", "/out"), "infer-1", {"env_vars": {"A": "b"}})
    request = on.client.submitted
    command = ["python", "-m", "denoise_batch.submission.job", "infer", "/in put", "/out"]
    assert shlex.split(request["entrypoint"]) == command
    assert request["submission_id"] == "infer-1"
    assert request["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "15", "A": "b"}
    wanted = {"submission/job.py", "pretrained/bounds-unet/model.safetensors", "pretrained/bounds-unet/model.json"}
    assert {f"denoise_batch/{name}" for name in wanted} <= on.client.files
    assert not [name for name in on.client.files if "__pycache__" in name or not name.startswith("denoise_batch/")]


@pytest.mark.parametrize(
    ("refusal", "kind", "message"),
    [
        (ValueError("Failed to validate pip"), FlagError, "--runtime-env: Failed to validate pip"),
        (requests.JSONDecodeError("Expecting value", "<html>", 0), NetworkError, "http://head:8265 failed: Expecting"),
        (requests.exceptions.InvalidURL("no host"), NetworkError, "http://head:8265 failed: no host"),
    ],
)
def test_a_cluster_s_answer_is_not_blamed_on_the_runtime_environment(
    refusal: Exception, kind: type[DenoiseBatchError], message: str
) -> None:
    on = cluster([], ["PENDING"])
    on.client.refusal = refusal
    with pytest.raises(kind, match=message):
        jobs.submit(on, parse(*INFER), "infer-1", {})


def test_result_and_progress_are_told_apart() -> None:
    log: list[str | Exception] = [
        "Running entrypoint for job infer-1: python …\n[log] infer: denois",
        "ing, 1,200 of 3,000 rows\n(raylet) chatter\n[result] /out: 3,000 rows\n",
        "[result] model /m\n[log] infer: publishing, 3,000 of 3,000 rows",
    ]
    result, shown = follow(cluster(list(log), ["PENDING", "RUNNING", "SUCCEEDED"], 0))
    assert result == ["/out: 3,000 rows", "model /m"]
    assert shown[0] == f"submit: infer-1 on http://head:8265 (Ray {RAY})"
    assert shown[-1] == "infer: publishing, 3,000 of 3,000 rows"
    assert "chatter" not in "".join(shown)
    _, shown = follow(cluster(list(log), ["SUCCEEDED"], 0), verbose=True)
    assert "(raylet) chatter" in shown


def test_notes_stay_and_are_no_progress() -> None:
    note = "note: 3 of 4,096 sampled rows of column 'clean' look dark-on-light, but are taken for light-on-dark"
    log: list[str | Exception] = [f"[log] {note}\n[log] train: epoch 1/40\n[result] /m: bounds-unet\n"]
    _, shown = follow(cluster(log, ["RUNNING", "SUCCEEDED"], 0))
    assert shown[1] == note
    assert shown[-1] == "train: epoch 1/40"


def test_a_connection_that_breaks_is_taken_up_where_it_was() -> None:
    log: list[str | Exception] = ["[result] one\n[res", RuntimeError("closed"), "ult] two\n", "[result] three\n"]
    result, _ = follow(cluster(log, ["RUNNING", "lost", "lost", "RUNNING", "RUNNING", "SUCCEEDED"], 0))
    assert result == ["one", "two", "three"]


LOST = [RuntimeError("closed"), TimeoutError()]
"""How a log's connection ends: with a word and without."""


@pytest.mark.parametrize("lost", LOST)
def test_a_log_that_is_lost_as_the_job_ends_is_read_again(lost: Exception) -> None:
    log: list[str | Exception] = ["[log] note: one\n[result] o", lost, "ne\n[result] two\n", "[result] three"]
    result, shown = follow(cluster(log, ["SUCCEEDED"], 0))
    assert result == ["one", "two", "three"]
    assert shown.count("note: one") == 1
    log = ["[log] infer: 1 of 2 rows\n", lost, "[log] error: no space left\n[log] hint: make room\n"]
    with pytest.raises(DenoiseBatchError, match="no space left") as caught:
        follow(cluster(log, ["FAILED"], 2))
    assert (caught.value.exit_code, caught.value.hint) == (2, "make room")


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize(
    ("status", "driver", "code", "whole", "message"),
    [
        ("SUCCEEDED", 0, 2, ConnectionError("gone"), r"succeeded, exit code 0; its log cannot be read: .* gone$"),
        ("FAILED", 137, 137, ConnectionError("gone"), r"failed, exit code 137 \(its\); its log cannot be read"),
        ("SUCCEEDED", 0, 2, "", r"its log cannot be read: the cluster no longer has all of it"),
        ("STOPPED", None, 143, ConnectionError("gone"), r"infer-1 was stopped"),
    ],
)
def test_a_log_that_cannot_be_read_again_is_not_passed_over(
    lost: Exception, status: str, driver: int | None, code: int, whole: str | Exception, message: str
) -> None:
    on = cluster(["[result] one\n", lost, "[result] two\n"], [status], driver)
    on.client.whole = whole
    with pytest.raises(DenoiseBatchError, match=message) as caught:
        follow(on)
    assert caught.value.exit_code == code
    assert "may go on" not in caught.value.message
    assert status == "STOPPED" or caught.value.hint.endswith("--address http://head:8265 --follow infer-1")


def test_a_log_that_does_not_come_when_read_again_is_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(following, "_WHOLE_LOG_SECONDS", 0.05)
    monkeypatch.setattr(Client, "get_job_logs", lambda *_: answered.wait(60) and "")
    with pytest.raises(NetworkError, match="cannot be read: no answer in time"):
        follow(cluster([RuntimeError("closed")], ["SUCCEEDED"], 0))
    answered.set()


def test_an_error_that_came_before_the_log_was_lost_is_the_job_s() -> None:
    on = cluster(["[log] error: no such file\n[log] hint: look\n", RuntimeError("closed")], ["FAILED"], 2)
    on.client.whole = ConnectionError("gone")
    with pytest.raises(DenoiseBatchError, match="no such file"):
        follow(on)


def test_a_log_that_stands_still_while_the_job_runs_is_taken_up_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_SILENT_SECONDS", 0.05)
    on = cluster(["[log] note: one\n[log] no", TimeoutError(), "te: two\n"], ["RUNNING"])
    shown: list[str] = []

    def note(text: str) -> None:
        shown.append(text)
        if text == "note: two":  # the job goes on until it has come
            on.client.statuses, on.client.code = ["SUCCEEDED"], 0

    following.follow(on, "infer-1", SimpleNamespace(note=note, update=lambda *_: None), verbose=False)  # type: ignore[arg-type]
    assert [text for text in shown if text.startswith("note: ")] == ["note: one", "note: two"]


def test_the_log_of_a_job_that_says_nothing_is_taken_up_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    on = cluster([], ["RUNNING"])
    polls, taken_up = 0, []
    how_it_stands = on.client.get_job_info

    def poll(job_id: str) -> Any:
        nonlocal polls
        polls += 1
        return how_it_stands(job_id)

    async def silent(_job_id: str) -> AsyncIterator[str]:
        taken_up.append(polls)
        if len(taken_up) == 4:
            on.client.statuses, on.client.code = ["SUCCEEDED"], 0
            return
        await asyncio.sleep(60)
        yield ""

    on.client.get_job_info, on.client.tail_job_logs = poll, silent
    monkeypatch.setattr(following, "time", SimpleNamespace(monotonic=lambda: polls))  # a second each
    monkeypatch.setattr(following, "_SILENT_SECONDS", 4)
    follow(on)
    assert taken_up == [0, 5, 5 + 9, 5 + 9 + 17]


def test_a_cluster_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_LOST_SECONDS", 0.05)
    with pytest.raises(NetworkError, match="infer-1 may go on") as caught:
        follow(cluster([], ["lost"]))
    assert "--follow infer-1" in caught.value.hint


@pytest.mark.parametrize(
    ("status", "driver", "log", "code", "message"),
    [
        ("FAILED", 2, "[log] error: no such file\n[log] hint: look\n", 2, "no such file"),
        ("FAILED", 1, "[log] error: 3 units failed\n[log] hint: again\n", 1, "3 units failed"),
        ("FAILED", 143, "[log] error: stopped by SIGTERM\n[log] hint: again\n", 143, "stopped"),
        ("FAILED", -9, "Killed\n", 137, "infer-1 failed: Killed"),
        ("FAILED", 127, "sh: python: not found\n", 127, "python: not found"),
        ("FAILED", None, "", 1, "infer-1 failed: message"),
        ("STOPPED", None, "[log] error: stopped by SIGTERM\n", 143, "infer-1 was stopped"),
    ],
)
def test_a_job_s_exit_code_and_words_are_ours(
    status: str, driver: int | None, log: str, code: int, message: str
) -> None:
    with pytest.raises(DenoiseBatchError, match=message) as caught:
        follow(cluster([log], [status], driver))
    assert caught.value.exit_code == code
    assert caught.value.hint


def test_a_stopped_job_says_whether_it_can_go_on() -> None:
    for job_id, words in (("infer-1", "to go on"), ("train-1", "to go on"), ("evaluate-1", "submit it again")):
        with pytest.raises(Terminated) as caught:
            follow(cluster([], ["STOPPED"]), job_id=job_id)
        assert words in caught.value.hint


def test_an_interruption_leaves_the_job_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    on = cluster([], ["RUNNING"])
    monkeypatch.setattr(following, "_follow", interrupt)
    monkeypatch.setattr(dashboard, "reach", lambda _: on)
    with pytest.raises(Interrupted, match="goes on"):
        follow(on)
    assert cli.run(["submit", "--follow", "infer-1"]) == 130
    shown = capsys.readouterr().err.splitlines()
    assert shown[-2] == "error: no longer followed; infer-1 goes on"
    assert shown[-1].endswith("stop it with: denoise-batch submit --address http://head:8265 --stop infer-1")
    assert on.client.stopped == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_following_and_not_the_job(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def silent(_client: object, _job_id: str) -> AsyncIterator[str]:
        os.kill(os.getpid(), number)
        await asyncio.sleep(60)
        yield ""

    on = cluster([], ["RUNNING"])
    monkeypatch.setattr(Client, "tail_job_logs", silent)
    monkeypatch.setattr(dashboard, "reach", lambda _: on)
    monkeypatch.setattr(following, "_POLL_SECONDS", 60.0)
    begun = time.monotonic()
    assert cli.run(["submit", "--follow", "infer-1"]) == code
    assert time.monotonic() - begun < 10
    assert "infer-1 goes on" in capsys.readouterr().err
    assert on.client.stopped == 0


def test_an_interruption_does_not_wait_for_a_dashboard_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def silent(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        answered.wait(60)
        raise ConnectionError

    async def nothing(*_: object) -> AsyncIterator[str]:
        await asyncio.sleep(60)
        yield ""

    monkeypatch.setattr(Client, "get_job_info", silent)
    monkeypatch.setattr(Client, "tail_job_logs", nothing)
    begun = time.monotonic()
    with pytest.raises(Interrupted, match="goes on"):
        follow(cluster([], ["RUNNING"]))
    assert time.monotonic() - begun < 30
    answered.set()


def test_state_and_stop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    on = cluster([], ["RUNNING"])
    monkeypatch.setattr(dashboard, "reach", lambda _: on)
    assert cli.run(["submit", "--status", "infer-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "submission_id": "infer-1", "status": "RUNNING", "exit_code": None,
    }  # fmt: skip
    assert cli.run(["submit", "--stop", "infer-1"]) == 0
    assert capsys.readouterr().out == "infer-1: stopped, exit code 143\n"
    assert cli.run(["submit", "--stop", "infer-1"]) == 0
    assert on.client.stopped == 1
    on.client.statuses = ["unknown"]
    assert cli.run(["submit", "--status", "infer-1"]) == 2
    assert "http://head:8265 has no job infer-1" in capsys.readouterr().err


def test_submit_prints_the_id_or_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on = cluster(["[result] done\n"], ["SUCCEEDED"], 0)
    monkeypatch.setattr(dashboard, "reach", lambda _: on)
    assert cli.run(["submit", "--no-wait", "--", *INFER]) == 0
    assert re.fullmatch(r"infer-[0-9a-f]{12}\n", capsys.readouterr().out)
    assert cli.run(["submit", "--json", *INFER, "--workers", "2"]) == 0
    assert capsys.readouterr().out == "done\n"
    assert shlex.split(on.client.submitted["entrypoint"])[3:] == ["infer", "--json", *INFER[1:], "--workers", "2"]
    assert cli.run(["submit", "--json", "--", "infer", "--", *INFER[1:]]) == 0
    sent = shlex.split(on.client.submitted["entrypoint"])[3:]
    assert sent == ["infer", "--json", "--", *INFER[1:]]
    assert [path.value for path in parse(*sent).paths] == INFER[1:]


# --- the runtime environment, and the job's side ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pip: [a", "runtime-env"),
        ("- a\n", "holds no settings"),
        ("env_vars: x\n", "holds no"),
        ("working_dir: /x\n", "sets working_dir"),
    ],
)
def test_runtime_environments_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "env.yaml").write_text(text)
    with pytest.raises(FlagError, match=message):
        request.read_runtime_env(tmp_path / "env.yaml")


def test_the_job_knows_every_package_that_the_project_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {re.split(r"[\[<>=~]", item)[0] for item in project["dependencies"]}
    imported = {"pillow": "PIL"}
    assert set(job.NEEDED) == {imported.get(name, name) for name in wanted}


def run_job(
    *arguments: str, marked: bool = True, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    program = f"import sys; from denoise_batch.submission import job; sys.exit(job.run(sys.argv[1:], marked={marked}))"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, env=env
    )


def test_a_job_marks_its_lines(tmp_path: Path) -> None:
    done = run_job("digits", str(tmp_path / "d.parquet"), "--source", "synthetic", "--count", "20")
    assert done.returncode == 0
    assert done.stdout.startswith(f"{RESULT}{tmp_path}/d.parquet: 20 digits")
    assert done.stderr.splitlines() == [f"{LOG}digits: 20 of 20 rows"]
    done = run_job("inspect", "/nonexistent")
    assert done.returncode == 2
    assert [line.startswith(LOG) for line in done.stderr.splitlines()] == [True, True]


def test_a_job_refuses_relative_paths_and_a_plain_run_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "absent does not exist" in run_job("inspect", "absent", marked=False).stderr
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    done = run_job("inspect", "absent", marked=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: PATH absent is a relative path")


def test_a_machine_without_the_packages_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "NEEDED", ("typer", "no_such_package"))
    assert job.run(["inspect", "/x"]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].endswith("lacks no_such_package")
    assert "jobs/runtime_env.yaml" in shown[1]
    monkeypatch.setattr(job, "_OLDEST_PYTHON", (9, 9))
    assert job.run(["inspect", "/x"]) == 2
    assert "the cluster runs Python" in capsys.readouterr().err


def test_help_comes_out_of_a_job_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Click writes bytes to a stream that is not the interpreter's own."""
    stream = Marked(sys.stdout, RESULT)
    assert stream.write(b"one\ntwo \xc3\xa9\n") == 10
    assert capsys.readouterr().out == f"{RESULT}one\n{RESULT}two é\n"


@pytest.mark.parametrize("arguments", [[], ["--version"], ["--help"]])
def test_what_is_no_command_has_no_paths(arguments: list[str]) -> None:
    assert parse(*arguments).paths == ()
