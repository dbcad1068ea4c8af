"""Which files inputs name: folders, globs, names that count and names that do not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from denoise_batch.errors import FlagError, MissingFileError, ParquetError
from denoise_batch.storage.listing import Listing, list_inputs, skipped_lines


def _touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def _names(root: Path, listing: Listing) -> list[str]:
    return [file.path[len(str(root)) + 1 :] for file in listing.files]


def test_a_folder_is_listed_at_every_depth_in_path_order(tmp_path: Path) -> None:
    _touch(tmp_path, "b.parquet", "a/2.parquet", "a/10.parquet", "c.pq", "000000_0")
    listing = list_inputs([str(tmp_path)])
    assert _names(tmp_path, listing) == ["000000_0", "a/10.parquet", "a/2.parquet", "b.parquet", "c.pq"]
    assert not listing.single_file


def test_hidden_and_underscore_names_are_skipped_at_every_depth(tmp_path: Path) -> None:
    _touch(
        tmp_path,
        "a.parquet",
        "_SUCCESS",
        ".b.parquet",
        "_denoise_batch/bad_rows.parquet",
        "x/.y/c.parquet",
        "x/_d.parquet",
    )
    listing = list_inputs([str(tmp_path)])
    assert _names(tmp_path, listing) == ["a.parquet"]
    # What a user may take for input is said; what readers and writers keep for themselves is not.
    assert sorted(listing.skipped) == [str(tmp_path / ".b.parquet"), str(tmp_path / "x/_d.parquet")]


def test_an_input_without_parquet_names_what_is_there(tmp_path: Path) -> None:
    _touch(tmp_path, "a.csv", "_b.parquet", "_SUCCESS")
    with pytest.raises(MissingFileError, match="no Parquet files in") as caught:
        list_inputs([str(tmp_path)])
    assert "there: '_b.parquet', 'a.csv'" in caught.value.hint


def test_a_glob_without_a_match_is_told_so(tmp_path: Path) -> None:
    """Suffixes count below folders alone: `x*.csv` would take a file that is named so."""
    _touch(tmp_path, "a.csv", "folder/b.csv", "_x.parquet")
    for pattern, hint in (("y*.parquet", "the glob matches no file or folder; "), ("fold*", "looked for .parquet, ")):
        with pytest.raises(MissingFileError, match="no Parquet files in") as caught:
            list_inputs([str(tmp_path / pattern)])
        assert caught.value.hint.startswith(hint)
    assert len(list_inputs([str(tmp_path / "a*")]).files) == 1


def test_other_suffixes_are_reported_not_read(tmp_path: Path) -> None:
    _touch(tmp_path, "a.parquet", "notes.txt", "part.csv")
    listing = list_inputs([str(tmp_path)])
    assert _names(tmp_path, listing) == ["a.parquet"]
    assert sorted(name.rsplit("/", 1)[1] for name in listing.skipped) == ["notes.txt", "part.csv"]


def test_files_left_out_are_said_in_a_line() -> None:
    assert skipped_lines(0, []) == []
    assert skipped_lines(1, ["x/b.csv"]) == ["note: 1 file left out because of its name: 'b.csv'"]
    assert len(skipped_lines(1, ["x/b\nnote: all is well"])[0].splitlines()) == 1
    named = [f"s3://bucket/{name}.txt" for name in "abcde"]
    assert skipped_lines(1200, named) == [
        "note: 1,200 files left out because of their names: 'a.txt', 'b.txt', 'c.txt', …"
    ]


def test_hive_folders_are_kept_and_others_are_not(tmp_path: Path) -> None:
    _touch(tmp_path, "raw/year=2024/month=05/a.parquet", "raw/plain/b.parquet")
    listing = list_inputs([str(tmp_path)])
    assert {file.path.rsplit("/", 1)[1]: file.folder for file in listing.files} == {
        "a.parquet": "year=2024/month=05",
        "b.parquet": "",
    }


@pytest.mark.parametrize("folder", ["key=..", "=x"])
def test_unsafe_partition_folders_are_refused(tmp_path: Path, folder: str) -> None:
    _touch(tmp_path, f"{folder}/a.parquet")
    with pytest.raises(ParquetError, match="not safe"):
        list_inputs([str(tmp_path)])


def test_a_link_that_leads_back_up_ends(tmp_path: Path) -> None:
    _touch(tmp_path, "a/b.parquet")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert _names(tmp_path, list_inputs([str(tmp_path)])) == ["a/b.parquet"]


def test_a_linked_folder_shows_what_is_in_it_beside_the_folder_itself(tmp_path: Path) -> None:
    """As it does to readers: neither takes the other's place."""
    _touch(tmp_path, "year=2024/a.parquet", "year=2024/month=1/b.parquet")
    (tmp_path / "year=2023").symlink_to(tmp_path / "year=2024")
    listing = list_inputs([str(tmp_path)])
    months = ("year=2023", "year=2023/month=1", "year=2024", "year=2024/month=1")
    assert [file.folder for file in listing.files] == list(months)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it would be lost without a word. Root may list any folder, so the refusal is made here."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.parquet").write_bytes(b"")
    closed, scan, access = str(tmp_path / "b"), os.scandir, os.access

    def scandir(path: Any) -> Any:
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda path, mode, **_: str(path) != closed and access(path, mode))
    for given in (str(tmp_path), f"{tmp_path}/*", f"{tmp_path}/*/*.parquet", f"{tmp_path}/**/*.parquet"):
        with pytest.raises(MissingFileError, match="b cannot be listed"):
            list_inputs([given])
    assert len(list_inputs([f"{tmp_path}/a/*"]).files) == 1


