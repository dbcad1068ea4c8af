"""What a run tells: how far it is while it works, and what was done at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from denoise_batch.extra_columns import poor_lines
from denoise_batch.images import Polarity, levels_lines, taken_the_other_way
from denoise_batch.inference.manifest import BAD_ROWS, QUARANTINE
from denoise_batch.storage.listing import skipped_lines

_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class InferProgress:
    """How far a run is.

    Attributes:
        phase: `starting`, `denoising` or `publishing`.
        units: committed units, those of earlier sessions included.
        rows: rows done, those of earlier sessions and of units that are under way included.
        rate: rows a second of this session, since its first unit was begun.
        seconds_left: None while unknown.
        waiting: what the cluster has no room for, while nothing can be done for want of it.
    """

    phase: str
    units: int
    total_units: int
    rows: int
    total_rows: int
    bad_rows: int
    rate: float = 0.0
    seconds_left: float | None = None
    waiting: str = ""


@dataclass(frozen=True)
class InferReport:
    """What was done.

    Attributes:
        rows_in, rows_out, bad_rows: of the whole output, earlier sessions included.
        sessions: how often the run was started.
        attempts: of all units together, those that failed included.
        failed_attempts: how many of them came to nothing, in all sessions.
        rows_done: rows denoised in this session.
        seconds: wall time of this session; `denoising_seconds` runs from its first unit's start to its last receipt.
        rate: rows a second over `denoising_seconds`.
        stages: seconds of worker time by stage, over all units. Stages overlap, so they add up to more than `total`.
        types_changed: columns whose Parquet type Arrow cannot carry, and what they became.
        metadata_of_first: columns and keys whose metadata differs between files that were joined into one, which has
            the first one's.
        range_index: what is said of pandas' index where it stands in the files' footers alone, and is not kept.
        background: how much ink the set's paper had, of full ink, which was taken off; None: none.
        ink: how dark its ink was, of full ink, in the geometric mean; None: full.
        levels: how many levels of grey it had, where these are few; None: many.
        tone: what is said of paper and ink.
        dark_on_light: good rows that look so, whatever they were taken for.
        poor: good rows whose expected PSNR is below `POOR_PSNR`; None where the model was not asked.
        skipped_files: files in the input's folders that were left out because of their names.
        skipped: the first of them.
        output_bytes: of the data files, before a single file is joined.
        already_complete: an earlier run of the same request had shown the output; nothing was done.
    """

    output: str
    model: str
    model_sha256: str
    column: str
    polarity: str
    files: int
    units: int
    rows_in: int
    rows_out: int
    bad_rows: dict[str, int]
    quarantined: int
    resumed_units: int
    sessions: int
    attempts: int
    failed_attempts: int
    rows_done: int
    seconds: float
    denoising_seconds: float
    rate: float
    output_bytes: int
    background: float | None = None
    ink: float | None = None
    levels: int | None = None
    tone: list[str] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    types_changed: list[str] = field(default_factory=list)
    metadata_of_first: list[str] = field(default_factory=list)
    range_index: str = ""
    dark_on_light: int = 0
    poor: int | None = None
    skipped_files: int = 0
    skipped: list[str] = field(default_factory=list)
    already_complete: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary_lines(self) -> list[str]:
        bad = sum(self.bad_rows.values())
        reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in self.bad_rows.items())
        lines = [
            f"{self.output}: {self.rows_out:,} rows from {self.files:,} file{'s' if self.files != 1 else ''}",
            f"model {self.model}",
            self._column_line(),
        ]
        if not self.already_complete:
            lines.append(f"{self.rows_done:,} rows in {self.seconds:.1f} s, {self.rate:,.0f} images/s once started")
        if bad:
            lines.append(f"{bad:,} bad rows ({reasons}), listed in {BAD_ROWS} beside the manifest")
        if self.quarantined:
            lines.append(f"{self.quarantined:,} of them are set aside, whole, in {QUARANTINE}/ there")
        lines += skipped_lines(self.skipped_files, self.skipped)
        lines += self.tone + levels_lines(self.levels)
        lines += taken_the_other_way(self.polarity, self.dark_on_light, self.rows_in - bad)
        lines += poor_lines(self.poor, self.rows_in - bad)
        lines += [f"note: {change}, as PyArrow carries it" for change in self.types_changed]
        lines += self._metadata_lines()
        lines += [f"note: {self.range_index}"] if self.range_index else []
        if self.already_complete:
            return [*lines, "it is complete already: nothing was left to do"]
        if self.resumed_units:
            lines.append(f"{self.resumed_units:,} of {self.units:,} units were done by an earlier run")
        if self.failed_attempts:
            lines.append(f"{self.failed_attempts:,} of {self.attempts:,} attempts at units failed and were made again")
        return lines

    def _metadata_lines(self) -> list[str]:
        found = self.metadata_of_first
        if not found:
            return []
        more = f" and {len(found) - _NAMED_AT_MOST:,} more" if len(found) > _NAMED_AT_MOST else ""
        named = ", ".join(found[:_NAMED_AT_MOST])
        return [f"note: the files' metadata differs ({named}{more}): the joined file has the first one's"]

    def _column_line(self) -> str:
        if self.polarity != Polarity.EACH:
            return f"column {self.column!r}, {self.polarity}"
        return f"column {self.column!r}, each image's own polarity: {self.dark_on_light:,} dark-on-light"
