"""Which Parquet files inputs name: files, folders at every depth, globs, URIs; and which they leave out.

found = list_inputs(["scans/", "more/*.parquet"])
"""

from __future__ import annotations

import glob
import itertools
import os
import urllib.parse
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from denoise_batch import storage
from denoise_batch.errors import FlagError, MissingFileError, ParquetError
from denoise_batch.storage.table_formats import ICEBERG_FOLDER, LOGS, check_no_table, check_not_in_table

if TYPE_CHECKING:
    from collections.abc import Sequence

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
_SKIPPED_SHOWN, _SKIPPED_NAMED = 10, 3
_UNFINISHED = "_denoise_batch/run/identity.json"
"""Stands below an output in an object store until that is complete."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One Parquet file of the input.

    Attributes:
        path: absolute local path, or a URI.
        folder: the hive folders it lies in, `year=2024/month=05`, or an empty string: those below a folder or in a
            glob, and those right above what was named.
        size: bytes.
        mtime_ns: time of the last change, in nanoseconds since 1970.
    """

    path: str
    folder: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Listing:
    """What a request's inputs are.

    Attributes:
        files: every Parquet file, in input order.
        single_file: whether the request named one file, rather than a folder, a glob or several.
        skipped: files in the listed folders that their names leave out: another suffix than Parquet's, or `_x.parquet`.
        folders: the local folders that were listed, those that a glob matches among them.
    """

    files: tuple[InputFile, ...]
    single_file: bool
    skipped: tuple[str, ...]
    folders: tuple[str, ...]

    @property
    def skipped_shown(self) -> tuple[str, ...]:
        """The first of `skipped`, without secrets: enough to see what they are."""
        return tuple(storage.redact(path) for path in self.skipped[:_SKIPPED_SHOWN])

    @property
    def keys(self) -> list[str]:
        """Of the hive folders that the files lie in: `year`, `month`. None where the request named one file."""
        if self.single_file:
            return []
        parts = (part for file in self.files for part in file.folder.split("/") if part)
        return list(dict.fromkeys(part.partition("=")[0] for part in parts))


def skipped_lines(count: int, first: Sequence[str]) -> list[str]:
    """What is said of `count` files that were left out: a line, none where there are none."""
    if not count:
        return []
    files, names = ("files", "their names") if count != 1 else ("file", "its name")
    return [f"note: {count:,} {files} left out because of {names}: {_named(count, first)}"]


def _named(count: int, first: Sequence[str]) -> str:
    named = ", ".join(repr(PurePath(path).name) for path in first[:_SKIPPED_NAMED])  # a name may have line ends
    return f"{named}, …" if count > _SKIPPED_NAMED else named


def list_inputs(inputs: Sequence[str]) -> Listing:
    """Lists the Parquet files that inputs name: files, folders (at every depth), globs, in the order given.

    Files and folders whose name starts with `_` or `.` are skipped below a folder, as every reader does. So are files
    whose name has another suffix than Parquet's; without any suffix they count (Hive writes `000000_0`).

    Raises:
        FlagError: an input is an empty string, or a file is named twice.
        MissingFileError: an input does not exist, or holds no Parquet file.
        ParquetError: a partition folder's name is not safe, or an input is, or lies in, a table of Delta Lake, Hudi or
            Iceberg.
    """
    files: list[InputFile] = []
    skipped: list[str] = []
    folders: list[str] = []
    checked: set[tuple[str, str]] = set()
    known: set[tuple[str, str]] = set()
    for given in inputs:
        listed = len(folders)
        found = _list_one(given, skipped, folders, checked)
        if not found:
            there = f"; there: {_named(len(skipped), skipped)}" if skipped else ""
            # Only below a folder suffixes count: a glob takes whatever it matches.
            looked = f"looked for {', '.join(PARQUET_SUFFIXES)} files"
            if not storage.is_remote(given) and len(folders) == listed:
                looked = "the glob matches no file or folder"
            raise MissingFileError(
                f"no Parquet files in {storage.redact(given)}",
                hint=f"{looked}; names starting with _ or . are skipped{there}",
            )
        files.extend(found)
        # A link may show a file again below one input, as it does to readers; two inputs are each of their own.
        paths: set[str] = set()
        places: set[tuple[str, str]] = set()
        for file in found:
            place = storage.place_of(file.path) if len(inputs) > 1 else ("", file.path)
            if file.path in paths or place in known:
                raise FlagError(
                    f"{storage.redact(file.path)} is named twice among the inputs", hint="name every input once"
                )
            paths.add(file.path)
            places.add(place)
        known |= places
    check_not_in_table(file.path for file in files if not storage.is_remote(file.path))
    single = len(inputs) == 1 and len(files) == 1 and not _is_folder_or_glob(inputs[0])
    return Listing(tuple(files), single, tuple(skipped), tuple(folders))


