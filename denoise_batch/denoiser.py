"""A model made ready to run: pixels in, denoised pixels out, on one device, in batches that suit it.

denoiser = Denoiser(bundle, device="auto", threads=1)
clean = denoiser(noisy)          # (n, 784) floats or uint8 → (n, 784) float32
clean = denoiser.run(noisy, ExtraColumns(quality=True)).psnr    # the same, and what the model says of it
shown = denoiser.denoise(pixels, Polarity.LIGHT_ON_DARK, "uint8").pixels    # a column's pixels → a column's pixels
"""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from denoise_batch.errors import FlagError, ResourceExhausted, first_line
from denoise_batch.extra_columns import NO_EXTRAS, Denoised, ExtraColumns
from denoise_batch.forward import MOST_ROWS, not_a_number
from denoise_batch.images import FAR_OUTSIDE, Polarity, from_model_output, to_model_input
from denoise_batch.images.buffers import peaks_of
from denoise_batch.models.cuda_pass import FINITE, CudaPass
from denoise_batch.models.fitting import AT_A_TIME, AT_A_TIME_ON_GPU, Candidates, fits, seen, told
from denoise_batch.models.scans import may_have_little_noise
from denoise_batch.precision import Precision
from denoise_batch.process.cores import threads_here
from denoise_batch.process.freed_memory import keep_freed_memory

if TYPE_CHECKING:
    from torch import Tensor

    from denoise_batch.bundle import Bundle
    from denoise_batch.models.network import DenoisingNetwork

DEVICES: Final = ("auto", "cpu", "cuda")
CPU_BATCH = 256  # activations of 256 images stay near the core, and are blocks that `freed_memory` keeps
INTEGER_BATCH = 1024  # whose activations take a quarter of the bytes
CUDA_BATCH = MOST_ROWS  # fills a GPU

Noisy = NDArray[np.uint8] | NDArray[np.floating[Any]]

_SHAPES: Final = ((784,), (28, 28), (1, 28, 28))  # of one image
_MAY_BE_FITTED: Final = "may be fitted"
"""Name of the mask (n,) of the images that may have little noise."""

_GPU: Final = threading.Lock()
"""A pass's buffers are one thread's at a time, and of a process only one thread may record a graph."""

_FULL: Final = (
    "CUDA error: out of memory",
    "[CUDA]: out of memory",  # Triton's
    "_ALLOC_FAILED",
    "_ALLOCATION_FAILED",  # of cuDNN from 9 on
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its own memory could not be had; a broken driver says the same at batch 1
    "CUDNN_STATUS_NOT_INITIALIZED",
)


