"""Model folders: read with suspicion here, written whole or not at all by `saving`.

    model.safetensors   the weights, and nothing that could be run
    model.json          what they are: network, pixel convention, noise, training, metrics, versions, SHA-256
    history.csv         a row for each epoch of the training
    curves.png          the same as a picture
    README.md           the model card
    tensorboard/        the training's curves for TensorBoard

`read_bundle` checks all that can be checked without torch: the format's version, the weights' SHA-256, and that the
header of model.safetensors says what model.json says. `Bundle.load` makes the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoise_batch.bundle.card import of_pairs
from denoise_batch.bundle.files import (
    MAX_JSON,
    MAX_WEIGHTS,
    RETRAIN,
    described,
    member,
    parse_json,
    read_file,
    read_tensors,
)
from denoise_batch.errors import ModelError, first_line

if TYPE_CHECKING:
    from denoise_batch.models.network import DenoisingNetwork

FORMAT = "denoise-batch model"
FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
MODEL_FILE = "model.json"
DEFAULT_FOLDER = Path("denoise-model")
"""Where `train` puts its model, and where other commands look first."""

SHIPPED_FOLDER = Path(__file__).parent.parent / "pretrained" / "bounds-unet"
"""The model inside the package."""

CODE_SIZES = {"seed": 128, "seed-transposed": 128}
"""`DenoisingNetwork.code_size` of the networks that have one, for those who must not load torch."""

PIXELS = {"shape": [28, 28], "dtype": "float32", "background": 0.0, "ink": 1.0, "input_clipped": False}
"""What goes into the network: floats, light on dark, noise beyond 0..1 kept. What comes out lies in 0..1."""

_MAX_PARAMETER = 1 << 16
_MOST_BLUR = 3.0  # nothing that could be made more of is left of a digit after a stronger one


@dataclass(frozen=True)
class Bundle:
    """A model folder that has been read and checked.

    Attributes:
        folder: where it is.
        architecture, parameters: of the network.
        sha256: of the weights' file, in hexadecimal.
        tensors: name → (number type as safetensors spells it, shape).
        noise, metrics: as in `BundleCard`.
        model: the whole of model.json.
    """

    folder: Path
    architecture: str
    parameters: dict[str, Any]
    sha256: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    noise: dict[str, Any]
    metrics: dict[str, Any]
    model: dict[str, Any]

    @property
    def has_quality(self) -> bool:
        """Whether the network says of each image how good its output is: it has the tensors for it."""
        return any(name.startswith("quality.") for name in self.tensors)

    @property
    def code_size(self) -> int:
        """Numbers in the network's bottleneck, where it stands for the whole image; else 0."""
        return CODE_SIZES.get(self.architecture, 0)

    @property
    def most_blur(self) -> float | None:
        """Deviation in pixels of the strongest blur that it has learnt to undo, beside noise; None where it is not
        known that its scans are blurred digits with noise, as of pairs it is not, or they are of few levels of grey, or
        the network says nothing of how sure it is."""
        sigma = self.noise.get("sigma")
        other = of_pairs(self.model) or bool(self.noise.get("few_levels"))
        if other or not self.has_quality or not isinstance(sigma, list) or len(sigma) != 2:
            return None
        most = sigma[1]
        said = isinstance(most, int | float) and not isinstance(most, bool) and most >= 0
        return float(min(most, _MOST_BLUR)) if said else None

    def load(self, device: str = "cpu") -> DenoisingNetwork:
        """Makes the network and fills in the weights.

        Returns:
            The network on the device, in eval mode, without gradients.

        Raises:
            ModelError: the weights have changed since the folder was read, or do not fit the network.
        """
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load

        from denoise_batch import models

        # The same bytes are checked and used: a file exchanged since the folder was read is found out.
        content = read_file(self.folder / WEIGHTS_FILE, MAX_WEIGHTS)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ModelError(f"{self.folder / WEIGHTS_FILE} has changed while it was used", hint=RETRAIN)
        self._check_sizes()
        with torch.device("meta"):  # shapes alone: no memory, whatever sizes model.json asks for
            made = self._build(models).state_dict()
        types = {name: "I8" if value.dtype == torch.int8 else "F32" for name, value in made.items()}
        expected = {name: described(tuple(value.shape), types[name]) for name, value in made.items()}
        found = {name: described(shape, dtype) for name, (dtype, shape) in self.tensors.items()}
        if found != expected:
            name = next(name for name in [*expected, *found] if expected.get(name) != found.get(name))
            raise ModelError(
                f"{self.folder}: network {self.architecture!r} has {name!r} as {expected.get(name, 'nothing')}, "
                f"the weights have it as {found.get(name, 'nothing')}",
                hint=RETRAIN,
            )
        network = self._build(models).float()  # whatever PyTorch's default is in this process
        try:
            network.load_state_dict(load(content), strict=True)
        except (SafetensorError, RuntimeError, KeyError) as error:
            said = f"{self.folder / WEIGHTS_FILE} cannot be loaded: {first_line(error)}"
            raise ModelError(said, hint=RETRAIN) from error
        if not all(bool(torch.isfinite(value).all()) for value in network.state_dict().values()):
            raise ModelError(f"{self.folder / WEIGHTS_FILE} holds weights that are not finite", hint=RETRAIN)
        network.requires_grad_(False)
        return network.to(device).eval()

    def _check_sizes(self) -> None:
        """A network of 10⁹ layers would take for ever to make, and cannot be that of these weights."""
        sizes = [size for _, shape in self.tensors.values() if math.prod(shape) for size in shape]
        most = min(max(len(self.tensors), *sizes, 0), _MAX_PARAMETER)
        for name, value in self.parameters.items():
            if isinstance(value, int | float) and abs(value) > most:
                raise ModelError(
                    f"{self.folder / MODEL_FILE}: {name} {value:g} is more than the weights' shapes allow",
                    hint=RETRAIN,
                )

    def _build(self, models: Any) -> DenoisingNetwork:
        try:
            network: DenoisingNetwork = models.build(self.architecture, self.parameters)
        except ModelError as error:
            raise ModelError(f"{self.folder / MODEL_FILE}: {error.message}", hint=RETRAIN) from error
        except (RuntimeError, MemoryError, OverflowError, AttributeError) as error:
            raise ModelError(
                f"{self.folder / MODEL_FILE}: network {self.architecture!r} cannot be made from {self.parameters}",
                hint=RETRAIN,
            ) from error
        return network


