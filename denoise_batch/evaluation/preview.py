"""A contact sheet of a Parquet dataset: random rows and the worst ones, as noisy / denoised / clean.

    shown = preview("denoised.parquet", Path("sheet.png"))
    print(shown.summary())

The dataset is sampled, not read: see `sampling`. Only what `infer --quality` says of its images is read of all rows, so
that the worst of a large output are found. No torch, no Ray.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from denoise_batch import storage
from denoise_batch.errors import ColumnError, FlagError, OutputError, RequestError
from denoise_batch.evaluation import metrics
from denoise_batch.evaluation.figures import Section, Tile, contact_sheet, range_of
from denoise_batch.evaluation.sampling import Dataset, Sample, lowest_rows, open_dataset, rows_at, sample_rows
from denoise_batch.extra_columns import psnr_column
from denoise_batch.images import (
    ImageColumn,
    check_float_range,
    dark_on_light,
    find_image_column,
    image_candidates,
    turned,
)
from denoise_batch.inference.finished import columns_of_output
from denoise_batch.storage import publishing

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

SEARCHED_ROWS: Final = 20_000
"""The rows shown come from that many sampled ones, and the worst are the worst of those."""
MOST_ROWS: Final = 100
"""Rows of one section; the picture would be unwieldy with more."""


@dataclass(frozen=True)
class ShownRow:
    """A row on the sheet.

    Attributes:
        file: its file.
        row: its number within the file.
        psnr: of the denoised image (the image itself where none is denoised) against the clean one, in dB; None
            where there is no clean one.
        expected_psnr: what the model said of its own image, in dB; None where it did not.
        change: root mean square difference of the denoised image from the noisy one, in units of full ink, or None.
    """

    file: str
    row: int
    psnr: float | None
    change: float | None
    expected_psnr: float | None = None


@dataclass(frozen=True)
class Preview:
    """What is on the sheet.

    Attributes:
        columns: the dataset's columns shown, from left to right.
        rows: of the whole dataset.
        searched: rows that were read, to draw from and to find the worst ones among.
        without_image: those of them that lack an image in one of the columns, other than a clean one that nobody
            named; they are not shown.
        worst_by: `expected_psnr` (the worst of all rows then), `psnr`, `change`, or None where there is nothing to
            rank by or no worst rows were asked for.
        notes: a line where files, a column that has the name of one to show, or rows that may be the worst were left
            out.
    """

    path: str
    picture: str
    columns: tuple[str, ...]
    rows: int
    searched: int
    without_image: int
    worst_by: str | None
    random: tuple[ShownRow, ...]
    worst: tuple[ShownRow, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; a PSNR that is not finite is None."""
        content = asdict(self)
        for row in (*content["random"], *content["worst"]):
            for name in ("psnr", "expected_psnr"):
                if row[name] is not None and not np.isfinite(row[name]):
                    row[name] = None
        return content

    def summary(self) -> str:
        """One line or two for a reader."""
        among = (
            f"all {self.rows:,} rows"
            if self.searched == self.rows
            else f"{self.searched:,} of {self.rows:,} rows, sampled"
        )
        text = f"{self.picture}: {len(self.random)} random"
        if self.worst_by == "expected_psnr":
            text += f" of {among}, and the {len(self.worst)} of all that the model expects least of"
        elif self.worst_by:
            text += f" and the {len(self.worst)} worst of {among}"
        else:
            text += f" of {among}"
        if self.without_image:
            text += f"; {self.without_image:,} of them have no image and were left out"
        return text


