"""The command line: help without heavy imports, errors of two lines with the right exit code, results on stdout."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from denoise_batch import __version__, cli, errors
from denoise_batch.digits import FOLDER_VARIABLE, Source, Split
from denoise_batch.images import Polarity
from denoise_batch.images.layouts import NUMBERS, Layout
from denoise_batch.inference.denoise_unit import OnBadRow
from denoise_batch.inference.request import COMPRESSIONS
from denoise_batch.precision import Precision
from denoise_batch.training.recipes import RECIPES
from denoise_batch.training.recipes import Device as TrainDevice

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = ["demo", "digits", "corrupt", "train", "infer", "evaluate", "preview", "inspect", "submit"]
HEAVY = ["torch", "ray", "numpy", "pyarrow", "scipy", "matplotlib", "pandas"]

# Runs command lines one after another and says, as JSON, what each gave, what it took and which modules are loaded.
_PROBE = f"""
import contextlib, io, json, resource, sys
def seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
answers, before = [], 0.0
for arguments in json.load(sys.stdin):
    from denoise_batch import cli
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(arguments)
    took, before = seconds() - before, seconds()
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    answers.append([code, out.getvalue(), err.getvalue(), took, loaded])
print(json.dumps(answers))
"""


class Answer(NamedTuple):
    """What a command line gave; `seconds` are of processor time, since a busy machine stretches wall time."""

    code: int
    out: str
    err: str
    seconds: float
    loaded: list[str]


def probe(*command_lines: list[object]) -> list[Answer]:
    """Runs command lines in a process of their own; the first one's time has the start of Python in it."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        input=json.dumps([[str(argument) for argument in line] for line in command_lines]),
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "HOME": "/nonexistent", "XDG_CACHE_HOME": "/nonexistent"},
    )
    assert done.returncode == 0, done.stderr
    return [Answer(*answer) for answer in json.loads(done.stdout)]


def check_refusal(answer: Answer, message: str) -> None:
    """Asserts one line of error that has `message`, one of hint, exit 2, quickly, with neither torch nor Ray."""
    lines = answer.err.splitlines()
    assert len(lines) == 2, answer.err
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    assert re.match(r"hint: \S", lines[1])
    assert answer.code == 2
    assert answer.out == ""
    assert answer.seconds < 4.0  # of a core: one at most where nothing else runs; torch alone takes two more
    assert not {"torch", "ray"} & set(answer.loaded)


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def least_seconds() -> float:
    """Processor time that Python and the libraries of help alone take here, for machines differ."""
    imports = "import resource, rich.markup, rich.panel, rich.table, typer"
    used = "usage = resource.getrusage(resource.RUSAGE_SELF); print(usage.ru_utime + usage.ru_stime)"
    return max(float(subprocess.check_output([sys.executable, "-c", f"{imports}; {used}"])) for _ in range(3))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["infer", "--help"], ["train", "--help"]])
def test_help_is_light(arguments: list[str], least_seconds: float) -> None:
    (answer,) = probe(list(arguments))
    assert (answer.code, answer.err, answer.loaded) == (0, "", [])
    assert answer.out
    assert answer.seconds < 4.0 * least_seconds


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"denoise-batch {__version__}\n"


