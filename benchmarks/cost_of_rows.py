"""What a run costs by the number of its rows: start-up, then a straight line.

    python benchmarks/cost_of_rows.py --rows 10000 100000 1000000 10000000 --picture docs/figures/cost-of-rows.png

Prints a table of whole runs on this machine: `denoise-batch infer` with an actor a core and with one of all cores, and
the loop that a user would write (`pipelines.py`); of each the line that was fitted to it, seconds to start and
microseconds a row. Draws measurements and lines. Digits are drawn, a million at most: a larger input has these files
several times, each under a name of its own.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
from pipelines import ONE_ACTOR, OURS, Case, draw, machine, timed

DRAWN = 1_000_000
GIVEN = ("binary", "zstd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--most", type=int, default=1_000_000, help="rows of the largest run but `infer`'s own")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    from denoise_batch.bundle import find_bundle

    case = Case(find_bundle(None).folder.absolute(), *GIVEN, others="alike")
    measured: dict[str, dict[int, float]] = {OURS: {}, ONE_ACTOR: {}, "loop": {}}
    with tempfile.TemporaryDirectory(prefix="cost-") as folder:
        drawn = Path(folder, "drawn")
        draw(drawn, min(max(arguments.rows), DRAWN), *GIVEN)
        for wanted in sorted(arguments.rows):
            source = Path(folder, f"in-{wanted}")
            rows = _input(source, drawn, wanted)
            for name, found in measured.items():
                if name == OURS or rows <= arguments.most:
                    found[rows], _ = timed(name, source, Path(folder, "out"), rows, case)
                    print(f"{rows:,} rows, {name}: {found[rows]:.1f} s", flush=True)
    print(f"\n{GIVEN[0]}, {GIVEN[1]}; model {case.model.name}; {machine()}; seconds of whole runs\n")
    counts = sorted(measured[OURS])
    print(f"| | {' | '.join(f'{rows:,} rows' for rows in counts)} | to start, s | a row, µs |")
    print("|---" * (len(counts) + 3) + "|")
    lines = {name: _line(found) for name, found in measured.items()}
    for name, found in measured.items():
        shown = " | ".join(f"{found[rows]:.1f}" if rows in found else "–" for rows in counts)
        print(f"| {name} | {shown} | {lines[name][0]:.1f} | {lines[name][1] * 1e6:.1f} |")
    if arguments.picture:
        _draw_lines(arguments.picture, measured, lines)


def _input(source: Path, drawn: Path, wanted: int) -> int:
    """Makes a folder of about so many rows; their number."""
    if wanted < DRAWN:
        draw(source, wanted, *GIVEN)
        return wanted
    source.mkdir()
    times = round(wanted / DRAWN)
    for time in range(times):
        for file in sorted(drawn.iterdir()):
            os.link(file, source / f"{time:03d}-{file.name}")
    return times * DRAWN


def _line(found: dict[int, float]) -> tuple[float, float]:
    """Seconds at no rows, and a row; fitted so that each measurement's error counts by its own size."""
    rows, seconds = np.array(list(found)), np.array(list(found.values()))
    slope, start = np.polyfit(rows, seconds, 1, w=1 / seconds)
    return float(start), float(slope)


def _draw_lines(path: Path, measured: dict[str, dict[int, float]], lines: dict[str, tuple[float, float]]) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, found), marker in zip(measured.items(), "os^", strict=True):
        start, slope = lines[name]
        (points,) = axes.plot(list(found), list(found.values()), marker, markersize=6)
        rows = np.geomspace(min(found), max(found), 200)
        label = f"{name}: {start:.1f} s + {slope * 1e6:.1f} µs a row"
        axes.plot(rows, start + slope * rows, color=points.get_color(), linewidth=1.2, label=label)
    axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="seconds, whole run", title=machine())
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
