"""What a finished training says of its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from denoise_batch.bundle.saving import BundleCard

if TYPE_CHECKING:
    from denoise_batch.bundle import Bundle
    from denoise_batch.training.checkpoint import TrainingState
    from denoise_batch.training.data import ParquetImages
    from denoise_batch.training.recipes import Recipe, TrainSettings


def card_of(
    settings: TrainSettings,
    recipe: Recipe,
    parquet: ParquetImages | None,
    state: TrainingState,
    parameters: dict[str, Any],
    initial: Bundle | None,
) -> BundleCard:
    """The record of a training.

    Args:
        parquet: the data, or None for MNIST.
        parameters: of the network.
        initial: whose weights it began with, or None.
    """
    rows = state.history
    kept = rows[state.best_epoch - 1] if recipe.keep == "best" else rows[-1]
    data: dict[str, Any] = {"source": "MNIST"} if parquet is None else parquet.identity()
    if initial is not None:
        its_data = initial.model.get("data")
        before = its_data.get("init") if isinstance(its_data, dict) else None
        told = {**initial.metrics, "sha256": initial.sha256, "command": initial.model.get("command"), "init": before}
        data["init"] = _beginning(told)
    return BundleCard(
        architecture=recipe.architecture,
        parameters=parameters,
        noise={"source": "noisy column", "column": settings.noisy_column}
        if settings.noisy_column
        else recipe.noise_json(),
        recipe=recipe.to_json(),
        command=settings.command,
        data=data
        | ({} if parquet is None else {"rows_left_out": state.rows_left_out})
        | {"max_images": settings.max_images, "seed": settings.seed},
        metrics={
            "epoch": kept.epoch,
            "validation_psnr_noisy": kept.val_psnr_noisy,
            "validation_psnr_clean": kept.val_psnr_clean,
            **({} if kept.val_quality_error is None else {"validation_quality_error": kept.val_quality_error}),
            "validation_loss": kept.val_loss,
            "training_loss": kept.loss,
            "images_trained": rows[-1].images,
            "seconds": rows[-1].seconds,
            "workers": state.workers,
            "device": state.device,
        },
        history=tuple(rows),
    )


_MOST_BEGINNINGS = 8


def _beginning(told: dict[str, Any], most: int = _MOST_BEGINNINGS) -> dict[str, Any]:
    """What is recorded of weights that a training began with, and of those that their own training began with.

    Args:
        told: the same as a foreign folder has it, which nobody has checked.
        most: of the weights, one before the other, that are recorded.
    """
    record: dict[str, Any] = {name: str(told.get(name) or "") for name in ("sha256", "command")}
    for name in ("images_trained", "seconds"):
        value = told.get(name)
        record[name] = value if isinstance(value, int | float) else 0
    if isinstance(told.get("init"), dict) and most > 1:
        record["init"] = _beginning(told["init"], most - 1)
    return record
