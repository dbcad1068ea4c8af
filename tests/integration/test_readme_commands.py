"""The README's five commands, run as they stand there on small data, and then the demo."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from denoise_batch import cli

pytestmark = pytest.mark.usefixtures("ray_session")

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")

SMALLER = {"train": ["--epochs", "1", "--architecture", "seed", "--max-images", "600"], "evaluate": ["--limit", "100"]}
"""What keeps a command short; everything else is as in the README. The default network is in the demo."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_five_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```\n(denoise-batch inspect scans.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert cli.run(["digits", "clean.parquet", "--source", "synthetic", "--count", "1500"]) == 0
    assert cli.run(["digits", "others.parquet", "--source", "synthetic", "--count", "100", "--seed", "1"]) == 0
    assert cli.run(["corrupt", "clean.parquet", "scans.parquet"]) == 0
    for line in block.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "denoise-batch"
        assert cli.run([*arguments, *SMALLER.get(arguments[0], [])]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out
    noisy, denoised = pq.read_table("scans.parquet"), pq.read_table("denoised.parquet")
    assert denoised.column_names == [*noisy.column_names, "denoised"]
    assert denoised.drop_columns("denoised").equals(noisy)
    assert (here / "sheet.png").stat().st_size > 10_000
    assert cli.run(["inspect", "denoised.parquet", "--verify"]) == 0
    assert cli.run(["inspect", "denoise-model"]) == 0


def test_demo(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("denoise_batch.demo.TRAINING_IMAGES", 600)
    monkeypatch.setattr("denoise_batch.demo.EVALUATED", 100)
    arguments = ["demo", "--source", "synthetic", "--rows", "500", "--epochs", "1"]
    assert cli.run([*arguments, "--json"]) == 0, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in report["steps"]] == [
        "digits", "digits", "train", "corrupt", "infer", "evaluate", "preview",
    ]  # fmt: skip
    assert pq.read_metadata("demo/denoised.parquet").num_rows == 500
    text = (here / "demo" / "report.md").read_text(encoding="utf-8")
    for picture in re.findall(r"\]\((.*?\.png)\)", text):
        assert (here / "demo" / picture).stat().st_size > 5_000
    assert "of the clean images right" in text  # by their labels
    # The commands in the report are the program's own.
    for step in report["steps"]:
        assert step["command"] in text
    assert cli.run(arguments) == 2
    assert "earlier demo" in capsys.readouterr().err