@pytest.mark.parametrize("given", ["", "/*", "/*/*"])
def test_partitions_that_only_some_readers_see_are_refused(tmp_path: Path, given: str) -> None:
    (tmp_path / "x" / "_year=2024").mkdir(parents=True)
    (tmp_path / "x" / "_year=2024" / "a.parquet").write_bytes(b"")
    with pytest.raises(ParquetError, match="PyArrow would skip the partition folder '_year=2024'"):
        list_inputs([f"{tmp_path}{given}"])


def test_hidden_names_are_skipped_by_globs_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "_denoise_batch" / "quarantine").mkdir(parents=True)
    for name in ("a.parquet", "_SUCCESS", "_denoise_batch/bad_rows.parquet", "_denoise_batch/quarantine/b.parquet"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "_c.parquet").write_bytes(b"")

    def found(pattern: str) -> list[str]:
        return [Path(file.path).name for file in list_inputs([f"{tmp_path}/{pattern}"]).files]

    assert found("*") == found("**/*.parquet") == ["a.parquet"]
    for pattern in ("*", "**/*.parquet"):
        assert list_inputs([f"{tmp_path}/{pattern}"]).skipped == (str(tmp_path / "_c.parquet"),)
    assert found("_denoise_batch/quarantine/*") == found("_denoise*/quarantine/*.parquet") == ["b.parquet"]


def test_globs_and_single_files(tmp_path: Path) -> None:
    _touch(tmp_path, "a.parquet", "b.parquet", "c.txt")
    assert _names(tmp_path, list_inputs([str(tmp_path / "*.parquet")])) == ["a.parquet", "b.parquet"]
    assert list_inputs([str(tmp_path / "a.parquet")]).single_file
    assert not list_inputs([str(tmp_path / "a.*")]).single_file


def test_hive_folders_of_a_glob_are_kept(tmp_path: Path) -> None:
    _touch(tmp_path, "h/year=1/a.parquet", "h/year=2/m=3/b.parquet")
    for pattern, folders in (("h/year=*/*.parquet", {"year=1"}), ("h/year=*", {"year=1", "year=2/m=3"})):
        listing = list_inputs([str(tmp_path / pattern)])
        assert {file.folder for file in listing.files} == folders, pattern


def test_hive_folders_are_kept_however_the_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _touch(tmp_path, "k=v/plain/year=1/m=2/a.parquet", "k=v/plain/year=2/m=2/b.parquet", "c.parquet")
    top, folders = tmp_path / "k=v" / "plain", ["year=1/m=2", "year=2/m=2"]
    for named in (
        [top],
        [f"{top}/*/*/*.parquet"],
        [f"{top}/year=*"],
        [top / "year=1", top / "year=2"],
        [f"{top}/year=1/m=*", top / "year=2" / "m=2"],
        [top / "year=1" / "m=2" / "a.parquet", (top / "year=2" / "m=2" / "b.parquet").as_uri()],
    ):
        listing = list_inputs([str(given) for given in named])
        assert [file.folder for file in listing.files] == folders, named
        assert listing.keys == ["year", "m"]
    monkeypatch.chdir(top / "year=1")
    assert [file.folder for file in list_inputs(["."]).files] == ["year=1/m=2"]
    alone = list_inputs([str(top / "year=1" / "m=2" / "a.parquet")])  # gives one file
    assert (alone.single_file, alone.keys) == (True, [])
    assert list_inputs([str(tmp_path / "c.parquet")]).files[0].folder == ""


def test_what_is_missing_or_named_twice_is_refused(tmp_path: Path) -> None:
    _touch(tmp_path, "a.parquet")
    with pytest.raises(MissingFileError, match="does not exist"):
        list_inputs([str(tmp_path / "gone.parquet")])
    with pytest.raises(FlagError, match="twice"):
        list_inputs([str(tmp_path), str(tmp_path / "a.parquet")])
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (tmp_path / "link" / "a.parquet", tmp_path / "link" / ".." / tmp_path.name / "a.parquet"):
        with pytest.raises(FlagError, match="twice"):
            list_inputs([str(tmp_path / "a.parquet"), str(other)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match="no Parquet files"):
        list_inputs([str(tmp_path / "empty")])


def test_an_empty_input_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _touch(tmp_path, "a.parquet")
    monkeypatch.chdir(tmp_path)
    for inputs in ([""], ["a.parquet", ""]):
        with pytest.raises(FlagError, match="a path is empty"):
            list_inputs(inputs)
    assert len(list_inputs(["."]).files) == 1


def test_file_uris_are_read_like_paths(tmp_path: Path) -> None:
    _touch(tmp_path, "a.parquet")
    assert list_inputs([f"file://{tmp_path}"]).files == list_inputs([str(tmp_path)]).files


@pytest.mark.parametrize(
    ("kind", "log"),
    [
        ("Delta Lake", "_delta_log/00000000000000000000.json"),
        ("Hudi", ".hoodie/hoodie.properties"),
        ("Iceberg", "metadata/v1.metadata.json"),
    ],
)
@pytest.mark.parametrize(
    "given", ["", "table", "table/data", "table/data/k=1", "table/data/*/*.parquet", "a table's file"]
)
def test_tables_with_a_log_are_no_folders_of_files(tmp_path: Path, kind: str, log: str, given: str) -> None:
    """Their files hold rows that were deleted or replaced, and all would come back."""
    _touch(tmp_path, "table/data/k=1/0.parquet", f"table/{log}", "plain/metadata/a.json", "plain/b.parquet")
    path = tmp_path / (given if "'" not in given else "table/data/k=1/0.parquet")
    with pytest.raises(ParquetError, match=f"^{tmp_path}/table is a table of {kind}, whose log") as caught:
        list_inputs([str(path)])
    assert "plain Parquet" in caught.value.hint
    assert len(list_inputs([str(tmp_path / "plain")]).files) == 1