def preview(
    path: str,
    picture: Path,
    *,
    column: str | None = None,
    denoised: str | None = None,
    clean: str | None = None,
    count: int = 8,
    worst: int | None = None,
    searched: int = SEARCHED_ROWS,
    seed: int = 0,
) -> Preview:
    """Draws the sheet.

    Args:
        path: a Parquet file or dataset.
        picture: the PNG to write; one that exists is replaced.
        column: the noisy image column; found if not named.
            Of an output of `infer`, its manifest names it.
        denoised: the denoised one; else that of the manifest, or `denoised` if there is such an image column, not named
            for another, else none.
        clean: the clean one; else `clean`, likewise, else none. Only where it is named, rows without a clean image are
            left out; else its place on the sheet is empty.
        count: random rows, 1 to 100.
        worst: how many of the worst rows to show too, 0 to 100; None is as many. They are those of the whole dataset
            with the lowest PSNR that the model expects of itself (`infer --quality`); where it did not say, or `clean`
            is named, of the rows searched those with the lowest PSNR against the clean image; where there is none,
            those which denoising changed the most.
        searched: rows to read, among which the worst ones are found and the random ones drawn.
        seed: which rows are sampled and shown.

    Raises:
        RequestError: the path, a column or a number does not fit, or no row holds images.
    """
    if not 1 <= count <= MOST_ROWS:
        raise FlagError(f"--rows {count} is impossible", hint=f"give a number from 1 to {MOST_ROWS}")
    worst = count if worst is None else worst
    if not 0 <= worst <= MOST_ROWS:
        raise FlagError(f"--worst {worst} is impossible", hint=f"give a number from 0 to {MOST_ROWS}")
    if picture.suffix.lower() not in ("", ".png"):
        raise FlagError(f"{picture}: the picture is a PNG", hint=f"name it {picture.with_suffix('.png').name}")
    _check_named_once({"--column": column, "--denoised": denoised, "--clean": clean})
    publishing.check_output_file(picture, overwrite=True)
    dataset = open_dataset(path)
    if any(not storage.is_uri(file) and Path(file).resolve() == picture.resolve() for file in dataset.files):
        raise OutputError(f"{picture} is a file of the data", hint="give the picture another name")
    columns, left_out = _columns(dataset, *_noisy_and_denoised(dataset, column, denoised, clean), clean)
    told = _told_by_the_model(dataset, columns)
    # A clean column that nobody named is shown where it has images: what it lacks hides no row.
    needed = [kind for kind in columns if kind != "clean" or clean is not None]
    expected_worst = None
    if worst and told and clean is None:
        expected_worst = _expected_worst(dataset, columns, needed, worst, left_out)
    sample = sample_rows(dataset, list(columns.values()), max(searched, count), seed=seed, numbers=told)
    whole = _whole(columns, needed, sample)
    if len(whole) == 0:
        names = " and ".join(repr(columns[kind].name) for kind in needed)
        raise RequestError(
            f"{storage.redact(path)}: none of {len(sample):,} rows read holds images in {names}",
            hint="look at the data with `denoise-batch inspect`",
        )
    scores = _scores(columns, sample, whole)
    ranked_by = _ranked_by(scores, bool(expected_worst)) if worst else None
    if told:
        scores["expected_psnr"] = sample.numbers[told[0]][whole]
    chosen = np.sort(np.random.default_rng(seed).choice(len(whole), min(count, len(whole)), replace=False))
    among = f"all {dataset.rows:,} rows" if len(sample) == dataset.rows else f"{len(sample):,} sampled rows"
    sections = [_section(f"random rows of {dataset.rows:,}", dataset, sample, whole[chosen], scores, chosen)]
    shown_worst: tuple[ShownRow, ...] = ()
    if expected_worst:
        section, shown_worst = expected_worst
        sections.append(section)
    elif ranked_by:
        order = scores["psnr"] if ranked_by == "psnr" else -scores["change"]
        lowest = np.argsort(order, kind="stable")[:worst]
        lowest = lowest[~np.isnan(order[lowest])]
        unranked = int(np.isnan(order).sum())
        if unranked:
            left_out.append(f"note: {unranked:,} of the rows read have no clean image, and are not among the worst")
        heading = f"{'lowest PSNR' if ranked_by == 'psnr' else 'changed the most'}, of {among}"
        sections.append(_section(heading, dataset, sample, whole[lowest], scores, lowest))
        shown_worst = _shown(dataset, sample, whole[lowest], scores, lowest)
    kinds = tuple(columns)
    own_range = [kind in ("noisy", "image") for kind in kinds]
    contact_sheet(picture, sections, columns=kinds, title=storage.redact(path), own_range=own_range)
    return Preview(
        storage.redact(path),
        str(picture),
        tuple(image.name for image in columns.values()),
        dataset.rows,
        len(sample),
        len(sample) - len(whole),
        ranked_by,
        _shown(dataset, sample, whole[chosen], scores, chosen),
        shown_worst,
        (*dataset.notes, *left_out),
    )


