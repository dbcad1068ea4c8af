"""S3 on the wire: a server behind a proxy that fails, cuts and delays; pyarrow's own client before it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
from s3_server import ENVIRONMENT, FaultProxy, make_bucket, s3_server

from denoise_batch.errors import FlagError, MissingFileError, OutputError, ParquetError
from denoise_batch.inference.store_run import check_store_output
from denoise_batch.storage.listing import Listing, list_inputs, stat_input
from denoise_batch.storage.store_prefix import StorePrefix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Pixels, WriteImages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

MAIN = "import sys; from denoise_batch.cli import main; sys.exit(main())"
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "store_faults.py"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    with s3_server() as found:
        make_bucket(found, "bucket")
        yield found


@pytest.fixture
def proxy(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(server, seed=3, burst=4) as found:
        for name, value in ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        yield found


def test_ten_thousand_objects_are_listed_through_faults(proxy: FaultProxy) -> None:
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for number in range(10_000):
        backend.put_object("bucket", f"many/year=2024/{number:05d}.parquet", b"x" * (1 + number % 7))
    proxy.faults = {"500": 0.2, "503": 0.2, "cut-answer": 0.2, "lost-answer": 0.2}
    proxy.match, proxy.most = re.compile("GET .*list-type"), 5
    listing = list_inputs(["s3://bucket/many"])
    assert [file.path for file in listing.files] == [
        f"s3://bucket/many/year=2024/{number:05d}.parquet" for number in range(10_000)
    ]
    assert [file.size for file in listing.files] == [1 + number % 7 for number in range(10_000)]
    assert {file.folder for file in listing.files} == {"year=2024"}
    assert proxy.injected.total() == 5
    StorePrefix.at("s3://bucket/many").delete_below("")


@pytest.mark.parametrize("fault", ["cut", "503", "timeout", "lost-answer"])
def test_an_upload_in_parts_comes_through_whole(proxy: FaultProxy, tmp_path: Path, fault: str) -> None:
    content = os.urandom(11 << 20)
    (tmp_path / "file").write_bytes(content)
    proxy.faults = {fault: 1.0}
    proxy.match, proxy.most = (
        re.compile("PUT .*partNumber=2"),
        1 if fault == "timeout" else 4,
    )  # the client tries thrice
    store = StorePrefix.at("s3://bucket/uploads")
    store.put(fault, tmp_path / "file")
    assert proxy.injected[fault] == proxy.most
    assert store.read(fault) == content


def test_parquet_is_read_through_faults(
    proxy: FaultProxy, tmp_path: Path, digits: tuple[Pixels, Pixels], write_images: WriteImages
) -> None:
    from denoise_batch.parquet.input_file import open_parquet, read_batches

    path = write_images(tmp_path / "a.parquet", digits[0], row_group_size=50)
    StorePrefix.at("s3://bucket/in").put("a.parquet", path)
    proxy.faults = {"503": 0.2, "cut-answer": 0.3}
    with open_parquet("s3://bucket/in/a.parquet") as file:
        rows = [row for batch in read_batches(file, 32) for row in batch.column("image").to_pylist()]
    assert rows == pq.read_table(path)["image"].to_pylist()
    assert proxy.injected.total() >= 3


def test_no_access_and_no_bucket_are_told_at_once(proxy: FaultProxy) -> None:
    none = Listing((), single_file=False, skipped=(), folders=())
    with pytest.raises(OutputError, match="no bucket 'absent'"):
        check_store_output("s3://absent/out", (), none, overwrite=False)
    proxy.faults = {"403": 1.0}
    started = time.monotonic()
    with pytest.raises(OutputError, match="ACCESS_DENIED") as caught:
        check_store_output("s3://bucket/out", (), none, overwrite=False)
    with pytest.raises(MissingFileError, match="ACCESS_DENIED"):
        list_inputs(["s3://bucket/in"])
    assert proxy.injected["403"] <= 4
    assert time.monotonic() - started < 10
    assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    assert ENVIRONMENT["AWS_ACCESS_KEY_ID"] not in str(caught.value)


def test_what_a_listing_leaves_out_is_named_as_it_is(
    proxy: FaultProxy, tmp_path: Path, digits: tuple[Pixels, Pixels], write_images: WriteImages
) -> None:
    path = write_images(tmp_path / "a.parquet", digits[0])
    for name in ("a.parquet", "my notes.txt", "_b.parquet", "_SUCCESS"):
        StorePrefix.at("s3://bucket/left").put(name, path)
    assert not proxy.faults
    listing = list_inputs(["s3://bucket/left/"])
    assert sorted(listing.skipped) == ["s3://bucket/left/_b.parquet", "s3://bucket/left/my notes.txt"]
    StorePrefix.at("s3://bucket/left").put("_k=v/a.parquet", path)
    with pytest.raises(ParquetError, match=r"^s3://bucket/left/_k=v/a\.parquet: PyArrow would skip"):
        list_inputs(["s3://bucket/left"])


@pytest.mark.usefixtures("proxy")
def test_keys_that_a_folder_would_not_have(
    tmp_path: Path, digits: tuple[Pixels, Pixels], write_images: WriteImages
) -> None:
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    path = write_images(tmp_path / "a.parquet", digits[0])
    bucket = StorePrefix.at("s3://bucket/keys")
    for name in ("dup/t=10:30+1/ä b.parquet", "both", "both/a.parquet"):
        bucket.put(name, path)
    (found,) = list_inputs(["s3://bucket/keys/dup"]).files
    assert stat_input(found.path)[0] == path.stat().st_size
    for other in ("s3://bucket/keys/dup/t=10:30+1/ä b.parquet", "s3://bucket/keys/dup?region=us-east-1"):
        with pytest.raises(FlagError, match="is named twice"):
            list_inputs(["s3://bucket/keys/dup", other])
    for given in ("s3://bucket/keys/both", "s3://bucket/keys/both/"):
        with pytest.raises(FlagError, match=r"is an object and a folder as well: it holds bucket/keys/both/a\.parquet"):
            list_inputs([given])
    with pytest.raises(MissingFileError, match="does not exist") as caught:
        list_inputs(["s3://bucket/keys/*.parquet"])
    assert "globs are for local paths" in caught.value.hint
    # pyarrow does not put such a key either.
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object("bucket", "empty/part//a.parquet", b"x")
    with pytest.raises(MissingFileError, match=r"part//a\.parquet cannot be opened: its key has an empty part"):
        list_inputs(["s3://bucket/empty"])


def test_a_server_can_be_named_in_the_uri(
    server: tuple[str, int],
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    digits: tuple[Pixels, Pixels],
    write_images: WriteImages,
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    place = f"endpoint_override={server[0]}:{server[1]}&scheme=http"
    path = write_images(tmp_path / "a.parquet", digits[0])
    StorePrefix.at(f"s3://bucket/named?{place}").put("a.parquet", path)
    words = ["inspect", f"s3://me:topsecret@bucket/named/a.parquet?{place}", "--verify"]
    shown = subprocess.run([sys.executable, "-c", MAIN, *words], capture_output=True, text=True, check=True)
    assert "s3://bucket/named/a.parquet: Parquet" in shown.stdout
    assert "verified: no problems" in shown.stdout
    assert "topsecret" not in shown.stdout + shown.stderr
    assert proxy.seen.total() == 0


def test_runs_through_faults_and_kills_lose_and_double_nothing() -> None:
    command = [sys.executable, str(BENCHMARK), "--wire", "1", "--kills", "3", "--chains", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "faults: 0" in done.stdout
    kills = [int(line.split()[2]) for line in done.stdout.splitlines()[1:4]]
    assert sum(kills) >= 9