class Denoiser:
    """A loaded model. Several threads may use it; on a GPU one waits for the other.

    A process that is forked off one in which torch has computed anything with several threads, if only to make a
    `Denoiser`, hangs in its first pass: make it after the fork, in each process. One in integers cannot be pickled.

    Args:
        bundle: the model folder.
        device: `auto` (a GPU where there is one), `cpu` or `cuda`.
        threads: CPU threads, no more than it may run at once; None leaves torch's own choice.
        batch: images a forward pass, 1 at least; None takes one that suits the device. On a GPU it is halved, and
            stays so, when memory runs out.
        precision: of the arithmetic, in networks that are made for less than float32.
        fit: whether images with little noise are fitted to their scans (`models.data_consistency`), where the model's
            are blurred digits.

    Raises:
        FlagError: `cuda` was asked for and there is none.
        ModelError: the weights do not fit.
        ResourceExhausted: the GPU has no memory for them.
        ValueError: the batch is below 1; another device or precision.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "auto",
        threads: int | None = None,
        batch: int | None = None,
        precision: Precision = Precision.AUTO,
        fit: bool = True,
    ) -> None:
        if batch is not None and batch < 1:
            raise ValueError(f"a batch of {batch} images; at least 1")
        if device not in DEVICES:  # "cuda:1" too: which GPU is the current one, CUDA_VISIBLE_DEVICES says
            raise ValueError(f"device {device!r}: one of {', '.join(DEVICES)}")
        precision = Precision(precision)
        if threads is not None:
            torch.set_num_threads(threads_here(threads))
        if device == "cuda" and not torch.cuda.is_available():
            raise FlagError("--device cuda: no CUDA device here", hint="give --device cpu or auto")
        self.device = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        keep_freed_memory()  # pixels alone, which a GPU's worker takes and frees, cost 0.2 µs a row without
        # Channels last is the order that both oneDNN and cuDNN compute in; it halves the time of small networks.
        try:
            if self.device.type == "cuda":  # by number: which is the current one, each thread says for itself
                self.device = torch.device("cuda", torch.cuda.current_device())
            # Whatever default device the caller has set, and with none of the random numbers that it would draw next.
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                model = bundle.load(str(self.device)).eval()
                lower_precision(model, precision, self.device)
            self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        except RuntimeError as error:
            if gpu_is_full(error):
                raise _no_memory() from error
            # Of a GPU that this PyTorch has no kernels for, or that another process has for itself.
            if self.device.type == "cuda" and "CUDA error" in str(error):
                raise FlagError(
                    f"the GPU cannot be used: {first_line(error)}",
                    hint="give --device cpu, or install the PyTorch for this GPU and its driver",
                ) from error
            raise
        on_cpu = INTEGER_BATCH if self.model.computes_in_integers else CPU_BATCH
        self._bundle = bundle
        self._most_blur = bundle.most_blur if fit else None
        self.batch = batch or (CUDA_BATCH if self.device.type == "cuda" else on_cpu)
        self._passes: dict[tuple[str, str, Polarity, ExtraColumns], CudaPass] = {}

    @property
    def fingerprint(self) -> str:
        """What the last bits of the pixels depend on beside the model and the batches' make-up."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _cpu_name()
        types = {str(weight.dtype).removeprefix("torch.") for weight in self.model.parameters()}
        types |= {"int8"} if self.model.computes_in_integers else set()
        types |= {"own kernels"} if self.model.computes_in_own_kernels else set()
        how = ", ".join(sorted(types))
        return f"{name}; {how}; threads {torch.get_num_threads()}; batch {self.batch}; torch {torch.__version__}"

    def __call__(self, noisy: Noisy) -> NDArray[np.float32]:
        """Denoises n images, which may be none.

        Args:
            noisy: (n, 784), (n, 28, 28) or (n, 1, 28, 28), floats (background 0, ink 1, not clipped) or uint8 0..255.

        Returns:
            (n, 784) float32 in 0..1; an image with a value that is not finite becomes NaN and changes no other.

        Raises:
            ValueError: no plain array, another shape, other integers, or floats that as a whole are no 0..1.
            ResourceExhausted: the GPU has no memory for a single image.
        """
        return self.run(noisy).pixels

    def run(self, noisy: Noisy, extras: ExtraColumns = NO_EXTRAS) -> Denoised:
        """Denoises as a call does, and gives what else is asked for, out of the same forward pass.

        Raises:
            FlagError: the model does not say it (`ExtraColumns.check`).
            ValueError, ResourceExhausted: as a call does.
        """
        extras.check(self._bundle)
        pixels = _rows(noisy)
        peaks = peaks_of(pixels) if pixels.dtype.kind == "f" else np.zeros(len(pixels), np.float32)
        finite = np.isfinite(peaks)
        if finite.any() and np.median(peaks[finite]) > FAR_OUTSIDE:
            raise ValueError(f"values up to {peaks[finite].max():.6g}: floats are 0..1, uint8 is 0..255")
        made = self._run(pixels, Polarity.LIGHT_ON_DARK, "float32", extras)
        made.pop(FINITE)
        for array in made.values():  # some networks make numbers of it, of one's neighbours or of infinity
            array[~finite] = np.nan
        return Denoised(**made)

    def denoise(
        self, pixels: NDArray[Any], polarity: Polarity, dtype: str, extras: ExtraColumns = NO_EXTRAS
    ) -> Denoised:
        """Denoises pixels as they stand in a column. Bind `extras`, and it is a `forward.Forward`.

        Raises:
            ValueError: the polarity is AUTO or EACH; another shape or type than decoded pixels have.
            DenoiseBatchError: the model gave a pixel that is not a number.
            ResourceExhausted: the GPU has no memory for a single image.
        """
        if polarity in (Polarity.AUTO, Polarity.EACH):
            raise ValueError(f"the images are to be of one polarity, not {polarity.value!r}: find_polarity, turned")
        made = self._run(_rows(pixels), polarity, dtype, extras)
        if not made.pop(FINITE).all():
            raise not_a_number()
        return Denoised(**made)

    def prepare(self, taken: str, polarity: Polarity, dtype: str, extras: ExtraColumns = NO_EXTRAS) -> None:
        """Has a GPU ready for pixels of type `taken`, `uint8` or `float32`, before the first come; a CPU is.

        Raises:
            ResourceExhausted: the GPU has no memory for a single image.
        """
        if self.device.type == "cuda":
            line = np.zeros((28, 28), np.float32)
            line[5:23, 11:16] = (0.1, 0.6, 1.0, 0.6, 0.1)  # which is blurred, so that it is fitted as well
            lines = np.broadcast_to(line.ravel(), (self.batch, 784))
            self._run(from_model_output(lines, polarity, taken), polarity, dtype, extras)

    def _run(
        self, pixels: NDArray[Any], polarity: Polarity, dtype: str, extras: ExtraColumns
    ) -> dict[str, NDArray[Any]]:
        """`Denoised`'s fields and FINITE of (n, 784) pixels, in as many passes as it takes."""
        count, start = len(pixels), 0
        if pixels.dtype != np.uint8:
            with np.errstate(over="ignore"):  # infinite then, and so is what comes of it
                pixels = pixels.astype(np.float32, copy=False)
        if not count:
            pixels = np.zeros((1, 784), pixels.dtype)  # for the shapes
        made: dict[str, NDArray[Any]] = {}
        waiting: list[Candidates] = []
        on_gpu = self.device.type == "cuda"
        alone = _GPU if on_gpu else contextlib.nullcontext()
        own = torch._C.DisableTorchFunction()  # no default device; `torch.device` would take time in each operation
        # What a caller has set for arithmetic of its own would change pixels.
        with alone, own, torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            while start < len(pixels):
                part = pixels[start:] if on_gpu else pixels[start : start + self.batch]
                try:
                    if on_gpu:
                        answer = self._on_gpu(part, dtype, polarity, extras)
                    else:
                        answer, may = self._on_cpu(part, dtype, polarity, extras)
                        waiting += [one._replace(rows=one.rows + start) for one in may]
                    if len(part) == len(pixels):
                        made = answer
                    else:
                        _fill(made, answer, start, len(pixels))
                    start += len(part)
                    if sum(len(one.rows) for one in waiting) >= AT_A_TIME:
                        self._fit(waiting, made, dtype, polarity)
                        waiting = []
                    continue
                except RuntimeError as error:
                    if not gpu_is_full(error):
                        raise
                    tried = self.batch if on_gpu else len(part)
                    if tried <= 1:
                        raise _no_memory() from error
                # After it, because the error holds the frames that hold the memory.
                self.batch = tried // 2
                self._passes.clear()
                torch.cuda.empty_cache()
            self._fit(waiting, made, dtype, polarity)
        return {name: value[:count] for name, value in made.items()}

    def _on_cpu(
        self, pixels: NDArray[Any], dtype: str, polarity: Polarity, extras: ExtraColumns
    ) -> tuple[dict[str, NDArray[Any]], list[Candidates]]:
        """What the network gives, and what it keeps of the images that may be fitted."""
        images = _images(pixels, polarity, self.device)
        if self._most_blur is None:
            return _shown(forward_pass(self.model, extras, images), polarity, dtype), []
        may = may_have_little_noise(images[:, 0]).nonzero()[:, 0]
        made, candidates = seen(self.model, images, may, extras)
        return _shown(made, polarity, dtype), [candidates] if len(may) else []

    def _on_gpu(
        self, pixels: NDArray[Any], dtype: str, polarity: Polarity, extras: ExtraColumns
    ) -> dict[str, NDArray[Any]]:
        made = self._pass(str(pixels.dtype), dtype, polarity, extras)(pixels)
        may = made.pop(_MAY_BE_FITTED, np.zeros(0, bool)).nonzero()[0]
        most = min(self.batch, AT_A_TIME_ON_GPU)
        for start in range(0, len(may), most):  # by themselves: how many there are no graph can know
            rows = may[start : start + most]
            with torch.cuda.device(self.device):  # the thread's own may be another
                # Sizes that come again: libraries choose their ways anew for each.
                images = _images(pixels[np.resize(rows, power_of_two(len(rows)))], polarity, self.device)
                here = torch.arange(len(rows), device=images.device)
                _, candidates = seen(self.model, images, here, extras)
                self._fit([candidates._replace(rows=rows)], made, dtype, polarity)
        return made

    def _fit(self, waiting: list[Candidates], made: dict[str, NDArray[Any]], dtype: str, polarity: Polarity) -> None:
        """Fits images to their scans, and puts what comes of them where the network's are.

        Args:
            waiting: of parts of the images; numbers are those of the rows in `made`.
            made: `Denoised`'s fields and FINITE.
        """
        if not waiting:
            return
        assert self._most_blur is not None  # nothing waits else
        for fitted in fits(waiting, self._most_blur):
            for name, array in _shown({"pixels": fitted.pixels}, polarity, dtype).items():
                made[name][fitted.rows] = array
            if "psnr" in made:
                made["psnr"][fitted.tried] = fitted.psnr.cpu().numpy()

    def _pass(self, taken: str, given: str, polarity: Polarity, extras: ExtraColumns) -> CudaPass:
        """The GPU's pass for pixels of this form, made when it is first asked for."""
        form = (taken, given, polarity, extras)
        if form not in self._passes:
            self._passes[form] = CudaPass(
                partial(forward_pass, self.model, extras, marks=self._most_blur is not None),
                self.device,
                self.batch,
                taken=getattr(torch, taken),
                given=getattr(torch, given),
                dark_on_light=polarity is Polarity.DARK_ON_LIGHT,
            )
        return self._passes[form]