def test_help_lists_the_commands_and_each_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    listed = re.findall(r"^  ([a-z]+)  ", capsys.readouterr().out, re.MULTILINE)
    assert listed == COMMANDS
    for command in COMMANDS:
        assert cli.run([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert re.search(rf"Examples?:\n    denoise-batch {command}\b", text[text.index("Options:") :]), text
        assert all(line.strip() for line in text[text.rindex("Example") :].splitlines())


def test_choices_are_those_of_the_enums() -> None:
    import inspect as introspection

    hints = {
        command: introspection.get_annotations(getattr(getattr(cli, command), command), eval_str=True)
        for command in COMMANDS
    }

    def choices(command: str, parameter: str) -> set[str]:
        found: set[str] = set()

        def collect(hint: Any) -> None:
            for argument in get_args(hint):
                if isinstance(argument, str):
                    found.add(argument)
                else:
                    collect(argument)

        collect(get_args(hints[command][parameter])[0])
        return found

    assert choices("infer", "layout") == choices("digits", "layout") == {item.value for item in Layout}
    assert choices("infer", "dtype") == set(NUMBERS)
    assert choices("infer", "polarity") == choices("train", "polarity") == {item.value for item in Polarity}
    assert choices("infer", "on_bad_row") == {item.value for item in OnBadRow}
    assert choices("infer", "compression") == set(COMPRESSIONS)
    assert choices("infer", "precision") == {item.value for item in Precision}
    assert choices("infer", "device") == choices("train", "device") == {item.value for item in TrainDevice}
    assert choices("train", "recipe") == set(RECIPES)
    assert choices("digits", "source") == {item.value for item in Source}
    assert choices("digits", "split") == {item.value for item in Split}


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, digits: Any, write_images: Any, model_folder: Path) -> Path:
    """A folder with inputs, good and bad, and with models."""
    folder = tmp_path_factory.mktemp("files")
    images = digits[0]
    write_images(folder / "good.parquet", images)
    write_images(folder / "denoised.parquet", images, denoised=pa.nulls(300, pa.int8()))
    (folder / "text.parquet").write_text("not Parquet")
    pq.write_table(pa.table({"label": [1, 2]}), folder / "none.parquet")
    write_images(folder / "two.parquet", images, column="a", b=pa.array([i.tobytes() for i in images], pa.binary(784)))
    pq.write_table(pa.table({"image": pa.array([b"x" * 100], pa.binary(100))}), folder / "small.parquet")
    pq.write_table(pa.table({"image": ["text"]}), folder / "strings.parquet")
    pq.write_table(pa.table({"image": np.zeros((3, 784)).tolist(), "n": [1, 2, 3]}), folder / "floats.parquet")
    (folder / "exists.parquet").write_text("precious")
    shutil.copytree(model_folder, folder / "model")
    for damage in ("tampered", "cut", "unreadable", "weightless"):
        shutil.copytree(model_folder, folder / damage)
    weights = folder / "tampered" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (folder / "cut" / "model.safetensors").write_bytes(content[:1000])
    (folder / "unreadable" / "model.json").write_text("{")
    (folder / "weightless" / "model.safetensors").unlink()
    return folder


REFUSED: list[tuple[list[str], str]] = [
    (["infer", "absent.parquet", "OUT", "--model", "model"], r"absent\.parquet does not exist"),
    (["infer", "text.parquet", "OUT", "--model", "model"], r"text\.parquet"),
    (["infer", "none.parquet", "OUT", "--model", "model"], r"no column holds 28×28 images; the columns are: 'label'"),
    (["infer", "two.parquet", "OUT", "--model", "model"], r"more than one column fits: 'a' and 'b'"),
    (["infer", "small.parquet", "OUT", "--model", "model"], r"'image' holds 100 bytes a row"),
    (["infer", "strings.parquet", "OUT", "--model", "model"], r"'image' is of type string"),
    (["infer", "good.parquet", "OUT", "--model", "model", "--column", "nope"], r"'nope'"),
    (["infer", "denoised.parquet", "OUT", "--model", "model"], r"'denoised'"),
    (["infer", "good.parquet", "OUT", "--model", "model", "--output-column", "image"], r"'image'"),
    (["infer", "good.parquet", "OUT", "--model", "model", "--dtype", "float32"], r"--dtype float32"),
    (["infer", "good.parquet", "OUT", "--model", "model", "--workers", "0"], r"--workers 0"),
    (["infer", "good.parquet", "OUT", "--model", "model", "--max-bad", "7"], r"--max-bad 7"),
    (["infer", "good.parquet", "OUT", "--model", "model", "--batch-size", "0"], r"--batch-size 0"),
    (["infer", "good.parquet", "OUT", "--model", "model", "--polarity", "sideways"], r"'sideways' is not one of"),
    (["infer", "good.parquet", "OUT", "--model", "model", "--workers", "many"], r"--workers many is"),
    (["infer", "good.parquet", "OUT", "--model", "model", "--workers", "8:2"], r"--workers 8:2 is"),
    (["infer", "good.parquet", "OUT", "--model", "model", "--gpus-per-worker", "2"], r"--gpus-per-worker 2"),
    (["infer", "good.parquet", "exists.parquet", "--model", "model"], r"exists\.parquet exists"),
    (["infer", "good.parquet", "OUT", "--model", "absent"], r"absent"),
    (["infer", "good.parquet", "OUT", "--model", "tampered"], r"tampered"),
    (["infer", "good.parquet", "OUT", "--model", "cut"], r"cut"),
    (["infer", "good.parquet", "OUT", "--model", "unreadable"], r"unreadable"),
    (["infer", "good.parquet", "OUT", "--model", "weightless"], r"weightless"),
    (["corrupt", "good.parquet", "OUT", "--sigma", "2:1"], r"--sigma 2:1 is not a range"),
    (["corrupt", "good.parquet", "OUT", "--noise", "-1"], r"--noise"),
    (["corrupt", "good.parquet", "OUT", "--noise", "nan"], r"--noise nan"),
    (["corrupt", "good.parquet", "OUT", "--dtype", "float64"], r"'float64' is not one of"),
    (["corrupt", "absent.parquet", "OUT"], r"absent\.parquet does not exist"),
    (["digits", "OUT", "--source", "synthetic", "--count", "-3"], r"--count -3"),
    (["digits", "OUT", "--mnist", "absent"], r"absent"),
    (["train", "--data", "absent.parquet", "--out", "OUT"], r"absent\.parquet does not exist"),
    (["train", "--data", "good.parquet", "--epochs", "0", "--out", "OUT"], r"--epochs 0"),
    (["train", "--data", "good.parquet", "--sigma", "x", "--out", "OUT"], r"--sigma x"),
    (["train", "--data", "good.parquet", "--lr", "-1", "--out", "OUT"], r"--lr"),
    (["evaluate", "--model", "absent"], r"absent"),
    (["evaluate", "--card"], r"--card, but no --model"),
    (["evaluate", "--card", "--model", "seed"], r"--card: seed is what ships with us"),
    (["evaluate", "--model", "./seed"], r"model folder \./seed: no such file"),
    (["train", "--init", "bounds-unet/", "--out", "OUT"], r"model folder bounds-unet/: no such file"),
    (["evaluate", "--card", "--model", "model", "--noisy-column", "image"], r"--card and --noisy-column exclude"),
    (["train", "--init", "s3://bucket/model"], r"s3://bucket/model is not a local path"),
    (["evaluate", "--model", "model", "--noisy-column", "image"], r"--noisy-column image, but no --data"),
    (["evaluate", "--model", "model", "--column", "image"], r"--column image, but no --data"),
    (["evaluate", "--model", "model", "--polarity", "each"], r"--polarity each, but no --data"),
    (["evaluate", "--model", "model", "--digit", "3"], r"--digit 3, but no --figures"),
    (["evaluate", "--noisy-column", "x", "--digit", "3", "--figures", "OUT"], r"--digit 3, but --noisy-column"),
    (["evaluate", "--data", "good.parquet", "--noisy-column", "x", "--seed", "2019"], r"--seed 2019, but --noisy-col"),
    (["evaluate", "--model", "model", "--data", "good.parquet", "--mnist", "."], r"both --mnist and --data are given"),
    (["train", "--polarity", "each", "--out", "OUT"], r"--polarity each, but no --data"),
    (["evaluate", "--model", "model", "--figures", "good.parquet"], r"--figures .*good\.parquet is no folder"),
    (
        ["evaluate", "--model", "model", "--data", "good.parquet", "--limit", "1", "--figures", "good.parquet/figures"],
        r"good\.parquet/figures/metrics\.png cannot be written: .*good\.parquet is not a writable folder",
    ),
    (["evaluate", "--model", "model", "--data", "absent.parquet"], r"absent\.parquet does not exist"),
    (["preview", "absent.parquet", "OUT"], r"absent\.parquet does not exist"),
    (["preview", "good.parquet", "OUT", "--rows", "0"], r"--rows 0"),
    (["inspect", "absent"], r"absent does not exist"),
    (["demo", "--out", "good.parquet"], r"is no folder"),
    (["infer", "good.parquet"], r"missing argument: give IN and OUT"),
    (["infer", "good.parquet", "OUT", "--nope"], r"no such option: --nope"),
    (["nope"], r"no such command 'nope'"),
]
"""Command lines that cannot be met, in the folder `files`, and what their error says."""


@pytest.fixture(scope="module")
def answers(files: Path) -> list[Answer]:
    """What they give, one after another in one process, so that Python and pyarrow start once."""
    return probe(*(_placed(files, arguments) for arguments, _ in REFUSED))


def _placed(files: Path, arguments: list[str]) -> list[object]:
    names = {path.name for path in files.iterdir()} | {"absent", "absent.parquet", "OUT"}
    return [files / argument if argument.partition("/")[0] in names else argument for argument in arguments]


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_refusals(files: Path, answers: list[Answer], index: int) -> None:
    check_refusal(answers[index], REFUSED[index][1])
    assert not (files / "OUT").exists()
    assert (files / "exists.parquet").read_text() == "precious"
    assert not [path for path in files.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("index", [0, 1, 3, 15])
def test_refusals_from_a_cold_start(files: Path, index: int) -> None:
    arguments, message = REFUSED[index]
    (answer,) = probe(_placed(files, arguments))
    check_refusal(answer, message)


def test_figures_that_cannot_be_written_are_named_before_anything_is_evaluated(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    access = os.access
    closed = tmp_path / "closed"
    closed.mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    # Root may write everywhere, and tests may run as root.
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    for figures, message in (
        (closed, "closed/metrics.png cannot be written: "),
        (closed / "new", "closed/new/metrics.png cannot be written: "),
        (tmp_path / "link", "link is no folder"),
    ):
        arguments = ["evaluate", "--model", "seed", "--data", str(files / "good.parquet"), "--figures", str(figures)]
        assert cli.run(arguments) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert message in shown.err
        assert len(shown.err.splitlines()) == 2


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from denoise_batch.digits import mnist

    def unreachable(*_: object) -> Any:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(mnist, "_fetch", unreachable)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cli.run(["digits", str(tmp_path / "out.parquet")]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: no mirror gave MNIST")
    assert "--mnist" in hint
    assert "--source synthetic" in hint


def test_an_error_of_ours_is_two_lines_and_a_traceback_only_with_v(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["inspect", str(tmp_path / "absent")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert cli.run(["inspect", str(tmp_path / "absent"), "-v"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize(
    ("raised", "code", "lines"),
    [
        (ValueError("one\ntwo"), 1, ["error: unexpected ValueError: one", "hint: run the same command with -v"]),
        (KeyError(), 1, ["error: unexpected KeyError", "hint: run the same command with -v"]),
        (OSError(28, "No space left on device", "/x"), 1, ["error: /x: the disk is full", "hint: make room"]),
        (OSError(5, "Input/output error", "/x"), 1, ["error: /x: Input/output error", "hint: look at this file"]),
        (errors.JobFailed("bad\nrows", hint="look"), 1, ["error: bad rows", "hint: look"]),
        (KeyboardInterrupt(), 130, ["error: interrupted", "hint: no output was written"]),
        (errors.Terminated("stopped by SIGTERM", hint=""), 143, ["error: stopped by SIGTERM", "hint: no output"]),
        (BrokenPipeError(32, "Broken pipe"), 1, ["error: unexpected BrokenPipeError", "hint: run the same"]),
    ],
)
def test_exceptions_become_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    lines: list[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("denoise_batch.inspection.inspect", fail)
    assert cli.run(["inspect", "x"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    for line, expected in zip(shown.err.splitlines(), lines, strict=True):
        assert line.startswith(expected)


@pytest.mark.parametrize("command", [["infer", "in put.parquet", "out.parquet"], ["train", "--out", "m"]])
def test_an_interrupted_job_names_the_command_that_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise errors.Interrupted("interrupted", hint="")

    monkeypatch.setattr("denoise_batch.inference.infer.infer", interrupt)
    monkeypatch.setattr("denoise_batch.training.train.train", interrupt)
    assert cli.run(command) == 130
    hint = capsys.readouterr().err.splitlines()[-1]
    arguments = " ".join(f"'{word}'" if " " in word else word for word in command)
    assert hint == f"hint: what is done is kept; go on with: denoise-batch {arguments}"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(tmp_path: Path, number: signal.Signals, code: int) -> None:
    out = tmp_path / "drawn.parquet"
    program = "import sys; from denoise_batch import cli; sys.exit(cli.run(sys.argv[1:]))"
    arguments = ["digits", str(out), "--source", "synthetic", "--count", "50000000"]
    child = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".*/*")) and time.monotonic() < deadline:  # the file itself, not its folder alone
            time.sleep(0.05)
        child.send_signal(number)
        _, err = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == code
    assert err.splitlines()[-2].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_comes_in_a_destructor_is_not_lost(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def deaf_then_long(*_: object) -> None:
        deaf = Deaf()
        del deaf
        for _ in range(1000):
            time.sleep(0.01)

    monkeypatch.setattr("denoise_batch.digits.make_digits", deaf_then_long)
    before = signal.getsignal(number)
    begun = time.monotonic()
    assert cli.run(["digits", str(tmp_path / "drawn.parquet")]) == code
    assert time.monotonic() - begun < 5
    assert signal.getsignal(number) is before


def test_a_reader_that_goes_away(files: Path) -> None:
    program = "import sys; from denoise_batch import cli; sys.exit(cli.run(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", program, "inspect", str(files / "good.parquet")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 1


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash in which `$RUN` is the command line's program."""
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "RUN": f"{sys.executable} -P -m denoise_batch.cli", **variables},
    )


def test_help_that_nobody_reads_says_nothing() -> None:
    for command in ("", "train --help", "--version"):
        done = shell(f"(sleep 0.2; $RUN {command}; echo $? >&2) | true")
        assert done.stderr == "1\n", command


@pytest.mark.parametrize("closed", ["0<&-", ">&-", "2>&-", "0<&- >&- 2>&-"])
def test_a_closed_stream_takes_nothing_from_a_command(tmp_path: Path, closed: str) -> None:
    out = tmp_path / "drawn.parquet"
    done = shell(f"$RUN digits {out} --source synthetic --count 20 {closed}")
    assert done.returncode == 0
    assert done.stdout == ("" if ">&-" in closed.split() else f"{done.stdout.splitlines()[0]}\n")
    assert done.stderr == ("" if "2>&-" in closed else "digits: 20 of 20 rows\n")
    assert pq.read_table(out).num_rows == 20  # nothing was written into it that stdout or stderr would have had


def test_exit_codes_do_not_depend_on_closed_streams() -> None:
    assert shell("$RUN train --epochs 0 2>&-").returncode == 2
    assert shell("$RUN train --epochs 0 >&- 2>&-").returncode == 2
    done = shell("$RUN --version >&-")
    assert (done.returncode, done.stderr) == (0, "")


def test_children_get_the_null_device_for_a_stream_that_is_closed() -> None:
    program = (
        "import os, subprocess, sys; from denoise_batch import cli; code = cli.run(['--version']); "
        "subprocess.run(['bash', '-c', 'echo x && echo y >&2 && wc -c']).check_returncode(); sys.exit(code)"
    )
    done = shell(f'{sys.executable} -c "{program}" 0<&- >&- 2>&-')
    assert done.returncode == 0


def test_text_that_the_locale_lacks_is_shown_somehow() -> None:
    done = shell("$RUN", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"28\xd728" in done.stdout


def test_names_that_the_locale_c_lacks_are_shown_somehow(files: Path, tmp_path: Path) -> None:
    """Python takes another error handler for stdout there than elsewhere, one that writes no σ."""
    table = pq.read_table(files / "good.parquet").rename_columns(["σ"])
    pq.write_table(table, tmp_path / "sigma.parquet")
    done = shell(f"$RUN inspect {tmp_path}/sigma.parquet", LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"name: \u03c3" in done.stdout


@pytest.mark.parametrize("command", ["inspect x.parquet", "infer x.parquet y.parquet", "demo"])
def test_a_working_folder_that_was_deleted_is_named(tmp_path: Path, command: str) -> None:
    (tmp_path / "gone").mkdir()
    done = shell(f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && $RUN {command}")
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert error == "error: the working folder does not exist any more"
    assert "cd to" in hint


def test_help_needs_no_working_folder(tmp_path: Path) -> None:
    for command in ("", "--version", "infer --help"):
        (tmp_path / "gone").mkdir()
        done = shell(f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && $RUN {command}")
        assert (done.returncode, done.stderr) == (0, ""), command


@pytest.mark.parametrize("verbose", [False, True])
def test_what_matplotlib_says_of_its_cache_is_for_v(files: Path, tmp_path: Path, verbose: bool) -> None:
    (tmp_path / "file").touch()  # in which nobody can make a folder
    line = f"$RUN preview {files}/good.parquet {tmp_path}/sheet.png {'-v' if verbose else ''}"
    home = str(tmp_path / "file")
    done = shell(line, HOME=home, XDG_CACHE_HOME=home, XDG_CONFIG_HOME=home, MPLCONFIGDIR="")
    assert done.returncode == 0
    assert ("MPLCONFIGDIR" in done.stderr) is verbose
    assert done.stderr or not verbose
    assert verbose or done.stderr == ""


def test_an_empty_path_is_refused(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    lines: list[list[object]] = [
        ["train", "--data", "good.parquet", "--out", ""],
        ["train", "--data", "", "--out", "OUT"],
        ["infer", "", "OUT", "--model", "model"],
        ["infer", "good.parquet", "", "--model", "model"],
        ["evaluate", "--model", "model", "--data", ""],
        ["evaluate", "--model", "model", "--figures", ""],
        ["digits", "OUT", "--mnist", ""],
        ["corrupt", "", "OUT"],
        ["preview", "", "OUT"],
        ["inspect", ""],
    ]
    for answer in probe(*lines):
        check_refusal(answer, "a path is empty")
    assert not (files / "OUT").exists()


# --- results ----------------------------------------------------------------------------------------------------------


def test_digits_corrupt_inspect_preview(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean, noisy, sheet = tmp_path / "clean.parquet", tmp_path / "noisy.parquet", tmp_path / "sheet.png"

    def run(*arguments: object) -> Any:
        assert cli.run([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert run("digits", clean, "--source", "synthetic", "--count", 100)["rows"] == 100
    made = run("corrupt", clean, noisy, "--sigma", "0.5", "--noise", "0.2:0.8", "--seed", 7)
    assert (made["sigma"], made["half_range"], made["seed"]) == ([0.5, 0.5], [0.2, 0.8], 7)
    table = pq.read_table(noisy)
    assert set(table["sigma"].to_pylist()) == {0.5}
    assert run("inspect", noisy, "--verify")["problems"] == []
    assert run("preview", noisy, sheet, "--rows", 4)["picture"] == str(sheet)
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_results_go_to_stdout_and_progress_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clean.parquet"
    assert cli.run(["digits", str(out), "--source", "synthetic", "--count", "20"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{out}: 20 digits (train)")
    assert shown.err == "digits: 20 of 20 rows\n"


def test_names_of_files_break_no_lines(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copy(files / "good.parquet", tmp_path / "a\nrows: 5\t\r\x1b.parquet")
    assert cli.run(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == rf"{tmp_path}/a\nrows: 5\t\r\x1b.parquet: Parquet"
    assert lines[1] == "  files: 1"


def test_inspect_fails_where_it_sees_a_fault(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(files / "good.parquet", tmp_path / "good.parquet")
    (tmp_path / "truncated.parquet").write_bytes((files / "good.parquet").read_bytes()[:-9])
    assert cli.run(["inspect", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "truncated.parquet" in shown.out
    assert "1 problem found" in shown.err


def test_inspect_verify_fails_on_damage(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["corrupt", str(files / "good.parquet"), str(tmp_path / "noisy.parquet")]) == 0
    content = bytearray((tmp_path / "noisy.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "noisy.parquet").write_bytes(content)
    assert cli.run(["inspect", str(tmp_path / "noisy.parquet"), "--verify"]) == 1
    shown = capsys.readouterr()
    assert "problems:" in shown.out
    assert "error: " in shown.err
