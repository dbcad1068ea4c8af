"""Whole runs side by side: a plain loop, a stock Ray Data pipeline and `denoise-batch infer`, on the same digits.

    python benchmarks/pipelines.py --rows 1000000 --repeats 2

Prints a table: seconds and images/s of each run as a whole and with start-up apart (for `infer`: from the first
unit's start to the last receipt), and ratios of medians to the loop. Each run is a process of its own; the contenders
take turns, so that a machine whose speed drifts treats all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROW_GROUP = 65_536
BATCH = 256


def loop(source: Path, out: Path, model: Path) -> dict[str, float]:
    """What a user would write first: pyarrow → model → pyarrow, one process, all cores in torch."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    network = _network(model)
    begun = time.monotonic()
    rows = 0
    out.mkdir()
    for path in sorted(source.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow.append(pa.field("denoised", pa.binary(784)))
            with pq.ParquetWriter(out / path.name, schema, compression="zstd", use_dictionary=["label"]) as writer:
                for batch in file.iter_batches(8192):
                    pixels = np.frombuffer(batch["image"].buffers()[1], np.uint8)
                    start = batch["image"].offset * 784
                    noisy = torch.from_numpy(pixels[start : start + batch.num_rows * 784].astype(np.float32) / 255)
                    with torch.inference_mode():
                        parts = noisy.view(-1, 1, 28, 28).split(BATCH)
                        clean = torch.cat(
                            [network(part.contiguous(memory_format=torch.channels_last)) for part in parts]
                        )
                        pixels = (clean * 255).round().to(torch.uint8).contiguous().numpy()
                    column = pa.Array.from_buffers(
                        pa.binary(784), batch.num_rows, [None, pa.py_buffer(pixels.tobytes())]
                    )
                    writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, column], schema=schema))
                    rows += batch.num_rows
    return {"rows": rows, "denoising": time.monotonic() - begun}


class StockDenoiser:
    """The actor of the stock pipeline, as Ray's documentation shows it, with Arrow batches and one thread."""

    def __init__(self, model: str) -> None:
        import torch

        torch.set_num_threads(1)
        self.network = _network(Path(model))

    def __call__(self, table: Any) -> Any:
        import numpy as np
        import pyarrow as pa
        import torch

        column = table["image"].combine_chunks()
        pixels = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * 784 :][: len(column) * 784]
        noisy = torch.from_numpy(pixels.astype(np.float32) / 255).view(-1, 1, 28, 28)
        with torch.inference_mode():
            clean = torch.cat(
                [self.network(part.contiguous(memory_format=torch.channels_last)) for part in noisy.split(BATCH)]
            )
        data = (clean * 255).round().to(torch.uint8).contiguous().numpy().tobytes()
        return table.append_column(
            "denoised", pa.Array.from_buffers(pa.binary(784), len(column), [None, pa.py_buffer(data)])
        )


def stock(source: Path, out: Path, model: Path) -> dict[str, float]:
    """read_parquet → map_batches → write_parquet, tuned fairly: one footer actor, Arrow batches, an actor a core."""
    os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"] = "1"
    import ray

    ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    cores = os.cpu_count() or 1
    begun = time.monotonic()
    data = ray.data.read_parquet(str(source)).map_batches(
        StockDenoiser,
        fn_constructor_args=(str(model),),
        batch_size=8192,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=0.5,
        compute=ray.data.ActorPoolStrategy(size=cores),
    )
    data.write_parquet(str(out), compression="zstd", use_dictionary=["label"])
    denoising = time.monotonic() - begun
    import pyarrow.dataset as ds

    return {"rows": ds.dataset(out).count_rows(), "denoising": denoising}


def ours(source: Path, out: Path, model: Path) -> dict[str, float]:
    from denoise_batch.inference.infer import InferSettings, infer

    report = infer(InferSettings((str(source),), str(out), model=model))
    return {"rows": report.rows_out, "denoising": report.denoising_seconds}


