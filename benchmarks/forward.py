"""Forward passes side by side: how fast the networks run on this machine, and what each way of running them changes.

    python benchmarks/forward.py                    # every way that is installed here, one thread and all of them
    python benchmarks/forward.py --device cuda

Ways: PyTorch as it comes (eager, contiguous), channels last, bfloat16 autocast; networks made for less than float32 as
`infer` runs them, with `--precision bfloat16`, and so with additions and ReLUs apart from the products
(`models.fused_layers`); torch.compile, ONNX Runtime, OpenVINO (`pip install onnxruntime openvino onnx`, for this
alone); on a GPU also as a CUDA graph, and with uint8 pixels in and out, as `infer` has it. Each at several batch sizes,
the best one shown. The ways take turns, so that a machine whose speed drifts treats all alike; medians. `difference` is
against eager float32 on the same drawn digits: the PSNR of one output against the other, and the largest difference in
grey levels after rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from denoise_batch import bundle
from denoise_batch.denoiser import lower_precision
from denoise_batch.digits import draw_digits
from denoise_batch.models import fused_layers
from denoise_batch.models.cuda_pass import undisturbed
from denoise_batch.noise import NoiseRecipe
from denoise_batch.precision import Precision
from denoise_batch.process.freed_memory import keep_freed_memory

BATCHES = (64, 128, 256, 512, 1024)
CUDA_BATCHES = (4096, 16_384, 65_536)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", type=Path, help="model folders; default: those that ship")
    parser.add_argument("--threads", nargs="*", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2048, help="of a timed pass; a batch, where that is larger")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--without", nargs="*", default=[], help="ways to leave out")
    options = parser.parse_args()
    folder = bundle.SHIPPED_FOLDER
    models = options.models or [folder.with_name("seed"), folder]
    batches = CUDA_BATCHES if options.device == "cuda" else BATCHES
    keep_freed_memory()
    noisy = _noisy(max(options.images, batches[-1])).to(options.device)
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"{time.strftime('%Y-%m-%d')}: {os.cpu_count()} × {where}, torch {torch.__version__}")
    for threads in options.threads if options.device == "cpu" else [1]:
        torch.set_num_threads(threads)
        print(f"\n{threads} thread{'s' if threads > 1 else ''}\n")
        print("| network | way | batch | images/s | against the seed's, as it comes | difference |")
        print("|---|---|---|---|---|---|")
        base = 0.0
        for model in models:
            network = bundle.read_bundle(model).load(options.device)
            ways = {name: make for name, make in WAYS.items() if name not in options.without}
            base = _table(model.name, network, ways, noisy, batches, options, base)


def _table(
    name: str, network: Any, ways: dict[str, Any], noisy: torch.Tensor, batches: Any, options: Any, base: float
) -> float:
    with torch.inference_mode():
        reference = network(noisy).reshape(-1, 784)
    made: dict[tuple[str, int], Any] = {}
    for way, make in ways.items():
        for batch in batches:
            with contextlib.suppress(ImportError):
                made[way, batch] = make(network, noisy[:batch])
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in made}
    for _ in range(options.rounds):
        for (way, batch), forward in made.items():
            seconds[way, batch].append(_seconds(forward, noisy, batch, max(options.images, batch)))
    for way in ways:
        rates = {
            batch: max(options.images, batch) / statistics.median(seconds[way, batch])
            for batch in batches
            if (way, batch) in made
        }
        if not rates:
            continue
        best = max(rates, key=rates.__getitem__)
        base = base or rates[best]  # the first: the seed's network as PyTorch runs it
        outs = [made[way, best](part) for part in noisy[: max(options.images, best)].split(best) if len(part) == best]
        out = torch.cat([torch.as_tensor(part).reshape(-1, 784) for part in outs])
        # Noise beyond 0..1 is not in uint8 pixels, so that their image is another.
        difference = "" if out.dtype == torch.uint8 else _difference(out.float(), reference[: len(out)])
        print(
            f"| {name} | {way} | {best} | {rates[best]:,.0f} | {rates[best] / base:.2f} × | {difference} |", flush=True
        )
    return base


def _seconds(forward: Any, noisy: torch.Tensor, batch: int, images: int) -> float:
    forward(noisy[:batch])
    _wait(noisy)
    begun = time.perf_counter()
    for start in range(0, images - batch + 1, batch):
        forward(noisy[start : start + batch])
    _wait(noisy)
    return (time.perf_counter() - begun) * images / (images // batch * batch)


def _wait(noisy: torch.Tensor) -> None:
    if noisy.is_cuda:
        torch.cuda.synchronize()


def _difference(out: torch.Tensor, reference: torch.Tensor) -> str:
    error = float(((out - reference) ** 2).mean())
    grey = int(((out * 255).round() - (reference * 255).round()).abs().max())
    return f"{'∞' if error == 0 else f'{-10 * np.log10(error):.0f}'} dB, {grey} grey levels at most"


def _noisy(count: int) -> torch.Tensor:
    clean = torch.from_numpy(draw_digits(count, seed=0)[0]).float() / 255
    return NoiseRecipe().apply(clean, torch.Generator().manual_seed(0))[0].view(-1, 1, 28, 28)


# --- ways -------------------------------------------------------------------------------------------------------------


def as_it_comes(network: Any, _: torch.Tensor) -> Any:
    return _inferring(network.to(memory_format=torch.contiguous_format))


def channels_last(network: Any, _: torch.Tensor) -> Any:
    copy = _copy(network).to(memory_format=torch.channels_last)
    return _inferring(lambda images: copy(images.contiguous(memory_format=torch.channels_last)))


def bfloat16(network: Any, example: torch.Tensor) -> Any:
    forward = channels_last(network, example)

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            out: torch.Tensor = forward(images)
        return out

    return run


def as_infer_computes(network: Any, _: torch.Tensor) -> Any:
    return _lowered(network, Precision.AUTO)


def recorded(network: Any, example: torch.Tensor) -> Any:
    forward = _lowered(network, Precision.AUTO)
    return _recorded(lambda: forward(example), example)


def recorded_uint8(network: Any, example: torch.Tensor) -> Any:
    forward = _lowered(network, Precision.AUTO)
    pixels, full = (example.clamp(0, 1) * 255).round().to(torch.uint8), torch.full((), 255.0, device=example.device)

    def run() -> torch.Tensor:
        made: torch.Tensor = (forward(pixels.to(torch.float32) / full) * 255).round_().clamp_(0, 255).to(torch.uint8)
        return made

    return _recorded(run, example)


def _recorded(run: Any, example: torch.Tensor) -> Any:
    if not example.is_cuda:
        raise ImportError
    with torch.inference_mode(), undisturbed():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                made = run()

    def replay(_: torch.Tensor) -> torch.Tensor:  # of the images that it was recorded with, all that there are
        graph.replay()
        out: torch.Tensor = made
        return out

    return replay


def with_bfloat16(network: Any, _: torch.Tensor) -> Any:
    return _lowered(network, Precision.BFLOAT16)


def _lowered(network: Any, precision: Precision) -> Any:
    if network.float32_parts is None:
        raise ImportError  # it is float32 there: the same as channels last
    copy = _copy(network).to(memory_format=torch.channels_last)
    lower_precision(copy, precision, next(copy.parameters()).device)
    return _inferring(copy)


def layers_apart(network: Any, example: torch.Tensor) -> Any:
    forward = with_bfloat16(network, example)

    def run(images: torch.Tensor) -> torch.Tensor:
        before, fused_layers.FUSED_BFLOAT16 = fused_layers.FUSED_BFLOAT16, False
        try:
            out: torch.Tensor = forward(images)
        finally:
            fused_layers.FUSED_BFLOAT16 = before
        return out

    return run


def compiled(network: Any, example: torch.Tensor) -> Any:
    forward = torch.compile(_copy(network).to(memory_format=torch.channels_last), dynamic=False)
    run = _inferring(lambda images: forward(images.contiguous(memory_format=torch.channels_last)))
    run(example)
    return run


def compiled_bfloat16(network: Any, example: torch.Tensor) -> Any:
    forward = torch.compile(_copy(network).to(memory_format=torch.channels_last), dynamic=False)

    def run(images: torch.Tensor) -> Any:
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16):
            return forward(images.contiguous(memory_format=torch.channels_last))

    run(example)
    return run


def onnx_runtime(network: Any, example: torch.Tensor) -> Any:
    onnxruntime = _needed("onnxruntime")
    path = _exported(network, example)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"noisy": images.numpy()})[0]


def openvino(network: Any, example: torch.Tensor) -> Any:
    return _openvino(network, example, "f32")


def openvino_bfloat16(network: Any, example: torch.Tensor) -> Any:
    return _openvino(network, example, "bf16")


def _openvino(network: Any, example: torch.Tensor, precision: str) -> Any:
    ov = _needed("openvino")
    model = ov.convert_model(network, example_input=example, input=[tuple(example.shape)])
    config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    session = ov.compile_model(model, "CPU", config)
    return lambda images: session(images.numpy())[0]


WAYS = {
    "as it comes": as_it_comes,
    "channels last": channels_last,
    "bfloat16 autocast": bfloat16,
    "as infer computes": as_infer_computes,
    "the same, recorded": recorded,
    "the same, recorded, uint8": recorded_uint8,
    "the same, bfloat16": with_bfloat16,
    "the same, bfloat16, layers apart": layers_apart,
    "compiled": compiled,
    "compiled, bfloat16": compiled_bfloat16,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
    "OpenVINO, bfloat16": openvino_bfloat16,
}


def _needed(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise ImportError(name)
    return importlib.import_module(name)


def _inferring(forward: Any) -> Any:
    def run(images: torch.Tensor) -> Any:
        with torch.inference_mode():
            return forward(images)

    return run


def _copy(network: Any) -> Any:
    import copy

    return copy.deepcopy(network)


def _exported(network: Any, example: torch.Tensor) -> bytes:
    import io

    _needed("onnx")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (example,), file, input_names=["noisy"], dynamo=False)
    return file.getvalue()


if __name__ == "__main__":
    main()