def _whole(columns: dict[str, ImageColumn], needed: Sequence[str], sample: Sample) -> npt.NDArray[np.int64]:
    """The rows of a sample that hold an image in each of the columns that are needed."""
    good = dict(zip(columns, sample.good, strict=True))
    return np.flatnonzero(np.logical_and.reduce([good[kind] for kind in needed]))


def _expected_worst(
    dataset: Dataset, columns: dict[str, ImageColumn], needed: Sequence[str], count: int, notes: list[str]
) -> tuple[Section, tuple[ShownRow, ...]] | None:
    """The rows of the whole dataset that the model expects least of; None where it expects something of none.

    Those among them that cannot be shown get a line in `notes`; None, too, where none of them can.
    """
    file, row, expected = lowest_rows(dataset, psnr_column(columns["denoised"].name), count)
    sample = rows_at(dataset, list(columns.values()), file, row)
    whole = _whole(columns, needed, sample)
    if len(whole) < len(row):
        lacking = len(row) - len(whole)
        notes.append(
            f"note: {lacking:,} of the {len(row):,} rows that the model expects least of have no image to show"
        )
    if not len(whole):
        return None
    scores = _scores(columns, sample, whole) | {"expected_psnr": expected[whole]}
    places = np.arange(len(whole))
    heading = f"lowest expected PSNR, of all {dataset.rows:,} rows"
    section = _section(heading, dataset, sample, whole, scores, places)
    return section, _shown(dataset, sample, whole, scores, places)


def _check_named_once(named: dict[str, str | None]) -> None:
    """Refuses flags that name the same column.

    Raises:
        FlagError: two do.
    """
    flags: dict[str, str] = {}
    for flag, name in named.items():
        if name is not None and flags.setdefault(name, flag) != flag:
            raise FlagError(
                f"{flags[name]} {name} and {flag} {name} are the same column",
                hint="a sheet shows a column once: name another, or leave one of the flags out",
            )


def _noisy_and_denoised(dataset: Dataset, *named: str | None) -> tuple[str | None, str | None]:
    """The names of these columns: those that are given, else those that an output's own manifest says."""
    noisy, denoised = (
        name if name in dataset.schema.names and name not in named else None for name in columns_of_output(dataset.path)
    )
    return noisy if named[0] is None else named[0], denoised if named[1] is None else named[1]


def _columns(
    dataset: Dataset, column: str | None, denoised: str | None, clean: str | None
) -> tuple[dict[str, ImageColumn], list[str]]:
    """The image columns by what they are on the sheet: noisy, denoised, clean; or `image` where there is but one.

    And a note for each that has such a name, and holds no images.
    """
    schema, first_rows = dataset.schema, dataset.first_rows
    others: dict[str, ImageColumn] = {}
    notes = []
    for kind, name in (("denoised", denoised), ("clean", clean)):
        if name is None and (kind not in schema.names or kind in {column, denoised, clean}):
            continue
        try:
            others[kind] = find_image_column(schema, kind if name is None else name, first_rows)
        except ColumnError as error:
            # A column that only happens to have the name is no mistake of the user's; a damaged one is to be seen.
            if name is not None:
                raise
            notes.append(f"not shown: {error.message}")
    rest = schema
    for other in others.values():
        rest = rest.remove(rest.get_field_index(other.name))
    try:
        found = {"noisy" if others else "image": find_image_column(rest, column, first_rows), **others}
    except ColumnError as error:
        named = denoised is not None or clean is not None
        if not others or column is not None or (named and image_candidates(rest)):
            raise
        if named:
            beside = " and ".join(repr(other.name) for other in others.values())
            raise ColumnError(
                f"no column of noisy images stands beside {beside}", hint="to see one column alone, name it by --column"
            ) from error
        # Clean digits alone, or denoised ones: the images themselves, beside nothing.
        try:
            found = {"image": find_image_column(schema, None, first_rows)}
        except ColumnError as of_all:
            # Which of those is the noisy one is the question, not what is known of the others.
            raise error if image_candidates(rest) else of_all from None
    if first_rows is not None:
        for image in found.values():
            check_float_range(first_rows[image.name], image, own_noise=True)
    return found, notes