def stat_input(path: str) -> tuple[int, int]:
    """(size in bytes, mtime in ns) of an input file now.

    Raises:
        MissingFileError: it is gone.
    """
    if not storage.is_uri(path):
        try:
            status = Path(path).stat()
        except OSError as error:
            raise MissingFileError(
                f"{path} is gone: {error.strerror}", hint="put the file back, then run again"
            ) from error
        return status.st_size, status.st_mtime_ns
    filesystem, inner = storage.locate(path)
    info = storage.ask_about(filesystem, inner, path)
    if not info.is_file:
        raise MissingFileError(f"{storage.redact(path)} is gone", hint="put the file back, then run again")
    return info.size, info.mtime_ns or 0


def _is_folder_or_glob(given: str) -> bool:
    if storage.is_uri(given):
        filesystem, inner = storage.locate(given)
        return not storage.ask_about(filesystem, inner, given).is_file
    return not Path(given).is_file()


def _list_one(given: str, skipped: list[str], folders: list[str], checked: set[tuple[str, str]]) -> list[InputFile]:
    storage.refuse_empty(given)
    if storage.is_remote(given):
        return _list_uri(given, skipped, checked)
    local = storage.locate(given)[1] if storage.is_uri(given) else given
    path = Path(local)
    if path.is_dir():
        folders.append(local)
        return _list_folder(path, skipped, _hive_above(path.absolute().parts))
    if path.exists():
        return [_local_file(path, _hive_above(path.absolute().parts[:-1]))]
    if glob.has_magic(local):
        fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        named = path.relative_to(fixed).parts
        _check_listable(fixed, named)
        above = _hive_above(fixed.absolute().parts)
        found: list[InputFile] = []
        for match in _matches(local):
            parts = match.relative_to(fixed).parts
            for part in parts:
                _check_not_skipped(part, match)
            if any(map(_hidden, parts)) and not any(map(_hidden, named)):  # unless the pattern asks for them
                _skip(str(match), parts, skipped)
            elif match.is_dir():
                folders.append(str(match))
                found += _list_folder(match, skipped, _joined(above, _hive_folder(parts, str(match))))
            else:
                found.append(_local_file(match, _joined(above, _hive_folder(parts[:-1], str(match)))))
        return found
    raise MissingFileError(
        f"{storage.redact(given)} does not exist", hint="check the path; relative paths start at the current folder"
    )