def forward_pass(
    model: DenoisingNetwork, extras: ExtraColumns, images: Tensor, *, marks: bool = False
) -> dict[str, Tensor]:
    """One pass of (n, 1, 28, 28) float32 images; `Denoised`'s fields, and which may be fitted where `marks`."""
    if marks:
        return forward_pass(model, extras, images) | {_MAY_BE_FITTED: may_have_little_noise(images[:, 0])}
    if extras.code:
        code = model.code(images)
        clean = torch.sigmoid(model.decode(code).float())
        return {"pixels": clean.reshape(-1, 784), "code": code.flatten(1)}
    if extras.quality:
        outputs = model.outputs(images)
        assert outputs.quality is not None  # `ExtraColumns.check`
        return {"pixels": outputs.clean.reshape(-1, 784)} | told(outputs.quality)
    return {"pixels": model(images).reshape(-1, 784)}


def power_of_two(count: int) -> int:
    """The smallest from 64 on that is not below a count."""
    return max(64, 1 << (count - 1).bit_length())


def _rows(images: object) -> NDArray[Any]:
    """Images of any of the shapes → (n, 784); ValueError where they are anything else."""
    if isinstance(images, np.ma.MaskedArray):
        raise ValueError("images are floats or uint8, not a masked array: fill in what is masked")
    if not isinstance(images, np.ndarray) or isinstance(images, np.matrix):
        raise ValueError(f"images are a NumPy array, (n, 784) floats or uint8, not {type(images).__name__}")
    if images.shape[1:] not in _SHAPES or (images.dtype != np.uint8 and images.dtype.kind != "f"):
        raise ValueError(f"images are (n, 784) floats or uint8, not {images.shape} {images.dtype}")
    return images.reshape(len(images), 784)


