"""Paths and URIs: what of them may be shown, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from denoise_batch import storage
from denoise_batch.errors import FlagError


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