def _matches(pattern: str) -> list[Path]:
    return [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 (any depth, absolute or not)


def _check_listable(fixed: Path, named: tuple[str, ...]) -> None:
    """`glob` passes over folders that it may not list, and what is in them would be lost without a word."""
    for depth in range(len(named)):
        for folder in _matches(str(fixed.joinpath(*named[:depth]))):
            if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
                raise MissingFileError(f"{folder} cannot be listed", hint="check the folder's permissions")


def _local_file(path: Path, folder: str) -> InputFile:
    if not os.access(path, os.R_OK):
        raise MissingFileError(f"{path} cannot be read", hint="check the file's permissions")
    status = path.stat()
    return InputFile(str(path.absolute()), folder, status.st_size, status.st_mtime_ns)


def _list_folder(root: Path, skipped: list[str], above: str = "") -> list[InputFile]:
    found: list[InputFile] = []
    # Links to folders are followed, as readers do, wherever else these folders show; one that leads back up would never
    # end.
    above_it: dict[str, frozenset[str]] = {}
    for parent, folders, names in os.walk(root, followlinks=True, onerror=_raise_unlisted):
        real = os.path.realpath(parent)
        line = above_it.pop(str(Path(parent)), frozenset())
        for name in folders:
            _check_not_skipped(name, Path(parent, name))
        folders[:] = [] if real in line else sorted(name for name in folders if not _hidden(name))
        if real in line:
            continue
        above_it |= {str(Path(parent, name)): line | {real} for name in folders}
        hive = _joined(above, _hive_folder(Path(parent).relative_to(root).parts, parent))
        for name in sorted(names):
            if not _hidden(name) and _looks_like_parquet(name):
                found.append(_local_file(Path(parent, name), hive))
            else:
                _skip(str(Path(parent, name)), (name,), skipped)
    return sorted(found, key=lambda file: file.path)


def _list_uri(given: str, skipped: list[str], checked: set[tuple[str, str]]) -> list[InputFile]:
    from pyarrow import fs

    filesystem, inner = storage.locate(given)
    address, question, query = given.partition("?")
    shown, inner = storage.redact(given).rstrip("/"), inner.rstrip("/")
    info = storage.ask_about(filesystem, inner, given)
    place = tuple(inner.split("/"))
    if info.type == fs.FileType.NotFound:
        globs = "; globs are for local paths: name the folder" if glob.has_magic(address) else ""
        raise MissingFileError(
            f"{storage.redact(given)} does not exist", hint=f"check the bucket, the path and the credentials{globs}"
        )
    above = {(storage.endpoint_of(given), "/".join(place[:depth])) for depth in range(2, len(place))} - checked
    _check_above(filesystem, sorted(folder for _, folder in above), shown)
    checked |= above
    listed = storage.ask_about(filesystem, _below(inner), given)
    if info.is_file:
        if listed:
            raise FlagError(
                f"{shown} is an object and a folder as well: it holds {listed[0].path}",
                hint="name the objects, or move them apart",
            )
        return [InputFile(given, _hive_above(place[:-1]), info.size, info.mtime_ns or 0)]
    found: list[InputFile] = []
    start = len(inner) + 1
    names = {entry.path[start:] for entry in listed}
    for name in names:
        # Objects come one by one: some of an output are no output.
        if name.endswith(_UNFINISHED) and f"{name.removesuffix(_UNFINISHED)}_SUCCESS" not in names:
            raise unfinished(f"{shown}/{name.removesuffix(_UNFINISHED)}".rstrip("/"))
    check_no_table(shown, names)
    for entry in listed:
        parts = entry.path[start:].split("/")
        for name in parts[:-1]:
            _check_not_skipped(name, f"{shown}/{entry.path[start:]}")
        if not entry.is_file:
            continue
        uri = f"{address.rstrip('/')}/{urllib.parse.quote(entry.path[start:], safe='/=')}{question}{query}"
        if not any(map(_hidden, parts)) and _looks_like_parquet(parts[-1]):
            if "" in parts:  # which pyarrow lists, but does not open
                raise MissingFileError(
                    f"{shown}/{entry.path[start:]} cannot be opened: its key has an empty part",
                    hint="rename the object",
                )
            hive = _joined(_hive_above(place), _hive_folder(tuple(parts[:-1]), storage.redact(uri)))
            found.append(InputFile(uri, hive, entry.size, entry.mtime_ns or 0))
        else:
            _skip(f"{shown}/{entry.path[start:]}", parts, skipped)
    return sorted(found, key=lambda file: file.path)


def _check_above(filesystem: Any, folders: list[str], shown: str) -> None:
    """Refuses what lies in an output that is not finished, as a folder of its partitions does, or in a table."""
    from denoise_batch.storage.object_store import in_parallel

    def look(what: Any) -> list[Any]:
        try:
            return [info for info in filesystem.get_file_info(what) if info.type.name != "NotFound"]
        except OSError:  # the credentials may be for what lies below alone
            return []

    def check(folder: str) -> None:
        names = (f"{folder}/{name}" for name in (_UNFINISHED, "_SUCCESS", *LOGS))
        there = {info.path[len(folder) + 1 :] for info in look(list(names))}
        if _UNFINISHED in there and "_SUCCESS" not in there:
            raise unfinished(f"{folder}, in which {shown} lies,")
        there |= {info.path[len(folder) + 1 :] for info in look(_below(f"{folder}/{ICEBERG_FOLDER}"))}
        check_no_table(folder, (f"{name}/" if name in LOGS else name for name in there))

    in_parallel(check, folders)


def _below(folder: str) -> Any:
    from pyarrow import fs

    return fs.FileSelector(folder, recursive=True, allow_not_found=True)


def unfinished(shown: str, command: str = "infer") -> MissingFileError:
    """The error of an output whose run has not come to its end."""
    return MissingFileError(
        f"{shown} is not finished: its run was interrupted, or is still working",
        hint=f"run the same `denoise-batch {command}` command again to go on with it",
    )


def _hidden(name: str) -> bool:
    # A hive partition column may itself start with an underscore (`_year=2024`); readers skip those too.
    return name.startswith(("_", "."))


def _skip(path: str, parts: Sequence[str], skipped: list[str]) -> None:
    """Notes a file that is left out, unless nobody would miss it: in a hidden folder, or hidden and not Parquet."""
    *folders, name = parts
    if not any(map(_hidden, folders)) and (not _hidden(name) or name.lower().endswith(PARQUET_SUFFIXES)):
        skipped.append(path)


def _check_not_skipped(name: str, shown: object) -> None:
    """Readers do not agree on `_key=value`: Spark reads it, PyArrow skips it. Neither may happen without a word."""
    if name.startswith("_") and "=" in name:
        raise ParquetError(f"{shown}: PyArrow would skip the partition folder {name!r}", hint="rename the folder")


def _raise_unlisted(error: OSError) -> None:
    raise MissingFileError(
        f"{error.filename} cannot be listed: {error.strerror}", hint="check the folder's permissions and its disk"
    ) from error


def _looks_like_parquet(name: str) -> bool:
    return name.lower().endswith(PARQUET_SUFFIXES) or "." not in name


def _hive_folder(parts: tuple[str, ...], shown: str) -> str:
    """The `key=value` folders among a file's parents; other folders only group files and are not kept."""
    kept = [part for part in parts if "=" in part]
    for part in kept:
        if not storage.safe_partition(part):
            raise ParquetError(f"{shown}: partition folder {part!r} is not safe", hint="rename the folder")
    return "/".join(kept)


def _hive_above(parts: tuple[str, ...]) -> str:
    """The `key=value` folders at the end of a path: `hive/*` and what a shell makes of it are to give the same."""
    kept = itertools.takewhile(lambda part: storage.safe_partition(part) and not _hidden(part), reversed(parts))
    return "/".join(reversed(list(kept)))


def _joined(above: str, below: str) -> str:
    return "/".join(part for part in (above, below) if part)
