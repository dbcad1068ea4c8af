"""What a finished training says of its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from denoise_batch.bundle import BundleCard

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
    data = {"source": "MNIST"} if parquet is None else parquet.identity()
    if initial is not None:
        # Nobody has checked what a foreign folder says of itself.
        found = {name: initial.metrics.get(name) for name in ("images_trained", "seconds")}
        trained = {name: value if isinstance(value, int | float) else 0 for name, value in found.items()}
        data |= {"init": {"sha256": initial.sha256, "command": str(initial.model.get("command", "")), **trained}}
    return BundleCard(
        architecture=recipe.architecture,
        parameters=parameters,
        noise={"source": "noisy column", "column": settings.noisy_column}
        if settings.noisy_column
        else recipe.noise_json(),
        recipe=recipe.to_json(),
        command=settings.command,
        data=data | {"max_images": settings.max_images, "seed": settings.seed},
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