CONTENDERS = {"loop": loop, "stock Ray Data": stock, "denoise-batch infer": ours}


def _network(folder: Path) -> Any:
    import torch

    from denoise_batch.bundle import read_bundle

    return read_bundle(folder).load("cpu").to(memory_format=torch.channels_last)


def forward(model: Path, images: int = 40_000) -> float:
    """Raw forward images/s of the network in this process: eager float32, channels last, batch 256, all cores."""
    import torch

    network = _network(model)
    batch = torch.rand(BATCH, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        for _ in range(10):
            network(batch)
        begun = time.monotonic()
        for _ in range(images // BATCH):
            network(batch)
    return images // BATCH * BATCH / (time.monotonic() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--model", type=Path, help="model folder; default: the one that ships")
    parser.add_argument("--run", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from denoise_batch.bundle import find_bundle

    model = find_bundle(arguments.model).folder.absolute()
    if arguments.run:
        print(json.dumps(CONTENDERS[arguments.run](*arguments.paths, model)))
        return
    with tempfile.TemporaryDirectory(prefix="pipelines-") as folder:
        source = Path(folder, "in")
        _draw(source, arguments.rows)
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        denoising: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        raw = []
        for _ in range(arguments.repeats):
            raw.append(forward(model))
            for name in CONTENDERS:
                out = Path(folder, "out")
                command = [
                    sys.executable,
                    __file__,
                    "--run",
                    name,
                    "--model",
                    str(model),
                    "--paths",
                    str(source),
                    str(out),
                ]
                begun = time.monotonic()
                answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                seconds[name].append(time.monotonic() - begun)
                found = json.loads(answer.splitlines()[-1])
                assert found["rows"] == arguments.rows, (name, found)
                denoising[name].append(found["denoising"])
                shutil.rmtree(out)
                print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
    print(f"{arguments.rows:,} digits of uint8, binary layout, zstd; model {model.name}; {_machine()}")
    print(f"raw forward (eager float32, channels last, batch {BATCH}): {statistics.median(raw):,.0f} images/s\n")
    print("| run | whole run, s | images/s, whole run | images/s, start-up apart | whole run against the loop |")
    print("|---|---|---|---|---|")
    base = statistics.median(seconds["loop"])
    for name in CONTENDERS:
        whole, inner = statistics.median(seconds[name]), statistics.median(denoising[name])
        print(
            f"| {name} | {whole:.1f} | {arguments.rows / whole:,.0f} | {arguments.rows / inner:,.0f} "
            f"| {base / whole:.2f} × |"
        )


def _draw(folder: Path, rows: int) -> None:
    """Drawn digits with the seed's noise, clipped to 8 bits: files of 131,072 rows."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from denoise_batch.digits import draw_digits
    from denoise_batch.noise import NoiseRecipe

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, 131_072):
        count = min(131_072, rows - start)
        clean, labels = draw_digits(count, 0, start)
        noisy, _, _ = NoiseRecipe(clipped=1.0).apply(torch.from_numpy(clean).float() / 255, generator)
        pixels = (noisy * 255).round().to(torch.uint8).numpy()
        image = pa.Array.from_buffers(
            pa.binary(784), count, [None, pa.py_buffer(np.ascontiguousarray(pixels).tobytes())]
        )
        table = pa.table({"label": pa.array(labels), "image": image})
        pq.write_table(
            table,
            folder / f"{start:09d}.parquet",
            row_group_size=ROW_GROUP,
            compression="zstd",
            use_dictionary=["label"],
        )


def _machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (
                line.partition(":")[2].strip()
                for line in cpuinfo.read_text().splitlines()
                if line.startswith("model name")
            ),
            name,
        )
    return f"{os.cpu_count()} × {name}, {time.strftime('%Y-%m-%d')}"


if __name__ == "__main__":
    main()
