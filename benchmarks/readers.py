"""Whether denoised digits are easier to read, and what becomes of images that are no digits.

    python benchmarks/readers.py [--mnist FOLDER] [--images 600000] [--sheet foreign.png]
    python benchmarks/readers.py --save-reader denoise_batch/pretrained/reader    # what `evaluate` reads with

Prints the share of MNIST's test images that classifiers name right under each condition of `evaluate`: one trained on
clean digits, shown the noisy images (clipped to 0..1) and what each model makes of them; one trained on noisy images of
the seed's mixture, fresh for every step, which is what one would use instead of a denoiser; and one trained on what the
default model makes of such images. Then what the default model says of images that are no digits, noised as digits are:
the PSNR that it expects of them, the one they have, how often it expects less of one of them than of a digit under the
same noise, and how many of them `infer` counts as poor. The classifiers are one convolutional network, trained from one
seed each.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import nn

from denoise_batch import bundle
from denoise_batch.denoiser import Denoiser
from denoise_batch.digits import Split, find_mnist, load_mnist
from denoise_batch.evaluation.digit_reader import READER_FILE, DigitReader
from denoise_batch.evaluation.protocol import BLOCK, CONDITIONS, degrade_images
from denoise_batch.extra_columns import POOR_PSNR, ExtraColumns
from denoise_batch.models.quality_head import MOST_PSNR
from denoise_batch.noise import NoiseRecipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    Images = NDArray[np.float32]

BATCH = 256
LETTERS = "ABCDEFGHJKLMNPQRTUVWXYabdefghkmnqrty"  # those that are no digit in some hand


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="MNIST's IDX files; else found or downloaded")
    parser.add_argument("--images", type=int, default=600_000, help="that each classifier is trained on")
    parser.add_argument("--tested", type=int, default=10_000, help="test images")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw images that are no digits, noised and denoised")
    parser.add_argument(
        "--save-reader", type=Path, metavar="FOLDER", help="only train the classifier of clean digits, and keep it"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = find_mnist(options.mnist)
    train, test = load_mnist(folder, Split.TRAIN), load_mnist(folder, Split.TEST)
    if options.save_reader:
        save_reader(trained(train, options.images, lambda clean, _: clean), test, options.save_reader)
        return
    shipped = bundle.SHIPPED_FOLDER
    models = {
        name: Denoiser(bundle.read_bundle(folder), device="cpu", threads=options.threads)
        for name, folder in (("default", shipped), ("seed", shipped.with_name("seed")))
    }
    print(
        f"{time.strftime('%Y-%m-%d')}; each classifier saw {options.images:,} images; {options.tested:,} test images\n"
    )
    readers = {
        "clean": trained(train, options.images, lambda clean, _: clean),
        "noisy": trained(train, options.images, noised),
        "denoised": trained(train, options.images, lambda clean, random: denoised(models["default"], clean, random)),
    }
    print_readers(readers, models, test[0][: options.tested], test[1][: options.tested])
    print_foreign(models["default"], test[0][: options.tested], options.sheet)


def save_reader(reader: DigitReader, test: tuple[NDArray[np.uint8], NDArray[np.uint8]], folder: Path) -> None:
    """As `evaluate` loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in reader.state_dict().items()}, folder / READER_FILE.name)
    right = (reader.read(_unit(test[0])) == test[1]).mean()
    print(f"{100 * right:.2f}% of the clean test images are read right; in {folder / READER_FILE.name}")


def noised(clean: Tensor, random: torch.Generator) -> Tensor:
    """The seed's mixture."""
    return NoiseRecipe().apply(clean, random)[0]


def denoised(model: Denoiser, clean: Tensor, random: torch.Generator) -> Tensor:
    return torch.from_numpy(model(noised(clean, random).reshape(-1, 784).numpy())).view(-1, 28, 28)


