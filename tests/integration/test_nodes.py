"""Whether every node of a cluster sees a run's files, found out before its work begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import ray

from denoise_batch import cli
from denoise_batch.cluster import shared_files
from denoise_batch.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import WriteImages

pytestmark = pytest.mark.usefixtures("ray_session")


def test_a_node_says_what_it_does_not_see(tmp_path: Path) -> None:
    here = ray.get_runtime_context().get_node_id()
    assert shared_files.unseen_on_nodes([here], [tmp_path]) == {}
    absent = tmp_path / "absent"
    assert shared_files.unseen_on_nodes([here], [tmp_path, absent, tmp_path / "too"]) == {here: str(absent)}


def test_a_node_that_went_is_no_reason(tmp_path: Path) -> None:
    assert shared_files.unseen_on_nodes(["ab" * 28], [tmp_path / "absent"]) == {}


def test_one_node_is_not_asked(tmp_path: Path) -> None:
    shared_files.check_seen_by_nodes(tmp_path, [tmp_path / "absent"], 0.9, 0.0)


@pytest.mark.parametrize("folder_is_shared", [True, False])
def test_the_path_and_the_machine_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_is_shared: bool
) -> None:
    other = {"NodeID": "ab" * 28, "NodeManagerAddress": "10.0.0.7", "Alive": True, "Resources": {"CPU": 4.0}}
    gone = {"NodeID": "cd" * 28, "NodeManagerAddress": "10.0.0.8", "Alive": False, "Resources": {"CPU": 4.0}}
    idle = {"NodeID": "ef" * 28, "NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": {}}
    nodes = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [gone, idle, *nodes, other])

    def look(nodes: dict[str, str], paths: list[Path]) -> dict[str, str]:
        assert nodes == {"ab" * 28: "10.0.0.7"}
        assert paths[0].parent == tmp_path
        assert paths[0].exists()
        return dict.fromkeys(nodes, str(paths[1 if folder_is_shared else 0]))

    monkeypatch.setattr(shared_files, "unseen_on_nodes", look)
    missing: Any = "/data/in.parquet" if folder_is_shared else tmp_path
    with pytest.raises(RequestError, match=rf"^{missing} is not seen by the cluster's machine 10\.0\.0\.7$"):
        shared_files.check_seen_by_nodes(tmp_path, [missing], 0.9, 0.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["infer", "train"])
def test_a_refused_request_leaves_nothing_behind(
    command: str,
    tmp_path: Path,
    digits: Any,
    write_images: WriteImages,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_images(tmp_path / "in.parquet", digits[0])

    def refuse(*_: object) -> None:
        raise RequestError("not seen", hint="share it")

    monkeypatch.setattr("denoise_batch.inference.infer.check_seen_by_nodes", refuse)
    monkeypatch.setattr("denoise_batch.training.train.check_seen_by_nodes", refuse)
    arguments = {
        "infer": ["infer", str(source), str(tmp_path / "out.parquet")],
        "train": ["train", "--data", str(source), "--out", str(tmp_path / "model")],
    }
    assert cli.run(arguments[command]) == 2
    assert "error: not seen" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]
