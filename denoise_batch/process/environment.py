"""Environment variables of Ray's processes: what must not be set, and what is set for a while."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from denoise_batch.errors import FlagError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_UNSAFE_PREFIX = "RAY_DATA_AUTOLOAD_"
"""Ray 2.60 has _PYEXTENSIONTYPE, _CLOUDPICKLE_TENSOR_METADATA and _PICKLE_OBJECT_SCALAR: each lets Ray unpickle what a
Parquet file holds, which runs code of whoever made the file. A later Ray may have more of them."""

_UNSAFE_SWITCHES = ("RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",)
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def refuse_unsafe_switches() -> None:
    """Raises FlagError where the environment lets Ray run code that data carry; to be asked in workers as well."""
    for name, value in sorted(os.environ.items()):
        unsafe = name.startswith(_UNSAFE_PREFIX) or name in _UNSAFE_SWITCHES
        if unsafe and value.lower() not in {"", "0", "false"}:
            raise FlagError(
                f"{name} is set: Ray would run code found in data files", hint=f"unset {name}, then run again"
            )


def refuse_old_ray_train() -> None:
    """Raises FlagError where the environment chooses Ray Train's first version, whose interface is another."""
    name = "RAY_TRAIN_V2_ENABLED"
    if os.environ.get(name, "1").lower() not in {"1", "true"}:  # as Ray reads it
        raise FlagError(
            f"{name} is {os.environ[name]!r}: training needs Ray Train V2", hint=f"unset {name}, then run again"
        )


@contextlib.contextmanager
def environment(names: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables that are not set, for as long as it lasts."""
    added = {name: value for name, value in names.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def no_job() -> Iterator[None]:
    """Within a cluster's job, `ray.init` would have a Ray of our own make the job's runtime environment once more.

    Its parts are in the cluster. This process has it, and hands it on to what it starts.
    """
    job = os.environ.pop(_JOB_CONFIG, None)
    try:
        yield
    finally:
        if job is not None:
            os.environ[_JOB_CONFIG] = job