def _images(pixels: NDArray[Any], polarity: Polarity, device: torch.device) -> Tensor:
    """(n, 784) pixels as they stand in a column → (n, 1, 28, 28) float32 on the device, 0 = background."""
    noisy = np.ascontiguousarray(to_model_input(pixels, polarity))
    return torch.from_numpy(noisy if noisy.flags.writeable else noisy.copy()).view(-1, 1, 28, 28).to(device)


def _shown(made: dict[str, Tensor], polarity: Polarity, dtype: str) -> dict[str, NDArray[Any]]:
    """`Denoised`'s fields as a column has them, and FINITE."""
    arrays: dict[str, NDArray[Any]] = {name: value.cpu().numpy() for name, value in made.items()}
    finite = np.isfinite(arrays["pixels"]).all(axis=1)
    with np.errstate(invalid="ignore"):  # what is not finite is refused in the end
        # The column's numbers are made of a batch while it is near the core.
        shown = from_model_output(arrays["pixels"], polarity, dtype)
    return arrays | {"pixels": shown, FINITE: finite}


def _fill(whole: dict[str, NDArray[Any]], part: dict[str, NDArray[Any]], start: int, count: int) -> None:
    """Puts a part's rows where they belong in arrays of `count` rows, which the first part makes."""
    for name, rows in part.items():
        if name not in whole:
            whole[name] = np.empty((count, *rows.shape[1:]), rows.dtype)
        whole[name][start : start + len(rows)] = rows


def lower_precision(model: DenoisingNetwork, precision: Precision, device: torch.device) -> None:
    """Makes a network that has its weights compute as `precision` says, where it is made for that."""
    if precision.int8(device):
        model.to_int8()
    if precision.bfloat16(device):
        model.to_bfloat16()
    if device.type == "cuda":
        # Or convolutions in float32, all of the seed's among them, would have 10 of its 23 bits.
        torch.backends.cudnn.allow_tf32 = False


def gpu_is_full(error: RuntimeError) -> bool:
    """Whether it is for want of a GPU's memory, or of pinned memory; libraries beside PyTorch have no class for it."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(said in str(error) for said in _FULL)


def _no_memory() -> ResourceExhausted:
    return ResourceExhausted(
        "the GPU's memory is full: there is none left for the model and one image",
        hint="stop what else uses the GPU, or give --device cpu, then run the same command again to go on",
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 (a plain read, line by line)
            for line in file:
                if line.startswith("model name"):
                    return f"{line.partition(':')[2].strip()} {torch.backends.cpu.get_cpu_capability()}"
    except OSError:
        pass
    return f"CPU {torch.backends.cpu.get_cpu_capability()}"