def trained(
    digits: tuple[NDArray[np.uint8], NDArray[np.uint8]], images: int, shown: Callable[[Tensor, torch.Generator], Tensor]
) -> DigitReader:
    """A classifier that has seen so many images, each drawn with replacement and shown as `shown` makes it."""
    torch.manual_seed(0)
    reader = DigitReader()
    optimiser = torch.optim.AdamW(reader.parameters(), 2e-3, weight_decay=1e-2)
    steps = images // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    random = torch.Generator().manual_seed(1)
    pixels, labels = torch.from_numpy(digits[0].copy()), torch.from_numpy(digits[1].astype(np.int64))
    for _ in range(steps):
        rows = torch.randint(0, len(pixels), (BATCH,), generator=random)
        loss = nn.functional.cross_entropy(reader(shown(pixels[rows].float() / 255, random)[:, None]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return reader.eval()


def print_readers(
    readers: dict[str, DigitReader], models: dict[str, Denoiser], digits: NDArray[np.uint8], labels: NDArray[np.uint8]
) -> None:
    columns = [("clean", None), *(("clean", name) for name in models), ("noisy", None), ("denoised", "default")]
    print("| condition |", end="")
    for reader, model in columns:
        print(f" trained on {reader}, shown {f'the output of {model}' if model else 'noisy'} |", end="")
    print("\n|---|" + "---|" * len(columns))
    for condition in CONDITIONS:
        right = dict.fromkeys(columns, 0)
        for block, start in enumerate(range(0, len(digits), BLOCK)):
            noisy = degrade_images(_unit(digits[start : start + BLOCK]), condition, block=block)
            shown: dict[str | None, Images] = {None: noisy}
            shown |= {name: model(noisy.reshape(-1, 784)).reshape(-1, 28, 28) for name, model in models.items()}
            for reader, name in columns:
                seen = shown[name].clip(0.0, 1.0) if reader == "clean" else shown[name]
                said = readers[reader].read(seen)
                right[reader, name] += int((said == labels[start : start + BLOCK]).sum())
        print(
            f"| {condition.key} | " + " | ".join(f"{100 * n / len(digits):.1f}%" for n in right.values()) + " |",
            flush=True,
        )


def print_foreign(model: Denoiser, digits: NDArray[np.uint8], sheet: Path | None) -> None:
    """Every kind with the same noise as the digits that it stands beside."""
    random = np.random.default_rng(0)
    count = min(1000, len(digits))
    box = np.ones((28, 28), np.float32)
    box[3:25, 3:25] = 0.0
    box[:2] = box[26:] = box[:, :2] = box[:, 26:] = 0.0  # a line of one pixel, two from the edge
    kinds = {
        "digits": _unit(digits[:count]),
        "letters": np.stack([_letter(random) for _ in range(count)]),
        "digits upside down": _unit(digits[:count])[:, ::-1],
        "digits in halves, exchanged": np.roll(_unit(digits[:count]), 14, axis=1),
        "clothes": np.stack([_garment(random) for _ in range(count)]),
        "printed boxes": np.stack([box] * count),
        "digits in printed boxes": np.maximum(_unit(digits[:count]), box),
        "checks and stripes": np.stack([_pattern(random) for _ in range(count)]),
        "empty": np.zeros((count, 28, 28), np.float32),
        "all ink": np.ones((count, 28, 28), np.float32),
    }
    noise = {
        "the seed's mixture": NoiseRecipe(),
        "the same, 8 bits": NoiseRecipe(clipped=1.0),
        "σ = 0.5, r = 0.4": NoiseRecipe((0.5, 0.5), (0.4, 0.4)),
        "none": None,
    }
    print("\n| images | noise | expected PSNR, dB | true, dB | less expected than of a digit | poor |")
    print("|---|---|---|---|---|---|")
    rows = []
    for title, recipe in noise.items():
        of_digits = None
        for name, clean in kinds.items():
            given = torch.from_numpy(np.ascontiguousarray(clean))
            noisy = given if recipe is None else recipe.apply(given, torch.Generator().manual_seed(5))[0]
            told = model.run(noisy.reshape(-1, 784).numpy(), ExtraColumns(quality=True))
            made = told.pixels.reshape(-1, 28, 28)
            assert told.psnr is not None
            of_digits = told.psnr if of_digits is None else of_digits
            below = (told.psnr[:, None] < of_digits).mean() + (told.psnr[:, None] == of_digits).mean() / 2
            true = -10 * np.log10(np.maximum(((made - clean) ** 2).mean(axis=(1, 2)), 10 ** (-MOST_PSNR / 10)))
            flagged = "" if name == "digits" else f"{100 * below:.0f}%"
            poor = f"{100 * (told.psnr < POOR_PSNR).mean():.1f}%"
            print(f"| {name} | {title} | {told.psnr.mean():.1f} | {true.mean():.1f} | {flagged} | {poor} |", flush=True)
            if recipe is not None and recipe.sigma[0] == recipe.sigma[1]:
                rows.append((name, clean[:8], noisy[:8].numpy(), made[:8]))
    if sheet is not None:
        _draw(sheet, rows)


def _unit(pixels: NDArray[np.uint8]) -> Images:
    return pixels.astype(np.float32) / np.float32(255)


def _letter(random: np.random.Generator) -> Images:
    """A letter of 20 pixels' height in one of matplotlib's fonts, its ink's centre in the middle as MNIST has it."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    family = str(random.choice(["DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono"]))
    font = FontProperties(family=family, style=str(random.choice(["normal", "oblique"])))
    outline = TextPath((0, 0), str(random.choice(list(LETTERS))), size=20, prop=font)
    low, high = outline.vertices.min(axis=0), outline.vertices.max(axis=0)
    scale = 20 / max(high - low)
    axis = (np.arange(84) + 0.5) / 3 - 14  # three samples a pixel each way
    x, y = np.meshgrid(axis, -axis)
    points = np.stack([x.ravel(), y.ravel()], axis=1) / scale + (low + high) / 2
    inside = np.zeros(len(points), bool)
    for polygon in outline.to_polygons(closed_only=True):
        from matplotlib.path import Path as Outline

        inside ^= Outline(polygon).contains_points(points)
    return inside.reshape(28, 3, 28, 3).mean(axis=(1, 3)).astype(np.float32)


GARMENTS = (
    [(2, 3), (5, 2), (9, 2), (12, 3), (14, 6), (12, 7), (11, 6), (11, 13), (3, 13), (3, 6), (2, 7), (0, 6)],  # shirt
    [(4, 1), (10, 1), (11, 13), (8, 13), (7, 5), (6, 13), (3, 13)],  # trousers
    [(5, 1), (6, 2), (8, 2), (9, 1), (9, 5), (12, 13), (2, 13), (5, 5)],  # dress
    [(1, 5), (4, 5), (4, 2), (10, 2), (10, 5), (13, 5), (13, 12), (1, 12)],  # bag
    [(3, 2), (7, 2), (8, 7), (13, 9), (13, 12), (2, 12), (2, 9)],  # boot
)
"""Outlines of what Fashion-MNIST shows, in 14ths of an image, x to the right and y down."""


def _garment(random: np.random.Generator) -> Images:
    """Cloth of a grey that changes from one side to the other, filling most of the image as in Fashion-MNIST."""
    from PIL import Image, ImageDraw

    side = 28 * 4
    outline = np.array(GARMENTS[random.integers(len(GARMENTS))]) / 14 - 0.5
    outline = outline * random.uniform(0.8, 1.0, 2) + random.normal(0.0, 0.012, outline.shape) + 0.5
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in outline * side], fill=255)
    cloth = np.linspace(random.uniform(0.3, 1.0), random.uniform(0.3, 1.0), 28)
    cloth = np.tile(cloth, (28, 1)) + random.normal(0.0, 0.08, (28, 28))
    covered = np.asarray(mask).reshape(28, 4, 28, 4).mean(axis=(1, 3)) / 255
    return (covered * cloth.clip(0.0, 1.0)).astype(np.float32)


def _pattern(random: np.random.Generator) -> Images:
    y, x = np.mgrid[:28, :28]
    width = int(random.integers(2, 8))
    stripes = (x // width) % 2
    checks = (x // width + y // width) % 2
    return (checks if random.random() < 0.5 else stripes).astype(np.float32)


def _draw(path: Path, rows: list[tuple[str, Images, Images, Images]]) -> None:
    figure = Figure(figsize=(9, 0.62 * len(rows)))
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for line, (name, *columns) in zip(axes, rows, strict=True):
        for axis, title, images in zip(line, ("clean", "noisy", "denoised"), columns, strict=True):
            axis.imshow(np.concatenate(list(images), axis=1), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{name}, {title}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
