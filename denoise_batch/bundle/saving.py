"""Writing a model folder: whole or not at all.

save_bundle(folder, network, BundleCard("bounds-unet", noise=…, metrics=…))
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoise_batch import __version__
from denoise_batch.bundle import FORMAT, FORMAT_VERSION, MODEL_FILE, PIXELS, WEIGHTS_FILE, read_bundle
from denoise_batch.bundle.card import model_card
from denoise_batch.bundle.files import read_tensors
from denoise_batch.bundle.history import HISTORY_FILE, EpochRow, draw_curves, history_csv
from denoise_batch.errors import OutputError
from denoise_batch.storage import publishing
from denoise_batch.storage.redaction import redact, redact_all

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class BundleCard:
    """What a model folder says about its weights.

    Attributes:
        architecture, parameters: as `models.build` takes them.
        noise: what the model was trained against.
        recipe: the training's recipe.
        command: the command line that trained it.
        data: what tells its training data from other data.
        metrics: numbers by name.
        history: the epochs.
        request: digest of all that the training's result depends on, by which it is known when asked for again.
    """

    architecture: str
    parameters: dict[str, Any] = field(default_factory=dict)
    noise: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    history: tuple[EpochRow, ...] = ()
    request: str = ""


def save_bundle(
    folder: Path,
    network: nn.Module,
    card: BundleCard,
    *,
    overwrite: bool = False,
    tensorboard: Path | None = None,
    build_in: Path | None = None,
) -> None:
    """Writes a model folder: all of it in a hidden folder, then one rename.

    Args:
        folder: the folder to make.
        network: the weights.
        card: what is said about them.
        overwrite: replace an existing folder; a reader sees the old one or the new one.
        tensorboard: a folder of TensorBoard files to put in.
        build_in: where the hidden folder is made, on the same file system; None for beside `folder`.

    Raises:
        OutputError: it exists and `overwrite` is off, or cannot be written.
    """
    from safetensors.torch import save

    folder = folder.absolute()
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    content = save(weights)
    tensors = read_tensors(content, folder / WEIGHTS_FILE)
    model = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": card.architecture,
        "parameters": card.parameters,
        "pixels": PIXELS,
        "weights": {
            "file": WEIGHTS_FILE,
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "tensors": {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in tensors.items()},
        },
        "noise": card.noise,
        "recipe": card.recipe,
        # Paths may be URIs, and models are given away.
        "command": shlex.join(map(redact, shlex.split(card.command))),
        "data": redact_all(card.data),
        "metrics": card.metrics,
        "request": card.request,
        "versions": _versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        built = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".writing", dir=build_in or folder.parent))
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}", hint="give another --out") from error
    try:
        built.chmod(0o777 & ~_umask())
        publishing.write_file(built / WEIGHTS_FILE, content)
        publishing.write_file(built / MODEL_FILE, as_json(model))
        publishing.write_file(built / HISTORY_FILE, history_csv(card.history).encode())
        if card.history:
            title = f"{card.architecture} · {card.data.get('source', '')}"
            draw_curves(card.history, built / "curves.png", title=title)
        board = tensorboard is not None and tensorboard.is_dir()
        text = model_card(model, card.history, tensorboard=board)
        publishing.write_file(built / "README.md", text.encode())
        if tensorboard is not None and board:
            shutil.copytree(tensorboard, built / "tensorboard", ignore=_links)
        read_bundle(built)
        publishing.publish(built, folder, overwrite=overwrite)
    finally:
        publishing.remove(built)


def as_json(model: dict[str, Any]) -> bytes:
    """The content of model.json."""
    return (json.dumps(model, indent=1, allow_nan=False) + "\n").encode()


def _links(folder: str, names: list[str]) -> list[str]:
    """What `copytree` leaves out: a link could bring any file of this machine into a folder that is given away."""
    return [name for name in names if Path(folder, name).is_symlink()]


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _versions() -> dict[str, str]:
    # Ours is not asked of the installation: a source folder need not be installed.
    found = {"python": platform.python_version(), "denoise-batch": __version__}
    for package in ("torch", "ray", "numpy", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