def _ranked_by(scores: dict[str, npt.NDArray[np.float64]], expected: bool) -> str | None:
    if expected:
        return "expected_psnr"
    if "psnr" in scores and not np.isnan(scores["psnr"]).all():
        return "psnr"
    return "change" if "change" in scores else None


def _told_by_the_model(dataset: Dataset, columns: dict[str, ImageColumn]) -> list[str]:
    """The column in which the model says how good its images are, or none."""
    if "denoised" not in columns:
        return []
    name = psnr_column(columns["denoised"].name)
    return [name] if dataset.has_numbers(name) else []


def _scores(
    columns: dict[str, ImageColumn], sample: Sample, whole: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.float64]]:
    """`psnr` and `change` of each whole row, where the columns allow it; a PSNR is NaN without a clean image."""
    pixels = dict(zip(columns, (part[whole] for part in sample.pixels), strict=True))
    scores: dict[str, npt.NDArray[np.float64]] = {}
    if "clean" in pixels:
        result = pixels["denoised"] if "denoised" in pixels else pixels["noisy"]
        # Ink is compared with ink: light on dark, clean images may stand beside dark scans.
        light = dark_on_light(pixels["clean"])
        opposite = (dark_on_light(pixels["noisy"]) != light) & (dark_on_light(result) != light)
        psnr = metrics.psnr_from_mse(metrics.mse(turned(pixels["clean"], opposite), result))
        scores["psnr"] = np.where(sample.good[list(columns).index("clean")][whole], psnr, np.nan)
    if "denoised" in pixels:
        scores["change"] = np.sqrt(metrics.mse(pixels["noisy"], pixels["denoised"]))
    return scores


def _section(
    heading: str,
    dataset: Dataset,
    sample: Sample,
    rows: npt.NDArray[np.int64],
    scores: dict[str, npt.NDArray[np.float64]],
    places: npt.NDArray[np.int64],
) -> Section:
    """A section of the sheet: `rows` count in the sample, `places` in the scores."""
    tiles = []
    for row, place in zip(rows, places, strict=True):
        pictures = tuple(
            part[row].reshape(28, 28) if good[row] else None
            for part, good in zip(sample.pixels, sample.good, strict=True)
        )
        lines = [f"row {sample.row[row]:,}"]
        if len(dataset.files) > 1:
            name = PurePath(dataset.files[sample.file[row]]).name.removesuffix(".parquet")
            lines.append(name if len(name) <= 18 else f"{name[:11]}…{name[-6:]}")
        place_only = len(lines)
        if "psnr" in scores and not np.isnan(scores["psnr"][place]):
            lines.append(f"PSNR {scores['psnr'][place]:.1f} dB")
        if "expected_psnr" in scores and np.isfinite(scores["expected_psnr"][place]):
            lines.append(f"expects {scores['expected_psnr'][place]:.1f} dB")
        if "change" in scores and len(lines) == place_only:
            lines.append(f"RMS change {scores['change'][place]:.2f}")
        lines.append(range_of(sample.pixels[0][row]))
        tiles.append(Tile("\n".join(lines), pictures))
    return Section(heading, tuple(tiles))


def _shown(
    dataset: Dataset,
    sample: Sample,
    rows: npt.NDArray[np.int64],
    scores: dict[str, npt.NDArray[np.float64]],
    places: npt.NDArray[np.int64],
) -> tuple[ShownRow, ...]:
    return tuple(
        ShownRow(
            storage.redact(dataset.files[sample.file[row]]),
            int(sample.row[row]),
            float(scores["psnr"][place]) if "psnr" in scores and not np.isnan(scores["psnr"][place]) else None,
            float(scores["change"][place]) if "change" in scores else None,
            float(scores["expected_psnr"][place]) if "expected_psnr" in scores else None,
        )
        for row, place in zip(rows, places, strict=True)
    )
