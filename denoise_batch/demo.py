"""Everything once, end to end, small enough for two CPU cores: digits → train → corrupt → infer → evaluate → preview.

    report = run_demo(DemoSettings(Path("demo")), Progress())

Each step is the same call as the command of that name, and `report.md` says which command that is.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoise_batch.console import bytes_done, rows_done
from denoise_batch.errors import FlagError, NetworkError, OutputError
from denoise_batch.progress import infer_line, training_line
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from collections.abc import Callable

    from denoise_batch.digits import DigitsReport, Source, Split
    from denoise_batch.inference.report import InferProgress
    from denoise_batch.progress import Progress
    from denoise_batch.training.progress import TrainProgress

TRAINING_IMAGES, TEST_IMAGES = 20_000, 10_000
EPOCHS = 5
BATCH = 128
"""100,000 images in 780 steps: a minute or two on two cores, and well past every classical filter."""

EVALUATED = 1_000
"""Images of the table; its last digit needs more, its order does not."""

_MADE = (
    "train.parquet",
    "test.parquet",
    "model",
    "noisy.parquet",
    "denoised.parquet",
    "_denoised.parquet.manifest",
    "figures",
    "preview.png",
    "evaluation.json",
    "report.md",
)
"""All that a finished demo has written into its folder; `overwrite` removes it, and what is `_unfinished`."""


@dataclass(frozen=True)
class DemoSettings:
    """What to show.

    Attributes:
        out: folder of everything that is made.
        mnist: folder of MNIST's IDX files; None looks for them, and downloads them.
        source: `mnist`, `synthetic`, or `auto`: MNIST where it can be had, else drawn digits.
        rows: images to denoise.
        epochs: passes over the training images.
        seed: of digits, weights and noise.
        overwrite: replace what an earlier demo left in `out`.
        verbose: let Ray's own log through.
    """

    out: Path
    mnist: Path | None = None
    source: str = "auto"
    rows: int = 10_000
    epochs: int = EPOCHS
    seed: int = 0
    overwrite: bool = False
    verbose: bool = False


@dataclass
class DemoReport:
    """What was done.

    Attributes:
        digits: which digits these are.
        steps: name, command line, seconds and result of each.
        table: the evaluation as text.
        psnr: pooled PSNR in dB over the seed's mixture, by method.
    """

    folder: str
    digits: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    table: str = ""
    psnr: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def lines(self) -> list[str]:
        folder = Path(self.folder)
        width = max(len(method) for method in self.psnr)
        return [
            *self.table.replace("\n\n", "\n", 1).split("\n"),
            "",
            f"Done in {self.seconds:.0f} s with {self.digits}. PSNR over the mixture, in dB:",
            *(f"  {method.ljust(width)}  {value:6.2f}" for method, value in self.psnr.items()),
            "Where everything is:",
            f"  {folder / 'report.md'}            the report, with each command and the table",
            f"  {folder / 'preview.png'}          noisy, denoised and clean images of the denoised file",
            f"  {folder / 'figures'}/             the article's figures, and quality over the noise levels",
            f"  {folder / 'model'}/               the model folder; use it with --model",
            f"  {folder / 'noisy.parquet'}        what was denoised",
            f"  {folder / 'denoised.parquet'}     the result",
        ]


def run_demo(settings: DemoSettings, progress: Progress) -> DemoReport:
    """Runs all steps.

    Raises:
        OutputError: the folder holds an earlier demo, is another one's that runs, or cannot be written.
        RequestError, JobFailed: as the steps say.
    """
    started = time.monotonic()
    out = settings.out
    _check_folder(out, overwrite=settings.overwrite)
    source, mnist, note = _choose_digits(settings, progress)
    # Imported now: what can be refused has been.
    from denoise_batch.cluster import connect
    from denoise_batch.digits import Split

    out.mkdir(parents=True, exist_ok=True)
    # Before what they were made of: their locks say whether another demo is at work here.
    for folder in _unfinished(out):
        if folder.is_dir():
            with publishing.exclusive(folder):
                publishing.remove(folder)
    for name in _MADE:
        publishing.remove(out / name)
    report = DemoReport(str(out), note)
    steps = _Steps(settings, report, progress)
    steps.digits(source, mnist, "train.parquet", Split.TRAIN, TRAINING_IMAGES)
    steps.digits(source, mnist, "test.parquet", Split.TEST, settings.rows)
    # One Ray for training and denoising: starting it takes as long as either's own start.
    with connect(training=True, verbose=settings.verbose):
        steps.train()
        steps.corrupt()
        steps.infer()
    steps.evaluate()
    steps.preview()
    report.seconds = round(time.monotonic() - started, 1)
    (out / "report.md").write_text(_markdown(report), encoding="utf-8")
    return report


def _check_folder(out: Path, *, overwrite: bool) -> None:
    if os.path.lexists(out) and not out.is_dir():
        raise OutputError(f"{out} is no folder", hint="give the name of a folder with --out")
    publishing.check_parent(out / _MADE[0])
    found = [path.name for path in (*(out / name for name in _MADE), *_unfinished(out)) if path.exists()]
    if found and not overwrite:
        raise OutputError(
            f"{out} holds an earlier demo ({found[0]})", hint="give --overwrite to replace it, or another --out"
        )


def _unfinished(out: Path) -> list[Path]:
    """Where an interrupted demo leaves its training or its run of `infer`.

    A new demo cannot go on with them, as each makes its digits anew.
    """
    from denoise_batch.bundle import training_folder
    from denoise_batch.inference.run_folder import work_folder

    return [training_folder(out / "model"), work_folder(out / "denoised.parquet")]


def _choose_digits(settings: DemoSettings, progress: Progress) -> tuple[Source, Path | None, str]:
    """Which digits, where MNIST lies, and a phrase that says so."""
    from denoise_batch.digits import Source, check_drawn, find_mnist

    if settings.source == "synthetic":
        check_drawn(settings.mnist)
    else:
        try:
            folder = find_mnist(settings.mnist, progress=bytes_done(progress, "download MNIST"))
        except (NetworkError, OutputError) as error:
            if settings.source == "mnist":
                raise
            progress.note(f"note: drawn digits instead of MNIST, because {error.message}")
        else:
            if settings.rows > TEST_IMAGES:
                raise FlagError(
                    f"--rows {settings.rows}: MNIST has {TEST_IMAGES:,} test images",
                    hint="give fewer, or --source synthetic, which draws as many as one likes",
                )
            return Source.MNIST, folder, f"MNIST from {folder}"
    return Source.SYNTHETIC, None, f"drawn digits (seed {settings.seed})"


class _Steps:
    """The steps, each with its note, its progress and its entry in the report."""

    def __init__(self, settings: DemoSettings, report: DemoReport, progress: Progress) -> None:
        self.settings, self.report, self.progress = settings, report, progress
        self.out = settings.out

    def _do(self, name: str, arguments: list[str], work: Callable[[], str]) -> None:
        started = time.monotonic()
        result = work()
        seconds = time.monotonic() - started
        command = shlex.join(["denoise-batch", name, *arguments])
        self.report.steps.append({"name": name, "command": command, "seconds": round(seconds, 1), "result": result})
        self.progress.note(f"{name}: {result} ({seconds:.0f} s)")

    def digits(self, source: Source, mnist: Path | None, name: str, split: Split, count: int) -> None:
        from denoise_batch.digits import Source as Sources
        from denoise_batch.digits import make_digits

        path = self.out / name

        def work() -> str:
            progress = rows_done(self.progress, "digits")
            made: DigitsReport = make_digits(
                path, source, split, count, self.settings.seed, None, mnist, progress=progress
            )
            return f"{made.rows:,} clean digits in {path}"

        given = ["--mnist", str(self.settings.mnist)] if self.settings.mnist is not None else []
        if source is Sources.SYNTHETIC:
            given = ["--source", "synthetic", "--seed", str(self.settings.seed)]
        self._do("digits", [str(path), *given, "--split", split.value, "--count", str(count)], work)

    def train(self) -> None:
        from denoise_batch.training.recipes import TrainSettings
        from denoise_batch.training.train import train

        data, model = self.out / "train.parquet", self.out / "model"
        arguments = ["--data", str(data), "--out", str(model), "--epochs", str(self.settings.epochs)]
        arguments += ["--batch", str(BATCH), "--seed", str(self.settings.seed)]
        settings = TrainSettings(
            output=model,
            data=str(data),
            epochs=self.settings.epochs,
            batch=BATCH,
            seed=self.settings.seed,
            command=shlex.join(["denoise-batch", "train", *arguments]),
            verbose=self.settings.verbose,
        )

        def show(now: TrainProgress) -> None:
            self.progress.update(*training_line(now))

        def work() -> str:
            bundle = train(settings, show)
            return f"{bundle.architecture} in {model}, {bundle.metrics['validation_psnr_noisy']:.2f} dB on noisy images"

        self._do("train", arguments, work)

    def corrupt(self) -> None:
        from denoise_batch.corrupt import CorruptSettings, corrupt

        clean, noisy = self.out / "test.parquet", self.out / "noisy.parquet"
        settings = CorruptSettings((str(clean),), noisy, seed=self.settings.seed)

        def work() -> str:
            return f"{corrupt(settings, rows_done(self.progress, 'corrupt')).rows:,} noisy images in {noisy}"

        self._do("corrupt", [str(clean), str(noisy), "--seed", str(self.settings.seed)], work)

    def infer(self) -> None:
        from denoise_batch.inference.infer import InferSettings, infer

        noisy, denoised, model = self.out / "noisy.parquet", self.out / "denoised.parquet", self.out / "model"

        def show(now: InferProgress) -> None:
            self.progress.update(*infer_line(now))

        def work() -> str:
            settings = InferSettings(inputs=(str(noisy),), output=str(denoised), model=model)
            done = infer(settings, show, verbose=self.settings.verbose)
            return f"{done.rows_out:,} denoised images in {denoised}, {done.rate:,.0f} images/s once started"

        self._do("infer", [str(noisy), str(denoised), "--model", str(model)], work)

    def evaluate(self) -> None:
        from denoise_batch.bundle import read_bundle
        from denoise_batch.evaluation.clean_images import load_clean_images
        from denoise_batch.evaluation.evaluate import evaluate
        from denoise_batch.evaluation.evaluation_figures import draw_evaluation
        from denoise_batch.evaluation.table import format_table

        clean, figures = self.out / "test.parquet", self.out / "figures"

        def work() -> str:
            bundle = read_bundle(self.out / "model")
            shown = load_clean_images(str(clean), limit=EVALUATED)
            found = evaluate(
                [bundle],
                shown.images,
                labels=shown.labels,
                description=shown.description,
                device="auto",
                progress=self.progress.update,
            )
            draw_evaluation(found, [bundle], shown.images, figures)
            (self.out / "evaluation.json").write_text(json.dumps(found.to_json(), indent=2), encoding="utf-8")
            self.report.table = format_table(found)
            self.report.psnr = {
                method: round(found.row("mixture", method).scores.pooled_psnr, 2) for method in found.methods
            }
            return f"table and figures of {len(shown.images):,} images in {figures}"

        arguments = ["--model", str(self.out / "model"), "--data", str(clean), "--limit", str(EVALUATED)]
        self._do("evaluate", [*arguments, "--figures", str(figures)], work)

    def preview(self) -> None:
        from denoise_batch.evaluation.preview import preview

        denoised, picture = self.out / "denoised.parquet", self.out / "preview.png"

        def work() -> str:
            return preview(str(denoised), picture, seed=self.settings.seed).summary()

        self._do("preview", [str(denoised), str(picture), "--seed", str(self.settings.seed)], work)


def _markdown(report: DemoReport) -> str:
    steps = "\n".join(f"| {step['name']} | {step['seconds']:.1f} | {step['result']} |" for step in report.steps)
    commands = "\n".join(step["command"] for step in report.steps)
    return f"""# denoise-batch demo

With {report.digits}, in {report.seconds:.0f} seconds. The model saw a minute or two of training; `denoise-batch train`
without options trains one worth keeping.

| step | seconds | result |
|---|---|---|
{steps}

The same by hand:

```
{commands}
```

## How good the model is

```
{report.table}
```

![Quality over the noise levels](figures/metrics.png)

## What it does

One digit at six rising levels of blur and noise, and below each what the model makes of it:

![One digit at six levels](figures/levels.png)

Different digits at the most blur and noise that it was trained with:

![Different digits](figures/digits.png)

![Random images of the mixture, and some of its worst tenth](figures/mixture.png)

Rows of `denoised.parquet`, at random and the worst:

![Contact sheet](preview.png)
"""
