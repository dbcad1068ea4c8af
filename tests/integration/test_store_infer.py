"""`infer` through Ray from and to an object store that fails now and then; its driver is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.append(str(Path(__file__).parents[1]))
from s3_server import ENVIRONMENT, FAULTS, FaultProxy, make_bucket, s3_server

from denoise_batch.digits import draw_digits
from denoise_batch.images import encode
from denoise_batch.images.layouts import Layout, output_column
from denoise_batch.inference.manifest import RUN
from denoise_batch.inspection import inspect
from denoise_batch.storage.store_prefix import StorePrefix

if TYPE_CHECKING:
    import pytest

FILES, ROWS = 8, 1000
OUT = "s3://bucket/denoised"


def _command(model: Path, *more: str) -> list[str]:
    words = ["infer", "s3://bucket/in", OUT, "--model", str(model), "--json", *more]
    return [sys.executable, "-c", "import sys; from denoise_batch.cli import main; sys.exit(main())", *words]


def _finish(model: Path, *more: str) -> dict[str, Any]:
    done = subprocess.run(_command(model, *more), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_killed_driver_and_a_failing_store_lose_and_double_nothing(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = output_column(None, "image", Layout.BINARY, "uint8")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with s3_server() as server, FaultProxy(server, seed=2, burst=4) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        make_bucket(server, "bucket")
        source, out = StorePrefix.at("s3://bucket/in"), StorePrefix.at(OUT)
        for number in range(FILES):
            pixels = draw_digits(ROWS, seed=1, start=number * ROWS)[0].reshape(ROWS, 784)
            ids = pa.array(range(number * ROWS, (number + 1) * ROWS))
            path = tmp_path / f"{number}.parquet"
            pq.write_table(pa.table({"id": ids, "image": encode(pixels, None, image)}), path, write_page_checksum=True)
            source.put(path.name, path)
        proxy.faults = {kind: 0.01 for kind in FAULTS if kind != "timeout"}  # which cost seconds each
        driver = subprocess.Popen(
            _command(model_folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            until = time.monotonic() + 150
            # Finished files alone are not enough: their receipts may still be on the way, and they count.
            while not out.sizes(f"{RUN}/ledger"):
                assert time.monotonic() < until
                assert driver.poll() is None, "it ended before it was killed"
                time.sleep(0.1)
        finally:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
        report = _finish(model_folder)
        assert report["resumed_units"] >= 1
        assert (report["rows_in"], report["rows_out"]) == (FILES * ROWS, FILES * ROWS)
        assert proxy.injected.total() >= 5
        proxy.faults = {}
        found = inspect(OUT, verify=True)
        assert found.problems == ()
        ids = []
        for number in range(FILES):
            with out.filesystem.open_input_file(f"{out.root}/part-{number:05d}.parquet") as file:
                ids += pq.read_table(file)["id"].to_pylist()
        assert ids == list(range(FILES * ROWS))
