"""What `inspect` finds of a path: for machines and for people."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

_NAMED_AT_MOST = 10


class Kind(StrEnum):
    """What a path can be."""

    PARQUET = "parquet"
    MODEL = "model"
    OUTPUT = "output"


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        kind: what the path is.
        facts: JSON-like; the keys are the reference of `inspect --json`.
        problems: each a line; without `verify` only what is seen at a glance.
        verified: whether everything was read.
    """

    path: str
    kind: Kind
    facts: dict[str, Any]
    problems: tuple[str, ...] = ()
    verified: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "kind": self.kind.value,
            **self.facts,
            "verified": self.verified,
            "problems": list(self.problems),
        }

    def lines(self) -> list[str]:
        """The same for people."""
        titles = {
            Kind.PARQUET: "Parquet",
            Kind.MODEL: "a model folder",
            Kind.OUTPUT: "an output of `denoise-batch infer`",
        }
        shown = [f"{self.path}: {titles[self.kind]}"]
        for name, value in self.facts.items():
            shown += _fact_lines(name.replace("_", " "), value)
        if self.problems:
            shown += ["problems:", *(f"  {problem}" for problem in self.problems)]
        elif self.verified:
            # What is left of an output that lost its manifest is sound Parquet, too.
            told = " in the rows that are there (no manifest tells how many should be)"
            shown.append(f"verified: no problems{told if self.kind is Kind.PARQUET else ''}")
        return shown


def shortened(problems: list[str]) -> tuple[str, ...]:
    """The first problems, and how many more there are."""
    if len(problems) <= _NAMED_AT_MOST:
        return tuple(problems)
    return (*problems[:_NAMED_AT_MOST], f"and {len(problems) - _NAMED_AT_MOST:,} more")


def _fact_lines(name: str, value: object, indent: str = "  ") -> list[str]:
    if value is None:  # nothing was said of it
        return []
    if isinstance(value, dict):
        if not value:
            return [f"{indent}{name}: none"]
        lines = [f"{indent}{name}:"]
        for key, inner in value.items():
            lines += _fact_lines(str(key), inner, indent + "  ")
        return lines
    if isinstance(value, bool):
        shown = "yes" if value else "no"
    elif isinstance(value, int):
        shown = f"{value:,}"
    elif isinstance(value, float):
        shown = f"{value:.6g}"
    elif isinstance(value, list):
        shown = ", ".join(str(item) for item in value)
    else:
        shown = str(value)
    return [f"{indent}{name}: {shown}"]
