"""What a training was asked for, and what of it is there already: the model, or the folder of an unfinished run.

identity = identity_of(settings, recipe, parquet, initial)
bundle = made_before(output, identity)        # OutputExists where another request made it
with publishing.exclusive(folder):
    enter(folder, settings, identity)         # ResumeError where another request has begun there
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from denoise_batch import __version__, errors, storage
from denoise_batch.bundle import read_bundle
from denoise_batch.bundle.history import HISTORY_FILE
from denoise_batch.errors import OutputError, ResumeError, first_line
from denoise_batch.storage import publishing
from denoise_batch.training.failure import make_room
from denoise_batch.training.recipes import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from denoise_batch.bundle import Bundle
    from denoise_batch.training.data import ParquetImages
    from denoise_batch.training.recipes import TrainSettings

RAY_FOLDER = "ray"
"""What of an unfinished training's folder is Ray Train's."""

CHECKPOINT_FOLDER = "checkpoint.writing"
"""In it a checkpoint is made before Ray Train takes it."""

_SETTINGS_FILE = "settings.json"
_FREE = {"workers", "device", "resident_limit", "overwrite", "command", "address", "verbose", "output", "mnist"}
"""Settings that may change between an interrupted run and the one that goes on from it."""


def identity_of(
    settings: TrainSettings, recipe: Recipe, parquet: ParquetImages | None, initial: Bundle | None
) -> dict[str, Any]:
    """What makes a training this one and no other: whatever changes its result."""
    given = {field.name: getattr(settings, field.name) for field in fields(settings)}
    replaced = set(given) & {field.name for field in fields(Recipe)}  # already in the recipe
    kept = {name: value for name, value in given.items() if name not in _FREE | replaced | {"recipe", "data", "init"}}
    if initial is not None:
        kept["init"] = initial.sha256
    data = {"source": "MNIST"} if parquet is None else parquet.identity()
    identity: dict[str, Any] = json.loads(json.dumps({"recipe": recipe.to_json(), "data": data, **kept}))
    return identity


def digest_of(identity: dict[str, Any]) -> str:
    """What model.json has of it: another version of this package may train otherwise."""
    return hashlib.sha256(json.dumps([__version__, identity], sort_keys=True).encode()).hexdigest()


def made_before(output: Path, identity: dict[str, Any]) -> Bundle:
    """The finished model folder, if a training of the same settings and data made it.

    Raises:
        OutputExists: another one did, or it is no sound model folder of this version.
    """
    exists = publishing.output_exists(output)
    try:
        bundle = read_bundle(output)
        if bundle.model.get("request") != digest_of(identity):
            raise errors.OutputExists(
                f"{exists.message}, made with other settings, of other data or by another version", hint=exists.hint
            )
        bundle.load()
    except errors.ModelError as error:
        raise errors.OutputExists(f"{exists.message}, but cannot be used: {error.message}", hint=exists.hint) from error
    return bundle


def remove_left_over(folder: Path, identity: dict[str, Any], bundle: Bundle) -> None:
    """Removes the folder of the very run that made the model, if it died before it could.

    An unfinished training of the same settings, which `--overwrite` has begun since, has another history.
    """
    with contextlib.suppress(OSError, OutputError):  # it is nothing that the model hangs on
        made = (bundle.folder / HISTORY_FILE).read_bytes()
        if (folder / HISTORY_FILE).read_bytes() == made:
            with publishing.exclusive(folder):
                if begun(folder) == identity and (folder / HISTORY_FILE).read_bytes() == made:
                    publishing.remove(folder)


def begun(folder: Path) -> Any:
    """The identity of the unfinished training in the folder: None where there is none, {} where it cannot be read."""
    try:
        return json.loads((folder / _SETTINGS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def enter(folder: Path, settings: TrainSettings, identity: dict[str, Any]) -> None:
    """Goes on with the unfinished training in the folder, or begins a new one there.

    Raises:
        ResumeError: the unfinished one is another.
    """
    before = begun(folder)
    if before is not None and before != identity:
        if not settings.overwrite and (folder / HISTORY_FILE).exists():  # or nothing is lost: not an epoch was done
            if not before:
                raise ResumeError(
                    f"{folder / _SETTINGS_FILE} cannot be read: of what settings the unfinished training was",
                    hint="give --overwrite to begin again",
                )
            raise ResumeError(
                f"an unfinished training of {settings.output} has other settings: "
                + "; ".join(_differences(before, identity)),
                hint="repeat its settings to go on with it, or give --overwrite to begin again",
            )
        before = None
    if before is not None:
        named = _check_snapshot(folder / RAY_FOLDER / "checkpoint_manager_snapshot.json")
        # Of others one was being written when the run ended, of a full disk perhaps.
        for checkpoint in (folder / RAY_FOLDER).glob("checkpoint_*"):
            if checkpoint.is_dir() and checkpoint.name not in named:
                publishing.remove(checkpoint)
    if before is None:
        for entry in folder.iterdir():
            if entry.name != "lock":
                publishing.remove(entry)
        publishing.write_file(folder / _SETTINGS_FILE, json.dumps(identity, indent=1).encode())
    (folder / "progress.json").unlink(missing_ok=True)
    publishing.remove(folder / CHECKPOINT_FOLDER)
    make_room(folder)


def _check_snapshot(path: Path) -> set[str]:
    """The checkpoints that Ray Train's own notes name; none where there are no notes yet.

    Ray writes them in place: a kill or a full disk may leave half of them, over which its controller would die.

    Raises:
        ResumeError: they cannot be read, or name what is not there or lies outside of the training's folder.
    """
    hint = f"remove {path.parents[1]} to begin again"

    def names(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            yield from [value["checkpoint_dir_name"]] if "checkpoint_dir_name" in value else []
            value = list(value.values())
        for inner in value if isinstance(value, list) else []:
            yield from names(inner)

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return set()
    except (OSError, ValueError) as error:
        raise ResumeError(f"{path} is damaged: {first_line(error)}", hint=hint) from error
    named = list(names(content))
    for name in named:
        if not (isinstance(name, str) and storage.stays_inside(name)):
            raise ResumeError(f"{path} names a checkpoint elsewhere: {name!r}", hint=hint)
        if not (path.parent / name).is_dir():
            raise ResumeError(f"{path} names a checkpoint that is gone: {name}", hint=hint)
    return set(named)


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """`key: old, now new` for each leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now and name == "data.files" and before and now:
        names, there = ([PurePath(file[0]).name for file in files] for files in (before, now))
        if names == there:
            names, there = ([file[0] for file in files] for files in (before, now))
        if names != there:
            before, now = (
                f"{files[0]}{f' and {len(files) - 1:,} more' if files[1:] else ''}" for files in (names, there)
            )
            yield f"the data were {before}, now {now}"
        else:
            yield f"{next(file[0] for file, other in zip(now, before, strict=True) if file != other)} has changed"
    elif before != now:
        shown = [text if len(text) <= 60 else f"{text[:57]}..." for text in (json.dumps(before), json.dumps(now))]
        yield f"{name} was {shown[0]}, now {shown[1]}"
