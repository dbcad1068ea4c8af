"""What `evaluate` found of a model, written into its folder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from denoise_batch.bundle import MODEL_FILE, read_bundle
from denoise_batch.bundle.card import model_card
from denoise_batch.bundle.files import RETRAIN
from denoise_batch.bundle.history import HISTORY_FILE, read_history
from denoise_batch.bundle.saving import as_json
from denoise_batch.errors import ModelError, OutputError
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from pathlib import Path

    from denoise_batch.bundle import Bundle


def check_card(bundle: Bundle) -> None:
    """Refuses a model folder whose card `note_evaluation` could not write.

    Raises:
        ModelError: something that the card says is missing in it, or no value for it.
        OutputError: it cannot be written.
    """
    _written(bundle, bundle.model)
    if not os.access(bundle.folder, os.W_OK):
        raise _unwritable(bundle.folder, "no permission")


def note_evaluation(bundle: Bundle, evaluation: dict[str, Any]) -> None:
    """Writes what `evaluate` found of a model into its model.json, and its card anew.

    Args:
        bundle: the model folder.
        evaluation: `Evaluation.of_model`.

    Raises:
        ModelError, OutputError: as `check_card`; or another model stands there by now.
    """
    if read_bundle(bundle.folder).sha256 != bundle.sha256:
        raise ModelError(f"{bundle.folder} was replaced while it was evaluated", hint="evaluate the new model")
    content, card = _written(bundle, bundle.model | {"evaluation": evaluation})
    try:
        publishing.write_file(bundle.folder / MODEL_FILE, content, alone=False)
        publishing.write_file(bundle.folder / "README.md", card, alone=False)
    except OSError as error:
        raise _unwritable(bundle.folder, error.strerror) from error


def _written(bundle: Bundle, model: dict[str, Any]) -> tuple[bytes, bytes]:
    """What model.json and the card will hold."""
    history = bundle.folder / HISTORY_FILE
    try:
        rows = read_history(history) if history.is_file() else ()
        card = model_card(model, rows, tensorboard=(bundle.folder / "tensorboard").is_dir())
        return as_json(model), card.encode()
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise ModelError(
            f"{bundle.folder}: its card cannot be made of its model.json and history.csv: {error!r}", hint=RETRAIN
        ) from error


def _unwritable(folder: Path, reason: str | None) -> OutputError:
    return OutputError(f"{folder} cannot be written: {reason}", hint="copy the model folder, and evaluate the copy")
