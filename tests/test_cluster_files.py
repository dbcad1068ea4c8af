"""cluster.yaml, jobs/ and .rayignore: what Ray itself thinks of them, and that their versions are the project's."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from denoise_batch import cli, console
from denoise_batch.submission import job
from denoise_batch.submission.request import check_paths

ROOT = Path(__file__).parent.parent
PINNED = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line and not line.startswith("#")
)
CLUSTERS = ["cluster.yaml", "jobs/on-premise.yaml"]


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=CLUSTERS)
def cluster(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """A cluster's file, and what Ray makes of it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = load(request.param)
    prepared = prepare_config(copy.deepcopy(given))
    validate_config(prepared)
    return given, prepared


def commands(cluster: dict[str, Any]) -> str:
    return "\n".join(command for key, value in cluster.items() if key.endswith("_commands") for command in value)


def test_ray_accepts_it_and_takes_nothing_for_granted(cluster: tuple[dict[str, Any], dict[str, Any]]) -> None:
    given, prepared = cluster
    for key, value in given.items():
        if key.endswith("_commands"):  # Ray puts the common set-up before a kind's own
            assert prepared[key][-len(value) :] == value
        elif key not in {"available_node_types", "min_workers"}:
            assert prepared[key] == value, key
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_its_commands_are_shell(cluster: tuple[dict[str, Any], dict[str, Any]]) -> None:
    _, prepared = cluster
    subprocess.run(["bash", "-n"], input=commands(prepared), text=True, check=True, timeout=20)


def test_its_ray_is_the_pinned_one(cluster: tuple[dict[str, Any], dict[str, Any]]) -> None:
    given, _ = cluster
    asserted = re.findall(r"assert ray\.__version__ == '([^']+)'", commands(given))
    assert asserted == [PINNED["ray"]]
    if "docker" in given:
        assert given["docker"]["image"] == f"rayproject/ray:{PINNED['ray']}-py312-gpu"
    assert re.search(r"pip install -c \S*denoise-batch/constraints\.txt \S*denoise-batch$", commands(given), re.M)


def test_it_wants_a_token_and_opens_no_dashboard(cluster: tuple[dict[str, Any], dict[str, Any]]) -> None:
    given, _ = cluster
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in given[key][-1]
    assert "--dashboard-host=127.0.0.1" in given["head_start_ray_commands"][-1]
    assert "0.0.0.0" not in commands(given)
    (token,) = [local for remote, local in given["file_mounts"].items() if remote.endswith("/.ray/auth_token")]
    assert token == "~/.ray/auth_token"
    assert given["idle_timeout_minutes"] > 0


def test_aws_has_a_head_without_gpu_and_spot_workers_with_one() -> None:
    given = load("cluster.yaml")
    kinds = given["available_node_types"]
    head, worker = kinds[given["head_node_type"]], kinds["gpu-spot"]
    assert "GPU" not in head["resources"]
    assert "InstanceMarketOptions" not in head["node_config"], "a head that goes takes the run's driver along"
    assert worker["resources"]["GPU"] == 1
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert head["node_config"]["ImageId"] == worker["node_config"]["ImageId"] == "ami-REPLACE-ME"
    assert 1 <= worker["min_workers"] <= worker["max_workers"] <= given["max_workers"]


@pytest.mark.parametrize("name", [*CLUSTERS, "jobs/runtime_env.yaml", "docs/cluster.md"])
def test_the_commands_in_a_file_parse(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = re.findall(r"^(?:# +)?(denoise-batch .*)$", text.replace("\\\n", " "), re.MULTILINE)
    assert lines
    for line in lines:
        parsed = console.parse_command(cli.app, shlex.split(line, comments=True)[1:])
        if parsed.name == "submit" and "--" in parsed.arguments:
            inner = parsed.arguments[parsed.arguments.index("--") + 1 :]
            check_paths(console.parse_command(cli.app, inner))


def test_files_of_the_guide_are_there() -> None:
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"\bjobs/[\w.-]+\.(?:py|yaml)", text)):
        assert (ROOT / name).is_file(), name
    assert set(re.findall(r"\w+-REPLACE-ME", text)) == {"ami-REPLACE-ME", "fs-REPLACE-ME"}


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_the_runtime_environment_pins_what_a_job_needs() -> None:
    packages = load("jobs/runtime_env.yaml")["pip"]["packages"]
    pins = dict(item.split("==") for item in packages)
    assert {name: PINNED[name] for name in pins} == pins
    imported = {"pillow": "PIL"}
    assert {imported.get(name, name) for name in pins} == set(job.NEEDED) - {"ray"}


def test_ray_accepts_the_runtime_environment() -> None:
    from ray.runtime_env import RuntimeEnv

    assert RuntimeEnv(**load("jobs/runtime_env.yaml"))["pip"]["pip_check"] is False


def test_the_kuberay_job_is_whole() -> None:
    manifest = load("jobs/rayjob.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == PINNED["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == f"rayproject/ray:{PINNED['ray']}-py312-gpu"
        assert container["resources"]["limits"] == container["resources"]["requests"], "Ray counts on the limits"
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert {volume["name"] for volume in pod["volumes"]} == mounted.keys()
        assert "/shared" in mounted.values()
    assert "nvidia.com/gpu" not in groups[0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    assert environment.pop("env_vars") == {"PYTHONPATH": "/shared/denoise-batch"}
    assert environment == load("jobs/runtime_env.yaml")


def test_the_kuberay_job_starts_an_entry_point_with_flags_that_parse() -> None:
    program, script, *arguments = shlex.split(load("jobs/rayjob.yaml")["spec"]["entrypoint"])
    assert program == "python"
    path = Path(script).relative_to("/shared/denoise-batch")
    assert (ROOT / path).is_file()
    check_paths(console.parse_command(cli.app, [path.stem, *arguments]))


@pytest.mark.parametrize("command", ["train", "infer"])
def test_entry_points_are_the_commands(command: str) -> None:
    done = subprocess.run(
        [sys.executable, f"jobs/{command}.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert f"Usage: denoise-batch {command}" in done.stdout
    done = subprocess.run(
        [sys.executable, f"jobs/{command}.py", "--nope"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no such option")


def test_an_upload_of_a_checkout_is_small_and_has_what_a_job_needs(tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    checkout, package = tmp_path / "checkout", tmp_path / "package.zip"
    checkout.mkdir()
    for name in (".rayignore", ".gitignore", "pyproject.toml", "constraints.txt", "README.md", "cluster.yaml"):
        shutil.copy(ROOT / name, checkout)
    for name in ("denoise_batch", "jobs"):
        shutil.copytree(ROOT / name, checkout / name)
    left = (
        ".git",
        ".venv",
        "demo",
        "docs/figures",
        "tests",
        "benchmarks",
        "denoise-model",
        ".out.denoise-batch",
        "build",
    )
    for name in left:
        (checkout / name).mkdir(parents=True)
        (checkout / name / "file").touch()
    (checkout / "in.parquet").touch()
    create_package(
        str(checkout), package, include_gitignore=True, include_parent_dir=False,
        excludes=get_runtime_env_default_excludes(),
    )  # fmt: skip
    with zipfile.ZipFile(package) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert package.stat().st_size < 16e6
    assert {"jobs/infer.py", "jobs/train.py", "denoise_batch/pretrained/bounds-unet/model.safetensors"} <= names
    tops = {name.split("/")[0] for name in names} - {".rayignore", ".gitignore"}
    assert tops == {"denoise_batch", "jobs", "pyproject.toml", "constraints.txt", "README.md"}
    assert not [name for name in names if "__pycache__" in name]
