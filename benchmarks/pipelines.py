"""Whole runs side by side: a plain loop, stock Ray Data and Daft pipelines, and `denoise-batch infer`.

    python benchmarks/pipelines.py --rows 1000000 --repeats 3
    python benchmarks/pipelines.py --rows 100000 --layout list --compression none --only loop "denoise-batch infer"
    python benchmarks/pipelines.py --others plain

Prints a table: seconds and images/s of each run as a whole and with start-up apart (for `infer`: from the first
unit's start to the last receipt), the share of the raw forward pass, and how much faster `infer` is over the whole
run; medians. By default all compute alike, in such numbers as `infer` does, so that pipelines are compared and not
networks. `--others` has the others call the same network as one would without this project: `plain`, as PyTorch comes
(float32), or `bfloat16`, under its autocast, channels last. Each run is a process of its own; the contenders take
turns, so that a machine whose speed drifts treats all alike. Above it stands the raw forward pass of such images, no
file read or written: as `infer` computes (a process a core, one thread each), and as PyTorch comes (one process,
contiguous, float32).

Daft takes part where it is installed (`pip install daft`, for this alone).
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROW_GROUP = 65_536
BATCH = 256
CORES = os.cpu_count() or 1

OTHERS = {"alike": "as infer does", "plain": "as PyTorch comes", "bfloat16": "under bfloat16 autocast, channels last"}


@dataclass(frozen=True)
class Case:
    """What all contenders are given.

    Attributes:
        model: model folder.
        layout, compression: of the files.
        others: how those beside `infer` compute.
    """

    model: Path
    layout: str
    compression: str
    others: str


# --- what a user would write -----------------------------------------------------------------------------------------


def pixels_of(column: Any, layout: str) -> Any:
    """An Arrow array of images without nulls → (n, 784) float32 in 0..1."""
    import numpy as np

    if layout == "encoded":
        from PIL import Image

        shown = [np.asarray(Image.open(io.BytesIO(image.as_py()))) for image in column]
        return np.stack(shown).reshape(-1, 784).astype(np.float32) / 255
    flat = column.flatten().to_numpy() if layout == "list" else np.frombuffer(column.buffers()[1], np.uint8)
    start = 0 if layout == "list" else column.offset * 784
    return flat[start : start + len(column) * 784].reshape(-1, 784).astype(np.float32) / 255


def column_of(pixels: Any, layout: str) -> Any:
    """(n, 784) uint8 → an Arrow array in the layout."""
    import numpy as np
    import pyarrow as pa

    if layout == "encoded":
        from PIL import Image

        images = []
        for image in pixels.reshape(-1, 28, 28):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG", compress_level=1)
            images.append(file.getvalue())
        return pa.array(images, pa.binary())
    if layout == "list":
        offsets = np.arange(0, 784 * (len(pixels) + 1), 784, dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, pa.array(pixels.reshape(-1)))
    return pa.Array.from_buffers(pa.binary(784), len(pixels), [None, pa.py_buffer(np.ascontiguousarray(pixels))])


def _type(layout: str) -> Any:
    import pyarrow as pa

    return {"binary": pa.binary(784), "list": pa.list_(pa.uint8()), "encoded": pa.binary()}[layout]


def _denoised(network: Any, noisy: Any, others: str) -> Any:
    """(n, 784) float32 → (n, 784) uint8."""
    import torch

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=others == "bfloat16"):
        # Fastest for passes in integers and in others.
        batch = 1024 if network.computes_in_integers else BATCH
        parts = torch.from_numpy(noisy).view(-1, 1, 28, 28).split(batch)
        if others != "plain":
            parts = [part.contiguous(memory_format=torch.channels_last) for part in parts]
        clean = torch.cat([network(part) for part in parts])
        return (clean * 255).round().to(torch.uint8).reshape(-1, 784).numpy()


def loop(source: Path, out: Path, case: Case) -> dict[str, float]:
    """What a user would write first: pyarrow → model → pyarrow, one process, all cores in torch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    network = _network(case)
    begun = time.monotonic()
    rows = 0
    out.mkdir()
    for path in sorted(source.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow.append(pa.field("denoised", _type(case.layout)))
            options = {"compression": case.compression, "use_dictionary": ["label"]}
            with pq.ParquetWriter(out / path.name, schema, **options) as writer:
                for batch in file.iter_batches(8192):
                    pixels = _denoised(network, pixels_of(batch["image"], case.layout), case.others)
                    columns = [*batch.columns, column_of(pixels, case.layout)]
                    writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
                    rows += batch.num_rows
    return {"rows": rows, "denoising": time.monotonic() - begun}


class StockDenoiser:
    """The actor of the stock pipeline, as Ray's documentation shows it, with Arrow batches and one thread."""

    def __init__(self, case: Case) -> None:
        import torch

        torch.set_num_threads(1)
        self.network, self.case = _network(case), case

    def __call__(self, table: Any) -> Any:
        pixels = pixels_of(table["image"].combine_chunks(), self.case.layout)
        denoised = _denoised(self.network, pixels, self.case.others)
        return table.append_column("denoised", column_of(denoised, self.case.layout))


def stock(source: Path, out: Path, case: Case) -> dict[str, float]:
    """read_parquet → map_batches → write_parquet, tuned fairly: one footer actor, Arrow batches, an actor a core."""
    os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"] = "1"
    import ray

    # `local`, or Ray would look for the last cluster that ran on this machine, dead or alive.
    ray.init("local", include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    begun = time.monotonic()
    data = ray.data.read_parquet(str(source)).map_batches(
        StockDenoiser,
        fn_constructor_args=(case,),
        batch_size=8192,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=0.5,
        compute=ray.data.ActorPoolStrategy(size=CORES),
    )
    data.write_parquet(str(out), compression=case.compression, use_dictionary=["label"])
    denoising = time.monotonic() - begun
    return {"rows": _rows(out), "denoising": denoising}


def daft(source: Path, out: Path, case: Case) -> dict[str, float]:
    """read_parquet → a class UDF over batches, a process a core → write_parquet."""
    import daft as daft_library

    begun = time.monotonic()
    binary = daft_library.DataType.binary()
    kind = {
        "binary": daft_library.DataType.fixed_size_binary(784),
        "list": daft_library.DataType.list(daft_library.DataType.uint8()),
        "encoded": binary,
    }[case.layout]

    @daft_library.udf(return_dtype=kind, batch_size=8192, concurrency=CORES)
    class Denoise:
        def __init__(self) -> None:
            import torch

            torch.set_num_threads(1)
            self.network = _network(case)

        def __call__(self, images: Any) -> Any:
            pixels = pixels_of(images.to_arrow().cast(_type(case.layout)), case.layout)
            return column_of(_denoised(self.network, pixels, case.others), case.layout)

    frame = daft_library.read_parquet(f"{source}/*.parquet")
    frame = frame.with_column("denoised", Denoise(frame["image"]))
    frame.write_parquet(str(out), compression=case.compression)
    return {"rows": _rows(out), "denoising": time.monotonic() - begun}


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(source: Path, out: Path, case: Case, workers: int | None = None) -> dict[str, float]:
    from denoise_batch.inference.infer import InferSettings, infer

    settings = InferSettings(
        (str(source),), str(out), model=case.model, compression=case.compression, workers=workers
    )  # the layout is found
    report = infer(settings)
    return {"rows": report.rows_out, "denoising": report.denoising_seconds}


OURS, ONE_ACTOR = "denoise-batch infer", "denoise-batch infer --workers 1"
CONTENDERS = {"loop": loop, "stock Ray Data": stock, "Daft": daft, OURS: ours}
RUNS = {**CONTENDERS, ONE_ACTOR: partial(ours, workers=1)}


def _network(case: Case) -> Any:
    import torch

    from denoise_batch.bundle import read_bundle
    from denoise_batch.denoiser import lower_precision
    from denoise_batch.precision import Precision
    from denoise_batch.process.freed_memory import keep_freed_memory

    network = read_bundle(case.model).load("cpu")
    if case.others == "plain":
        return network
    if case.others == "alike":
        keep_freed_memory()
        lower_precision(network, Precision.AUTO, torch.device("cpu"))
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _rows(out: Path) -> int:
    import pyarrow.dataset as ds

    return int(ds.dataset(out).count_rows())


# --- the raw forward pass --------------------------------------------------------------------------------------------


def forward(model: Path, seconds: float = 6.0, batch: int | None = None) -> dict[str, float]:
    """Images/s of this process: with one thread as `infer` computes."""
    import numpy as np

    from denoise_batch.bundle import read_bundle
    from denoise_batch.denoiser import Denoiser

    denoiser = Denoiser(read_bundle(model), device="cpu", threads=1, batch=batch)
    noisy = np.divide(noisy_digits(4096, 0)[0], np.float32(255))
    denoiser(noisy)
    begun, images = time.monotonic(), 0
    while time.monotonic() - begun < seconds:
        denoiser(noisy)
        images += len(noisy)
    return {"rate": images / (time.monotonic() - begun)}


def forward_of_seed(_: Path) -> dict[str, float]:
    """The same of the original article's network: float32, channels last, at the fastest of the batches tried."""
    from denoise_batch.bundle import SHIPPED_FOLDER

    return forward(SHIPPED_FOLDER.with_name("seed"), batch=128)


def forward_as_it_comes(model: Path, seconds: float = 6.0) -> dict[str, float]:
    """Images/s of one process with all cores: eager, float32, contiguous."""
    import torch

    from denoise_batch.bundle import read_bundle

    network = read_bundle(model).load("cpu")
    batch = torch.from_numpy(noisy_digits(BATCH, 0)[0]).view(-1, 1, 28, 28) / 255
    with torch.inference_mode():
        network(batch)
        begun, images = time.monotonic(), 0
        while time.monotonic() - begun < seconds:
            network(batch)
            images += BATCH
    return {"rate": images / (time.monotonic() - begun)}


FORWARDS = {
    "as infer computes": forward,
    "the seed's network, channels last": forward_of_seed,
    "as it comes": forward_as_it_comes,
}


def forward_rate(name: str, model: Path) -> float:
    """Of as many processes at a time as that way takes."""
    count = 1 if name == "as it comes" else CORES
    command = [sys.executable, __file__, "--run", name, "--model", str(model), "--paths", ".", "."]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    answers = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), name
    return sum(float(json.loads(answer.splitlines()[-1])["rate"]) for answer in answers)


def timed(name: str, source: Path, out: Path, rows: int, case: Case) -> tuple[float, float]:
    """Seconds of a contender's whole run in a process of its own, and without its start-up; `out` is deleted again."""
    options = ["--layout", case.layout, "--compression", case.compression, "--others", case.others]
    options += ["--model", str(case.model)]
    command = [sys.executable, __file__, "--run", name, *options, "--paths", str(source), str(out)]
    begun = time.monotonic()
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds = time.monotonic() - begun
    found = json.loads(answer.splitlines()[-1])
    assert found["rows"] == rows, (name, found)
    shutil.rmtree(out)
    return seconds, found["denoising"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layout", choices=("binary", "list", "encoded"), default="binary")
    parser.add_argument("--compression", choices=("zstd", "lz4", "snappy", "none"), default="zstd")
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS), help="of the contenders")
    parser.add_argument("--others", choices=OTHERS, default="alike", help="how they compute")
    parser.add_argument("--model", type=Path, help="model folder; default: the one that ships")
    parser.add_argument("--run", choices=[*RUNS, *FORWARDS], help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from denoise_batch.bundle import find_bundle

    model = find_bundle(arguments.model).folder.absolute()
    case = Case(model, arguments.layout, arguments.compression, arguments.others)
    if arguments.run:
        run = arguments.run
        found = FORWARDS[run](model) if run in FORWARDS else RUNS[run](*arguments.paths, case)
        print(json.dumps(found))
        return
    names = [name for name in CONTENDERS if name in arguments.only]
    if importlib.util.find_spec("daft") is None and "Daft" in names:
        names.remove("Daft")
    with tempfile.TemporaryDirectory(prefix="pipelines-") as folder:
        source, out = Path(folder, "in"), Path(folder, "out")
        draw(source, arguments.rows, case.layout, case.compression)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        denoising: dict[str, list[float]] = {name: [] for name in names}
        raw: dict[str, list[float]] = {name: [] for name in FORWARDS}
        for _ in range(arguments.repeats):
            for name in FORWARDS:
                raw[name].append(forward_rate(name, model))
            for name in names:
                whole, inner = timed(name, source, out, arguments.rows, case)
                seconds[name].append(whole)
                denoising[name].append(inner)
                print(f"{name}: {seconds[name][-1]:.1f} s, start-up apart {denoising[name][-1]:.1f} s", file=sys.stderr)
    print(
        f"{arguments.rows:,} digits of uint8, {case.layout} layout, {case.compression}; model {model.name}; "
        f"the others compute {OTHERS[case.others]}; {machine()}; ",
        end="",
    )
    print(f"medians of {arguments.repeats}")
    rates = ", ".join(f"{name} {statistics.median(found):,.0f} images/s" for name, found in raw.items())
    print(f"raw forward: {rates}\n")
    print(
        "| run | whole run, s | images/s, whole run | images/s, start-up apart | of raw forward | ours is faster by |"
    )
    print("|---|---|---|---|---|---|")
    base = statistics.median(seconds[OURS]) if OURS in seconds else float("nan")
    for name in names:
        whole, inner = statistics.median(seconds[name]), statistics.median(denoising[name])
        share = arguments.rows / inner / statistics.median(raw["as infer computes"])
        print(
            f"| {name} | {whole:.1f} | {arguments.rows / whole:,.0f} | {arguments.rows / inner:,.0f} "
            f"| {share:.2f} | {whole / base:.2f} × |"
        )


def noisy_digits(count: int, start: int) -> tuple[Any, Any]:
    """Drawn digits with the seed's noise, clipped to 8 bits: (count, 784) uint8, and which digits they are."""
    import torch

    from denoise_batch.digits import draw_digits
    from denoise_batch.noise import NoiseRecipe

    clean, labels = draw_digits(count, 0, start)
    generator = torch.Generator().manual_seed(start)
    noisy, _, _ = NoiseRecipe(clipped=1.0).apply(torch.from_numpy(clean).float() / 255, generator)
    return (noisy * 255).round().to(torch.uint8).reshape(-1, 784).numpy(), labels


def draw(folder: Path, rows: int, layout: str, compression: str) -> None:
    """Noisy digits in files of 131,072 rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for start in range(0, rows, 131_072):
        pixels, labels = noisy_digits(min(131_072, rows - start), start)
        table = pa.table({"label": pa.array(labels), "image": column_of(pixels, layout)})
        path, options = folder / f"{start:09d}.parquet", {"compression": compression, "use_dictionary": ["label"]}
        pq.write_table(table, path, row_group_size=ROW_GROUP, **options)


def machine() -> str:
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