# --- writing ----------------------------------------------------------------------------------------------------------


def find_bundle(explicit: Path | None = None) -> Bundle:
    """The model to use: the one named, else ./denoise-model, else the one that ships inside the package.

    Args:
        explicit: a folder, or the name of a model that ships.

    Raises:
        ModelError: that one is missing or unfit. A folder that exists but is unfit is never passed over.
    """
    if explicit is not None:
        _check_not_hidden(Path(explicit))
        return read_bundle(shipped_folder(explicit) or explicit)
    if DEFAULT_FOLDER.exists() or DEFAULT_FOLDER.is_symlink():
        return read_bundle(DEFAULT_FOLDER)
    if not SHIPPED_FOLDER.exists():
        raise ModelError(
            f"no model: there is no {DEFAULT_FOLDER} here and none ships with this installation",
            hint="train one with `denoise-batch train`, or name one with --model",
        )
    return read_bundle(SHIPPED_FOLDER)


def few_levels_bundle(default: Bundle) -> Bundle | None:
    """The model that ships for scans of few levels of grey; None where another default than ours was found."""
    folder = SHIPPED_FOLDER.with_name("few-levels")
    return read_bundle(folder) if default.folder == SHIPPED_FOLDER and folder.exists() else None


def shipped_folder(name: Path) -> Path | None:
    """Where the model lies that ships under this name; None where none does, or a folder here has it, or will."""
    name = Path(name)
    folder = SHIPPED_FOLDER.with_name(name.name or "none")
    with contextlib.suppress(OSError):  # a name that no folder can have
        if len(name.parts) != 1 or not (folder / MODEL_FILE).is_file() or name.exists() or name.is_symlink():
            return None
        return None if is_in_training(name) else folder
    return None


