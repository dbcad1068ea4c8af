"""The README.md of a model folder: what the model is for, what it was trained on, how good it is, and its limits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from denoise_batch.bundle.history import EpochRow


def model_card(model: dict[str, Any], history: Sequence[EpochRow] = (), *, tensorboard: bool = False) -> str:
    """The model card as Markdown.

    Args:
        model: the content of model.json.
        history: the training's epochs.
        tensorboard: whether the folder has files for TensorBoard.
    """
    weights, recipe = model["weights"], model["recipe"]
    tensors = weights["tensors"].values()
    count = weights.get("parameters") or sum(_product(tensor["shape"]) for tensor in tensors)
    board = ", `tensorboard/` the same for TensorBoard" if tensorboard else ""
    sections = [
        f"# {model['architecture']}: a denoiser of 28×28 digit images",
        f"Made by denoise-batch {model['versions'].get('denoise-batch', '')} on {model['created'][:10]}. "
        f"Network `{model['architecture']}`, {count:,} parameters"
        + (f" ({_pairs(model['parameters'])})." if model["parameters"] else "."),
        "## Use",
        "It cleans grey 28×28 images of single digits that are blurred and noisy, before people or classifiers read "
        "them:\n\n"
        "```\ndenoise-batch infer in.parquet out.parquet --model FOLDER\n```\n\n"
        "From Python: `denoise_batch.bundle.read_bundle(FOLDER).load()` is a PyTorch module that takes and gives "
        "(n, 1, 28, 28) float32.",
        "## Pixels",
        "0 is background and 1 full ink (light on dark). Input is not clipped: noise beyond 0 and 1 carries "
        "information. Output lies in 0..1.",
        "## Training",
        _training(model),
        "## Quality",
        _quality(model, history),
        _evaluation(model["evaluation"]) if model.get("evaluation") else _unmeasured(model),
        "## Limits",
        _limits(model),
        "## Files",
        "`model.safetensors` holds the weights (no code), `model.json` everything said here for programs, "
        f"`history.csv` and `curves.png` the training{board}.\n\n"
        f"SHA-256 of the weights: `{weights['sha256']}`",
    ]
    if recipe:
        idle = ("drawn_every",) if not of_pairs(model) else ("copies",) if _drawn_every(model) else _NOISE_OF_RECIPE
        told = {key: value for key, value in recipe.items() if key not in idle}
        sections[-2:-2] = ["## Recipe", f"```json\n{json.dumps(told, indent=1)}\n```"]
    return "\n\n".join(sections) + "\n"


_NOISE_OF_RECIPE = (
    "sigma",
    "half_range",
    "clipped",
    "noiseless",
    "clean",
    "gaussian",
    "impulse",
    "few_levels",
    "grain",
    "copies",
    "drawn_every",
)
"""What a recipe says of the noise that is drawn."""


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _pairs(fields: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in fields.items())


_KINDS = {
    "gaussian": "have Gaussian noise of deviation r / √3 instead",
    "impulse": "have salt and pepper in r / 3 of their pixels instead",
    "grain": "have Gaussian noise of deviation r / √3 instead that is alike in neighbouring pixels",
    "noiseless": "are blurred only",
    "clean": "are neither blurred nor noised",
    "clipped": "(of any kind) are clipped to 8 bits after it",
    "few_levels": "(of any kind) have 2 to 16 levels of grey left after it, three fifths of them 2",
}
"""What the shares of `noise.NoiseRecipe` mean."""


def _training(model: dict[str, Any]) -> str:
    data, noise, metrics = model["data"], model["noise"], model["metrics"]
    source = data.get("source", "unknown data")
    if source == "Parquet":
        source = f"{data['rows']:,} rows of {len(data['files'])} Parquet file(s), column `{data['column']}`"
    if data.get("max_images"):
        source += f", the first {data['max_images']:,} images"
    if data.get("rows_left_out"):
        source += f"; {data['rows_left_out']:,} of them were left out, without an image that could be used"
    lines = [f"- Data: {source}"]
    if of_pairs(model):
        every = _drawn_every(model)
        lines.append(
            f"- Noise: the data's own, column `{noise['column']}`"
            + (f"; in its place for {1 / every:.0%} of the images {_drawn(model['recipe'], 'these')}" if every else "")
        )
    elif noise:
        lines.append(f"- Noise: {_drawn(noise, 'the images')}")
    lines += _no_digits(model)
    began, which = data.get("init"), "Began"
    while began:
        lines.append(f"- {which} with the weights {began['sha256'][:12]}…{_before(began)}")
        began, which = began.get("init"), "These began"
    if "images_trained" in metrics:
        lines.append(
            f"- {metrics['images_trained']:,} images in {metrics['seconds']:,.0f} s, "
            f"{metrics['workers']} worker(s) on {metrics['device']}"
        )
    if model["command"]:
        lines.append(f"- Command: `{model['command']}`")
    if head := data.get("quality_head"):
        lines.append(
            f"- After that it learnt on how good its own images are, which changed none of them: {head['images']:,} "
            f"images, one in {head['foreign_every']} no digit (`benchmarks/quality_head.py`)"
        )
    lines.append(f"- Versions: {_pairs(model['versions'])}")
    return "\n".join(lines)


def _no_digits(model: dict[str, Any]) -> list[str]:
    """What else than digits a training had; steps of fewer images had none."""
    recipe = model["recipe"] or {}
    blank, foreign, batch = (int(recipe.get(name, 0)) for name in ("blank_every", "foreign_every", "batch"))
    drawn = _drawn_every(model) if of_pairs(model) else 1
    lines = []
    if 0 < blank <= batch and drawn and blank % drawn == 0:
        lines.append(f"- One image in {blank} is empty before its noise is drawn")
    if 0 < foreign * drawn <= batch:
        still = float(recipe.get("foreign_still", 0.0))
        among = f", {still:.0%} of these have no noise" if still else ""
        lines.append(
            f"- One image in {foreign * drawn} is no digit, and teaches it only how good its own images are{among}"
        )
    return lines


def _drawn(noise: dict[str, Any], images: str) -> str:
    sigma, half_range = noise["sigma"], noise["half_range"]
    return (
        f"Gaussian blur, σ from {sigma[0]:g} to {sigma[1]:g} pixels, then uniform white noise in [−r, r], "
        f"r from {half_range[0]:g} to {half_range[1]:g}"
        + "".join(f"; {noise[key]:.0%} of {images} {said}" for key, said in _KINDS.items() if noise.get(key))
    )


def _before(initial: dict[str, Any]) -> str:
    """What is known of the training of the weights that a training began with."""
    trained = (
        f" of {initial['images_trained']:,} images in {initial['seconds']:,.0f} s" if initial["images_trained"] else ""
    )
    return f", of a training{trained}: `{initial['command']}`" if initial["command"] else ""


def of_pairs(model: dict[str, Any]) -> bool:
    """Whether what model.json holds is of a model that has learnt from pairs of noisy and clean images."""
    return bool(model["noise"].get("source") == "noisy column")


def _drawn_every(model: dict[str, Any]) -> int:
    return int((model["recipe"] or {}).get("drawn_every", 0))


def _unmeasured(model: dict[str, Any]) -> str:
    if not of_pairs(model):
        return "`denoise-batch evaluate --model FOLDER --card` puts a table here: each noise level, beside filters."
    return (
        "`denoise-batch evaluate --model FOLDER --data PAIRS --noisy-column COLUMN` measures it on other pairs of its "
        "kind, `denoise-batch evaluate --model FOLDER --card` on drawn noise, and puts that table here."
    )


def _quality(model: dict[str, Any], history: Sequence[EpochRow]) -> str:
    metrics = model["metrics"]
    if "validation_psnr_noisy" not in metrics:
        return "Nothing was measured in its training."
    table = (
        "| on validation images | pooled PSNR |\n|---|---|\n"
        f"| noisy, denoised | {metrics['validation_psnr_noisy']:.2f} dB |\n"
        f"| clean, passed through | {metrics['validation_psnr_clean']:.2f} dB |"
    )
    if "validation_quality_error" in metrics:
        table += (
            "\n\nThe PSNR that it expects of each noisy image, denoised, is off by "
            f"{metrics['validation_quality_error']:.2f} dB (root mean square): `infer --quality` writes it."
        )
    epochs = f" of {len(history)}" if history else ""
    noise = (
        "their noise is the data's own" if of_pairs(model) else "their noise is drawn as in training, from a fixed seed"
    )
    return f"Weights of epoch {metrics['epoch']}{epochs}. Validation images were not trained on; {noise}.\n\n{table}"


_CONDITIONS = {
    "mixture": "the original article's, all levels",
    "uint8": "the same, clipped to 8 bits",
    "kinds": "all kinds",
    "gaussian": "Gaussian, of deviation r / √3",
    "gaussian8": "the same, clipped to 8 bits",
    "impulse": "salt and pepper in r / 3 of the pixels",
    "blur": "blur alone",
    "faint": "noise alone",
    "levels": "all kinds, in 2 to 16 levels of grey",
    "grain": "Gaussian, alike in neighbouring pixels, 8 bits",
}
"""The conditions of `evaluation.protocol` whose levels do not say what they are."""


_UNHARMED_DB = 30.0
"""Of a clean image that comes out at less, people see the difference."""


def _evaluation(found: dict[str, Any]) -> str:
    """The table of `evaluate --card`."""
    rows = found["conditions"]
    images = "1 image" if found["images"] == 1 else f"{found['images']:,} images"
    lines = [
        f"On {images} ({found['description']}), noise of seed {found['seed']}; {found['date']}. "
        "Pooled PSNR in dB, of the model with its 95% interval; beside it the noisy images', that of the best of "
        "three classical filters, each at its best setting, and that of the linear MMSE estimate, which is told σ and "
        "r. SSIM, and how many of the model's images a classifier of clean digits reads right:\n",
        "| | noise | σ | r | noisy | filter | linear MMSE | model | 95% interval | SSIM | read right |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    worse = []
    for key, row in rows.items():
        ranges = (row["sigma"], row["half_range"])
        levels = " | ".join(f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in ranges)
        noisy, best, psnr, low, high = (
            _decibels(value) for value in (row["noisy"], row["filter"], row["pooled_psnr"], *row["interval_95"])
        )
        interval = f"{low} to {high}" if found["images"] > 1 else "–"  # unknown, which is no infinity
        linear = "–" if row.get("linear") is None else _decibels(row["linear"])
        lines.append(
            f"| {key} | {_CONDITIONS.get(key, '')} | {levels} | {noisy} | {best} | {linear} | {psnr} | "
            f"{interval} | {row['ssim']:.3f} | {row['accuracy']:.1%} |"
        )
        others = [value for value in (row["noisy"], row["filter"], row.get("linear")) if value is not None]
        # Of images without noise nothing is to be made.
        if row["noisy"] is not None and row["pooled_psnr"] is not None and row["pooled_psnr"] < max(others):
            worse.append(key)
    if worse:
        lines.append(
            "\n**The noisy images themselves, a filter's or the linear estimate are better than this model's: "
            f"{', '.join(worse)}.**"
        )
    untouched = rows.get("i=0", {}).get("pooled_psnr")
    if untouched is not None and untouched < _UNHARMED_DB:
        lines.append(f"\n**It harms clean images: they come out at {untouched:.2f} dB (i=0).**")
    return "\n".join(lines)


def _decibels(value: float | None) -> str:
    return "∞" if value is None else f"{value:.2f}"


def _limits(model: dict[str, Any]) -> str:
    noise = model["noise"]
    lines = ["- It has learnt to denoise single digits alone: other images may come out as something else."]
    if "sigma" in noise:
        lines.append(
            f"- Blur beyond σ = {noise['sigma'][1]:g} or noise beyond r = {noise['half_range'][1]:g} is extrapolation, "
            f"and so is noise of another kind than {'these' if noise.get('gaussian') else 'uniform'}."
        )
    if noise.get("few_levels") == 1.0:
        lines.append("- Images of more than 16 levels of grey are extrapolation as well.")
    elif "sigma" in noise and "validation_quality_error" in model["metrics"]:
        lines.append(
            "- Scans of few levels of grey, sharpened ones and such of another curve of greys come back nearly as they "
            "are, and it expects up to 24 dB too much of them. For few levels there is the recipe `few-levels`."
        )
    lines.append(
        "- Under heavy noise it draws the likeliest digit, which may be the wrong one: do not take its output as "
        "evidence of what was written."
    )
    return "\n".join(lines)
