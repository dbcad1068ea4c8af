"""Where things are: paths and URIs, and the Parquet files that inputs name.

A path or URI goes through `locate`, which gives a pyarrow filesystem and a path on it. Inputs may lie on any of them.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from denoise_batch.errors import FlagError, MissingFileError, ParquetError
from denoise_batch.redaction import redact as redact  # (the same name: others find it here)
from denoise_batch.redaction import without_secrets as without_secrets

if TYPE_CHECKING:
    from collections.abc import Sequence

PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
_SKIPPED_SHOWN, _SKIPPED_NAMED = 10, 3
_UNFINISHED = "_denoise_batch/run/identity.json"
"""Stands below an output in an object store until that is complete."""
# A path that a program has tidied up, or a person mistyped, has one slash: still not a local path.
_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)


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
        return tuple(redact(path) for path in self.skipped[:_SKIPPED_SHOWN])

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


def is_uri(path: str) -> bool:
    return _SCHEME.match(path) is not None


def is_remote(path: str) -> bool:
    """Whether it is a URI of something else than a file system of this machine."""
    return is_uri(path) and not path.lower().startswith("file://")


def locate(path: str) -> tuple[Any, str]:
    """The pyarrow filesystem of a path or URI, and the path on it.

    Raises:
        FlagError: the URI's scheme is unknown, or its file system cannot be set up.
    """
    import pyarrow as pa
    from pyarrow import fs

    scheme = _SCHEME.match(path)
    if scheme is None:
        return fs.LocalFileSystem(), str(Path(path).absolute())
    if not scheme.group(0).endswith("//"):
        raise FlagError(f"{redact(path)} has one slash behind {scheme.group(1)}:", hint="a URI has two: s3://bucket/x")
    try:
        found: tuple[Any, str] = fs.FileSystem.from_uri(_in_one_request(path))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FlagError(
            f"cannot open {redact(path)}: {without_secrets(str(error).splitlines()[0], path)}",
            hint="give a local path, or a URI such as s3://bucket/folder",
        ) from None  # the cause's text may repeat the URI, and -v would print it
    if isinstance(found[0], fs.LocalFileSystem):
        return found
    from denoise_batch.object_store import patient

    return patient(found[0]), found[1]


def _in_one_request(path: str) -> str:
    """Has pyarrow put a small object into S3 by one request; by default every upload is one of several parts."""
    if not path.lower().startswith("s3://") or "allow_delayed_open=" in path or "#" in path:
        return path
    return f"{path}{'&' if '?' in path else '?'}allow_delayed_open=true"


def _ask_about(filesystem: Any, what: Any, given: str) -> Any:
    """`get_file_info`, with an error that shows no secret of the URI.

    Raises:
        MissingFileError: the file system does not answer, or does not let us in.
    """
    try:
        return filesystem.get_file_info(what)
    except OSError as error:
        reason = without_secrets(str(error).splitlines()[0] or type(error).__name__, given)
        raise MissingFileError(
            f"{redact(given)} cannot be looked at: {reason}", hint="check the address, the network and the credentials"
        ) from None


def list_inputs(inputs: Sequence[str]) -> Listing:
    """Lists the Parquet files that inputs name: files, folders (at every depth), globs, in the order given.

    Files and folders whose name starts with `_` or `.` are skipped below a folder, as every reader does. So are files
    whose name has another suffix than Parquet's; without any suffix they count (Hive writes `000000_0`).

    Raises:
        MissingFileError: an input does not exist, or holds no Parquet file.
        ParquetError: a partition folder's name is not safe.
    """
    files: list[InputFile] = []
    skipped: list[str] = []
    folders: list[str] = []
    for given in inputs:
        found = _list_one(given, skipped, folders)
        if not found:
            there = f"; there: {_named(len(skipped), skipped)}" if skipped else ""
            raise MissingFileError(
                f"no Parquet files in {redact(given)}",
                hint=f"looked for {', '.join(PARQUET_SUFFIXES)} files; names starting with _ or . are skipped{there}",
            )
        files.extend(found)
    seen: set[str] = set()
    for file in files:
        if file.path in seen:
            raise FlagError(f"{redact(file.path)} is named twice among the inputs", hint="name every input once")
        seen.add(file.path)
    single = len(inputs) == 1 and len(files) == 1 and not _is_folder_or_glob(inputs[0])
    return Listing(tuple(files), single, tuple(skipped), tuple(folders))


def stat_input(path: str) -> tuple[int, int]:
    """(size in bytes, mtime in ns) of an input file now.

    Raises:
        MissingFileError: it is gone.
    """
    if not is_uri(path):
        try:
            status = Path(path).stat()
        except OSError as error:
            raise MissingFileError(
                f"{path} is gone: {error.strerror}", hint="put the file back, then run again"
            ) from error
        return status.st_size, status.st_mtime_ns
    filesystem, inner = locate(path)
    info = _ask_about(filesystem, inner, path)
    if not info.is_file:
        raise MissingFileError(f"{redact(path)} is gone", hint="put the file back, then run again")
    return info.size, info.mtime_ns or 0


def _is_folder_or_glob(given: str) -> bool:
    if is_uri(given):
        filesystem, inner = locate(given)
        return not _ask_about(filesystem, inner, given).is_file
    return not Path(given).is_file()


def _list_one(given: str, skipped: list[str], folders: list[str]) -> list[InputFile]:
    if is_remote(given):
        return _list_uri(given, skipped)
    local = locate(given)[1] if is_uri(given) else given
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
        f"{redact(given)} does not exist", hint="check the path; relative paths start at the current folder"
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
    # Links to folders are followed, as readers do; one that leads back up would never end.
    visited: set[str] = set()
    for parent, folders, names in os.walk(root, followlinks=True, onerror=_raise_unlisted):
        real = os.path.realpath(parent)
        for name in folders:
            _check_not_skipped(name, Path(parent, name))
        folders[:] = [] if real in visited else sorted(name for name in folders if not _hidden(name))
        if real in visited:
            continue
        visited.add(real)
        hive = _joined(above, _hive_folder(Path(parent).relative_to(root).parts, parent))
        for name in sorted(names):
            if not _hidden(name) and _looks_like_parquet(name):
                found.append(_local_file(Path(parent, name), hive))
            else:
                _skip(str(Path(parent, name)), (name,), skipped)
    return sorted(found, key=lambda file: file.path)


def _list_uri(given: str, skipped: list[str]) -> list[InputFile]:
    from pyarrow import fs

    filesystem, inner = locate(given)
    scheme = _SCHEME.match(given)
    prefix = scheme.group(0) if scheme else ""
    query = "?" + given.split("?", 1)[1] if "?" in given else ""
    authority = given[len(prefix) :].split("/", 1)[0]
    user = authority.rpartition("@")[0] + "@" if "@" in authority else ""
    info = _ask_about(filesystem, inner, given)
    place = tuple(inner.rstrip("/").split("/"))
    if info.is_file:
        return [InputFile(given, _hive_above(place[:-1]), info.size, info.mtime_ns or 0)]
    if info.type == fs.FileType.NotFound:
        raise MissingFileError(f"{redact(given)} does not exist", hint="check the bucket, the path and the credentials")
    found: list[InputFile] = []
    start = len(inner.rstrip("/")) + 1
    listed = _ask_about(filesystem, fs.FileSelector(inner, recursive=True), given)
    names = {entry.path[start:] for entry in listed}
    for name in names:
        # Objects come one by one: some of an output are no output.
        if name.endswith(_UNFINISHED) and f"{name.removesuffix(_UNFINISHED)}_SUCCESS" not in names:
            raise unfinished(f"{redact(given).rstrip('/')}/{name.removesuffix(_UNFINISHED)}".rstrip("/"))
    for entry in listed:
        parts = entry.path[start:].split("/")
        for name in parts[:-1]:
            _check_not_skipped(name, f"{redact(given).rstrip('/')}/{entry.path[start:]}")
        if not entry.is_file:
            continue
        uri = f"{prefix}{user}{urllib.parse.quote(entry.path, safe='/=')}{query}"
        if not any(map(_hidden, parts)) and _looks_like_parquet(parts[-1]):
            hive = _joined(_hive_above(place), _hive_folder(tuple(parts[:-1]), redact(uri)))
            found.append(InputFile(uri, hive, entry.size, entry.mtime_ns or 0))
        else:
            _skip(f"{redact(given).rstrip('/')}/{entry.path[start:]}", parts, skipped)
    return sorted(found, key=lambda file: file.path)


def unfinished(shown: str) -> MissingFileError:
    """The error of an output whose run has not come to its end."""
    return MissingFileError(
        f"{shown} is not finished: its run was interrupted, or is still working",
        hint="run the same `denoise-batch infer` command again to go on with it",
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
        if not _safe_partition(part):
            raise ParquetError(f"{shown}: partition folder {part!r} is not safe", hint="rename the folder")
    return "/".join(kept)


def _hive_above(parts: tuple[str, ...]) -> str:
    """The `key=value` folders at the end of a path: `hive/*` and what a shell makes of it are to give the same."""
    kept = itertools.takewhile(lambda part: _safe_partition(part) and not _hidden(part), reversed(parts))
    return "/".join(reversed(list(kept)))


def _joined(above: str, below: str) -> str:
    return "/".join(part for part in (above, below) if part)


def _safe_partition(part: str) -> bool:
    key, equals, value = part.partition("=")
    return bool(key and equals) and value not in {".", ".."} and not set(part) & set("/\\\0")


def stays_inside(name: str, *, folders: bool = False) -> bool:
    """Whether a name that was read from a file leads nowhere but into the folder it is meant for.

    Args:
        folders: hive folders, `year=2024/month=05`, which may be none; else a single file's name.
    """
    if folders:
        return all(_safe_partition(part) for part in name.split("/")) if name else True
    return name not in {"", ".", ".."} and not set(name) & set("/\0")


def local_path(text: str | Path) -> Path:
    """A path on this machine, as a flag or its default gives it.

    Raises:
        FlagError: it is a URI.
    """
    text = str(text)
    if is_uri(text):
        raise FlagError(f"{redact(text)} is not a local path", hint="give a local path; copy what lies elsewhere")
    return Path(text)
