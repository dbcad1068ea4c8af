"""A model's pass on a GPU, as CUDA graphs over fixed buffers: a column's pixels in, the new column's pixels out.

Bytes go over the bus as they stand in the column, uint8 where it can be; what `to_model_input` and `from_model_output`
do on a CPU is done on the GPU, to the same bits. Each part of the images passes three streams: copied in from pinned
memory, computed, copied out to pinned memory. There are two sets of buffers, so that the copies of one part overlap the
computation of the other. A small network is bound by the launches of its kernels, so these are recorded once, as a
graph, and launched as one.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    Compute = Callable[[Tensor], dict[str, Tensor]]

FINITE = "finite"
"""Name of the mask (n,) of the images all of whose pixels are numbers: uint8 would hide the others."""

_SMALLEST = 64  # images of the smallest graph
_WARM_UPS = 2  # passes before a graph is recorded: libraries choose their ways and take their work space in the first
_PARTS = 2  # that are under way at a time


class CudaPass:
    """One model's pass over pixels of one form.

    Graphs are recorded for `batch`, its half, its quarter and so on, each when it is first needed. What is left over at
    the end takes the smallest that holds it; rows beyond are computed and ignored.

    Args:
        compute: (n, 1, 28, 28) float32 on the device, 0 = background → (n, ...) tensors by name, `pixels` (n, 784)
            float32 in 0..1 among them. Must not wait for the device: where it does, it is run without a graph, and a
            RuntimeWarning says so.
        batch: the most images at a time.
        taken, given: types of the pixels in and out, uint8 or float32.
        dark_on_light: polarity of the pixels in and out.

    Raises:
        torch.cuda.OutOfMemoryError: when it is made and when it is called. It must not be used again then.
    """

    def __init__(
        self,
        compute: Compute,
        device: torch.device,
        batch: int,
        *,
        taken: torch.dtype,
        given: torch.dtype,
        dark_on_light: bool,
    ) -> None:
        self.batch = batch
        self.eager = False
        self._compute, self._given, self._dark_on_light = compute, given, dark_on_light
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        with torch.inference_mode(), torch.cuda.device(device):
            # Copies in, computation, copies out.
            self._streams = (_stream(), _stream(), _stream())
            self._pool = torch.cuda.graph_pool_handle()
            # A tensor on the device: by a plain number PyTorch multiplies with its reciprocal, and 255 is not 1 then.
            self._full = torch.full((), 255.0, device=device)
            # The graphs' own input and output, whatever their size: parts' buffers are copied to and from these.
            self._noisy = torch.zeros(batch, 784, dtype=taken, device=device)
            shapes = self._pass(1)
            self._made = {
                name: torch.empty(batch, *value.shape[1:], dtype=value.dtype, device=device)
                for name, value in shapes.items()
            }
            self._parts = [_Part(self._noisy, self._made) for _ in range(_PARTS)]
            torch.cuda.synchronize()  # the streams do not wait for what made the buffers

    def __call__(self, pixels: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """(n, 784) pixels → (n, ...) arrays by name: what `compute` names, the pixels as asked for, and FINITE."""
        made = {
            name: np.empty((len(pixels), *value.shape[1:]), part.dtype)
            for (name, value), part in zip(self._made.items(), self._parts[0].made_arrays.values(), strict=True)
        }
        with torch.inference_mode(), torch.cuda.device(self._noisy.device):
            for number, start in enumerate(range(0, len(pixels), self.batch)):
                part = self._parts[number % _PARTS]
                part.collect()
                chosen = slice(start, start + self.batch)
                self._start(part, pixels[chosen], {name: array[chosen] for name, array in made.items()})
            for part in self._parts:
                part.collect()
        return made

    def _start(self, part: _Part, pixels: NDArray[Any], into: dict[str, NDArray[Any]]) -> None:
        """Queues one part on the streams; `part.collect` waits for it."""
        rows, size = len(pixels), self._size(len(pixels))
        graph = self._graph(size)
        copying_in, computing, copying_out = self._streams
        np.copyto(part.noisy_array[:rows], pixels)
        with torch.cuda.stream(copying_in):
            part.noisy[:rows].copy_(part.noisy_host[:rows], non_blocking=True)
            part.copied.record()
        with torch.cuda.stream(computing):
            computing.wait_event(part.copied)
            self._noisy[:rows].copy_(part.noisy[:rows])
            if graph is None:
                self._fill(size)
            else:
                graph.replay()
            for name, value in self._made.items():
                part.made[name][:rows].copy_(value[:rows])
            part.computed.record()
        with torch.cuda.stream(copying_out):
            copying_out.wait_event(part.computed)
            for name, value in part.made.items():
                part.made_host[name][:rows].copy_(value[:rows], non_blocking=True)
            part.done.record()
        part.into = into

    def _size(self, rows: int) -> int:
        size = self.batch
        while size // 2 >= max(rows, _SMALLEST):
            size //= 2
        return size

    def _graph(self, size: int) -> torch.cuda.CUDAGraph | None:
        """The graph of so many images, recorded where it is not yet; None where the model cannot be recorded."""
        if size in self._graphs or self.eager:
            return self._graphs.get(size)
        computing = self._streams[1]
        torch.cuda.synchronize()
        with torch.cuda.stream(computing):
            for _ in range(_WARM_UPS):
                self._fill(size)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile. The outer stream is left whatever the recording's end does.
            with (
                undisturbed(),
                torch.cuda.stream(computing),
                torch.cuda.graph(graph, self._pool, computing, capture_error_mode="thread_local"),
            ):
                self._fill(size)
        except Exception as error:  # for want of memory too, which the passes before had: they do without a graph
            self.eager = True
            end_of_recording(self._noisy.device, self._pool)
            warnings.warn(f"the model cannot be recorded as a CUDA graph: {error}", RuntimeWarning, stacklevel=2)
            return None
        self._graphs[size] = graph
        return graph

    def _fill(self, size: int) -> None:
        for name, value in self._pass(size).items():
            self._made[name][:size].copy_(value)

    def _pass(self, size: int) -> dict[str, Tensor]:
        """Computes the first images of the graphs' input."""
        noisy = self._noisy[:size]
        if noisy.dtype == torch.uint8:
            noisy = noisy.to(torch.float32) / self._full
        if self._dark_on_light:
            noisy = 1.0 - noisy
        made = self._compute(noisy.view(size, 1, 28, 28))
        pixels = made["pixels"]
        finite = torch.isfinite(pixels).all(dim=1)
        if self._dark_on_light:
            pixels = 1.0 - pixels
        if self._given == torch.uint8:
            pixels = (pixels * 255.0).round_().clamp_(0.0, 255.0).to(torch.uint8)
        return made | {"pixels": pixels, FINITE: finite}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keeps Python from collecting garbage: a graph that is destroyed while another is recorded spoils it."""
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def end_of_recording(device: torch.device, pool: Any) -> None:
    """After a recording that failed: else PyTorch takes it for under way, and never gives memory back again."""
    with contextlib.suppress(AttributeError, RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index or 0, pool)


class _Part:
    """The buffers of one part that is under way, on the device and pinned in memory, and what is waited for."""

    def __init__(self, noisy: Tensor, made: dict[str, Tensor]) -> None:
        self.noisy = torch.empty_like(noisy)
        self.noisy_host = _pinned(noisy)
        self.made = {name: torch.empty_like(value) for name, value in made.items()}
        self.made_host = {name: _pinned(value) for name, value in made.items()}
        self.noisy_array: NDArray[Any] = self.noisy_host.numpy()
        self.made_arrays: dict[str, NDArray[Any]] = {name: host.numpy() for name, host in self.made_host.items()}
        self.copied, self.computed = _event(), _event()
        # Without `blocking` the wait would keep a core busy, which other workers want.
        self.done = _event(blocking=True)
        self.into: dict[str, NDArray[Any]] = {}

    def collect(self) -> None:
        """Waits for the part, if it is under way, and hands over what was made."""
        if self.into:
            self.done.synchronize()
            for name, array in self.into.items():
                np.copyto(array, self.made_arrays[name][: len(array)])
            self.into = {}


def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _event(*, blocking: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(blocking=blocking)  # type: ignore[no-untyped-call]


def _pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
