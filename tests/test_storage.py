"""Paths and URIs: what of them may be shown, and which are refused."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from denoise_batch import storage
from denoise_batch.errors import FlagError, MissingFileError
from denoise_batch.storage import object_store


def test_secrets_in_uris_are_not_shown() -> None:
    uri = "s3://KEY:SECRET@bucket/folder/a.parquet?endpoint_override=localhost&token=abc"
    assert storage.redact(uri) == "s3://bucket/folder/a.parquet"
    assert storage.redact("s3://AKIA:ab/cd@bucket/x") == "s3://bucket/x"
    assert storage.redact("s3://bucket/a@b.parquet") == "s3://bucket/a@b.parquet"
    with pytest.raises(FlagError) as error:
        storage.locate("nonsense://user:password@host/x")
    assert "password" not in str(error.value)


def test_uris_are_told_from_paths() -> None:
    assert [storage.scheme_of(path) for path in ("s3://b/x", "file:///x", "/x", "x:y")] == ["s3://", "file:///", "", ""]
    assert storage.is_uri("file:///x")
    assert not storage.is_remote("file:///x")
    with pytest.raises(FlagError, match="one slash behind s3:"):
        storage.locate("s3:/bucket/x")
    with pytest.raises(FlagError, match="not a local path"):
        storage.local_path("s3://bucket/x")


def test_an_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(FlagError, match="a path is empty") as error:
        storage.local_path("")
    assert "shell" in error.value.hint
    assert storage.local_path(".") == Path()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b"])
def test_names_that_lead_elsewhere(name: str) -> None:
    assert not storage.stays_inside(name)
    assert storage.stays_inside("part-00000.parquet")
    assert storage.stays_inside("year=2024/month=05", folders=True)
    assert not storage.stays_inside("year=2024/..", folders=True)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that has all it needs to be made, and nobody who would answer it."""
    given = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (given | {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}).items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("scheme", ["s3", "gs", "gcs"])
def test_keys_are_what_pyarrow_makes_of_uris(scheme: str) -> None:
    for rest in ("b", "b/", "b/x", "b/x/", "b/x//", "b/a%20b/c", "b/a+b", "b/%C3%A4", "b/t=10:30@,(1)"):
        uri = f"{scheme}://{rest}"
        assert storage.locate(uri)[1] == fs.FileSystem.from_uri(uri)[1].rstrip("/")
    assert storage.locate(f"{scheme}://b/my notes/ä")[1] == "b/my notes/ä"  # which pyarrow does not take
    assert storage.locate(f"{scheme.upper()}://b/x")[1] == "b/x"


@pytest.mark.usefixtures("no_network")
def test_a_bucket_has_one_client_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    one = storage.locate("s3://bucket/x")[0]
    assert storage.locate("s3://bucket/y/z.parquet")[0] is one
    assert storage.locate("s3://bucket/y?endpoint_override=localhost:9")[0] is not one
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert storage.locate("s3://bucket/x")[0] is not one


@pytest.mark.parametrize("uri", ["s3://bucket/out#2", "file:///tmp/a#b", "gs://bucket/a%20#.parquet"])
def test_a_uri_does_not_end_unseen_at_a_number_sign(uri: str) -> None:
    with pytest.raises(FlagError, match="has a # in it") as caught:
        storage.locate(uri)
    assert "%23" in caught.value.hint


@pytest.mark.usefixtures("no_network")
def test_one_place_has_one_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert storage.place_of(str(tmp_path / "link")) == storage.place_of(f"file://{tmp_path}/a")
    assert storage.place_of("s3://b/t=10:30") == storage.place_of("s3://b/t%3D10%3A30?region=us-east-1")
    assert storage.place_of("gcs://b/x") == storage.place_of("gs://b/x")
    assert storage.place_of("s3://b/x") != storage.place_of("gs://b/x")
    assert storage.place_of("s3://b/x?endpoint_override=one") != storage.place_of("s3://b/x?endpoint_override=two")


def test_a_store_that_does_not_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def from_uri(uri: str) -> tuple[Any, str]:
        asked.append(uri)
        if len(asked) < 3:
            raise OSError("When resolving region for bucket 'asked': AWS Error NETWORK_CONNECTION during HeadBucket")
        if len(asked) < 4:
            raise OSError("Bucket 'asked' not found")
        raise pa.ArrowInvalid("Unexpected query parameter in S3 URI: 'x'")

    monkeypatch.setattr(fs, "FileSystem", SimpleNamespace(from_uri=from_uri))
    monkeypatch.setattr(object_store.time, "sleep", lambda _: None)
    with pytest.raises(MissingFileError, match=r"^s3://asked/x cannot be reached: Bucket 'asked' not found") as caught:
        storage.locate("s3://asked/x")
    assert "network" in caught.value.hint
    with pytest.raises(FlagError, match=r"^cannot open s3://asked/x: Unexpected query"):
        storage.locate("s3://asked/x?x=1")
    assert len(asked) == 4


@pytest.mark.parametrize("uri", ["s3://b//x", "gs://b/a//b.parquet", "s3://b/a%2F%2Fb", "gcs://b/a/%2Fb", "s3://b/%2F"])
def test_keys_that_pyarrow_does_not_open_are_refused(uri: str) -> None:
    with pytest.raises(FlagError, match="has an empty part") as caught:
        storage.locate(uri)
    assert uri in caught.value.message
    assert "one slash" in caught.value.hint


@pytest.mark.parametrize("uri", ["s3://", "gs://?project_id=x", "s3:///x", "gs:////", "s3://KEY:SECRET@/x"])
def test_a_uri_without_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(FlagError, match="names no bucket") as caught:
        storage.locate(uri)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://b/x", "file:///x"])
def test_a_uri_is_text(uri: str) -> None:
    with pytest.raises(FlagError, match="is not UTF-8"):
        storage.locate(uri + os.fsdecode(b"\xff"))
