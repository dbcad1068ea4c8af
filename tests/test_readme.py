"""The README says what is so: its commands parse, its make targets exist, its module map is the package."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import typer

import denoise_batch
from denoise_batch import cli

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = Path(denoise_batch.__file__).parent


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The arguments of the `denoise-batch` command lines in code blocks."""
    lines = [line for block in code_blocks(text) for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("denoise-batch ")]


def parse(arguments: list[str]) -> None:
    """Parses a command line as the program would, without running it."""
    top = typer.main.get_command(cli.app)
    with top.make_context("denoise-batch", list(arguments)) as context:
        name, command, rest = top.resolve_command(context, list(arguments))  # type: ignore[attr-defined]
        assert command is not None
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("arguments", commands(README), ids=" ".join)
def test_commands_parse(arguments: list[str]) -> None:
    parse(arguments)


def test_commands_are_found() -> None:
    assert [words[0] for words in commands(README)[:5]] == ["inspect", "train", "evaluate", "infer", "preview"]
    with pytest.raises(Exception, match="No such option"):
        parse(["train", "--nope"])


def test_inline_commands_parse() -> None:
    found = re.findall(r"`((?:train|inspect|infer|digits|corrupt|evaluate|preview) [^`]*)`", README)
    assert found
    for line in found:
        parse(shlex.split(line))


def test_python_runs(digits: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    truth = digits[0][:20].reshape(-1, 784) / np.float32(255)
    noisy = truth + np.random.default_rng(0).uniform(-0.5, 0.5, truth.shape).astype(np.float32)
    names: dict[str, Any] = {"noisy": noisy}
    exec(code, names)
    assert np.square(names["clean"] - truth).mean() < 0.1 * np.square(noisy - truth).mean()
    assert np.array_equal(names["found"].pixels, names["clean"])
    assert len(names["found"].psnr) == len(names["found"].noise_level) == 20


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in code_blocks(README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        for target in re.findall(r"\bmake ([a-z]+)", block):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_module_map_is_the_package() -> None:
    (block,) = [block for block in code_blocks(README) if block.startswith("cli/, ")]
    listed = [name.rstrip("/") for line in block.splitlines() for name in re.split(r"\s{2,}", line)[0].split(", ")]
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(listed) == sorted(modules | folders)


def _anchors(page: str) -> set[str]:
    """What GitHub makes of its headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^):]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), target
        assert not anchor or anchor in _anchors(found.read_text(encoding="utf-8")), target


def test_scripts_that_the_documentation_names_are_there() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
    scripts = set(re.findall(r"python ((?:benchmarks|jobs)/\w+\.py)", pages))
    assert scripts
    assert {script for script in scripts if not (ROOT / script).is_file()} == set()


def test_constraints_hold_every_dependency_and_no_local_version() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [item for extra in project["optional-dependencies"].values() for item in extra]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if line and not line.startswith("#")}
    assert {re.split(r"[\[<>=~]", item)[0].lower() for item in wanted} <= pinned
    assert "torch==2.13.0" in lines
    assert not [line for line in lines if "+" in line.split("#")[0]]


def test_only_the_modules_named_import_ray() -> None:
    found = {
        "cluster/" if path.parent.name == "cluster" else path.stem
        for path in PACKAGE.rglob("*.py")
        if re.search(r"^\s*(import|from) ray\b", path.read_text(), re.M)
    }
    (named,) = re.findall(r"^Only (.*?) import Ray;", README, re.MULTILINE)
    assert found == set(re.findall(r"`(\w+/?)`", named))