def _check_not_hidden(name: Path) -> None:
    """Refuses a folder that is no model, but hides one that ships with us, by its name."""
    found = os.path.isdir(name)  # noqa: PTH112 (no error for any name)
    if len(name.parts) == 1 and found and not (name / MODEL_FILE).exists() and not is_in_training(name):
        ships = SHIPPED_FOLDER.with_name(name.name)
        if (ships / MODEL_FILE).is_file():
            raise ModelError(
                f"model folder {name}: {name / MODEL_FILE} is missing",
                hint=f"the folder {name} here hides the model that ships with us: rename it, or give --model {ships}",
            )


def training_folder(output: Path) -> Path:
    """Where `train` keeps a model folder until it is finished."""
    return output.with_name(f".{output.name}.training")


def is_in_training(folder: Path) -> bool:
    """Whether `train` has begun it, and not finished."""
    return os.path.isdir(training_folder(folder))  # noqa: PTH112 (no error for any name)


def read_bundle(folder: Path) -> Bundle:
    """Reads a model folder and checks it, without torch.

    Raises:
        ModelError: it is missing, damaged, tampered with or of another version; says which file and why.
    """
    folder = Path(folder) if Path(folder) != Path() else Path.cwd()  # `.` is no name for an error to show
    try:
        kind = folder.stat().st_mode
    except OSError as error:
        broken = isinstance(error, FileNotFoundError) and folder.is_symlink()
        reason = "is a link to nothing" if broken else (error.strerror or str(error)).lower()
        hint = "train one with `denoise-batch train`, or name another with --model"
        if is_in_training(folder):
            hint = "its training is unfinished: the same `denoise-batch train` command goes on with it"
        raise ModelError(f"model folder {folder}: {reason}", hint=hint) from error
    if not stat.S_ISDIR(kind):
        raise ModelError(f"{folder} is no folder", hint=f"name the folder that holds {WEIGHTS_FILE}")
    path = folder / MODEL_FILE
    model = parse_json(read_file(path, MAX_JSON), path)
    _check_version(model, path)
    weights = member(model, "weights", dict, path)
    architecture, parameters = member(model, "architecture", str, path), member(model, "parameters", dict, path)
    if member(model, "pixels", dict, path) != PIXELS:
        raise ModelError(f"{path}: its pixel convention is not {PIXELS}", hint=RETRAIN)
    content = read_file(folder / WEIGHTS_FILE, MAX_WEIGHTS)
    found, expected = hashlib.sha256(content).hexdigest(), member(weights, "sha256", str, path)
    if found != expected:
        raise ModelError(
            f"{folder / WEIGHTS_FILE} is not the file that {MODEL_FILE} describes: "
            f"its SHA-256 is {found[:12]}…, not {expected[:12]}…",
            hint=RETRAIN,
        )
    tensors = read_tensors(content, folder / WEIGHTS_FILE)
    listed = {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in tensors.items()}
    if listed != member(weights, "tensors", dict, path):
        raise ModelError(f"{folder / WEIGHTS_FILE} holds other tensors or shapes than {MODEL_FILE} lists", hint=RETRAIN)
    return Bundle(
        folder,
        architecture,
        parameters,
        found,
        tensors,
        noise=member(model, "noise", dict, path),
        metrics=member(model, "metrics", dict, path),
        model=model,
    )


def _check_version(model: dict[str, Any], path: Path) -> None:
    if model.get("format") != FORMAT:
        raise ModelError(f"{path} does not describe a model of denoise-batch", hint="name another folder with --model")
    found = model.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:
        raise ModelError(
            f"{path} has format version {found}; this program reads {FORMAT_VERSION}",
            hint="update denoise-batch" if isinstance(found, int) and found > FORMAT_VERSION else RETRAIN,
        )
