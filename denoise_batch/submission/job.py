"""A command as a Ray job: what runs on the cluster, for `submit` and for the entry points in jobs/.

    python -m denoise_batch.submission.job infer /shared/in.parquet /shared/out.parquet     # as `submit` starts it
    run(["infer", …])                                                            # as jobs/infer.py does

Nothing but the standard library is imported before it is known that the rest is there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING, TextIO, cast

from denoise_batch.submission.marks import LOG, RESULT, Marked

if TYPE_CHECKING:
    from collections.abc import Sequence

NEEDED = (
    "matplotlib",
    "numpy",
    "PIL",
    "platformdirs",
    "pyarrow",
    "ray",
    "safetensors",
    "scipy",
    "tensorboardX",
    "torch",
    "typer",
    "xxhash",
)
"""The packages, as they are imported, that every node must have; a test compares them with pyproject.toml."""

_OLDEST_PYTHON = (3, 11)
_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray Jobs sets it, and nothing else does


def run(arguments: Sequence[str], *, marked: bool = False) -> int:
    """Runs a command on the cluster that this process was started on, and gives its exit code.

    Args:
        marked: put marks before the lines, for `submit`.
    """
    if marked:
        sys.stdout = cast("TextIO", Marked(sys.stdout, RESULT))
        sys.stderr = cast("TextIO", Marked(sys.stderr, LOG))
    try:
        missing = _missing()
        if missing:
            sys.stderr.write(f"error: {missing}\n")
            sys.stderr.write(
                "hint: install the project on every node (cluster.yaml does), or name the packages in a runtime "
                "environment: --runtime-env jobs/runtime_env.yaml\n"
            )
            return 2
        from denoise_batch import cli, console
        from denoise_batch.submission.request import check_paths

        def check() -> None:
            if _IN_A_JOB in os.environ:
                check_paths(console.parse_command(cli.app, arguments))

        return console.run_command(cli.app, arguments, before=check)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _missing() -> str | None:
    """What this machine lacks, in one line; None where all is there."""
    version = sys.version_info[:2]
    if version < _OLDEST_PYTHON:
        return f"the cluster runs Python {version[0]}.{version[1]}; it takes 3.11, 3.12 or 3.13"
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return f"{os.uname().nodename}: the cluster's Python ({sys.executable}) lacks {', '.join(absent)}"
    return None


if __name__ == "__main__":
    from denoise_batch.cluster import leave

    leave(run(sys.argv[1:], marked=True))
