"""Where things are: paths and URIs.

A path or URI goes through `locate`, which gives a pyarrow filesystem and a path on it. Inputs may lie on any of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from denoise_batch.errors import FlagError, MissingFileError, first_line
from denoise_batch.redaction import redact as redact  # (the same name: others find it here)
from denoise_batch.redaction import without_secrets as without_secrets

# A path that a program has tidied up, or a person mistyped, has one slash: still not a local path.
_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)


def is_uri(path: str) -> bool:
    return _SCHEME.match(path) is not None


def is_remote(path: str) -> bool:
    """Whether it is a URI of something else than a file system of this machine."""
    return is_uri(path) and not path.lower().startswith("file://")


def scheme_of(path: str) -> str:
    """`s3://` of a URI, an empty string of a path."""
    found = _SCHEME.match(path)
    return found.group(0) if found else ""


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
            f"cannot open {redact(path)}: {without_secrets(first_line(error), path)}",
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


def ask_about(filesystem: Any, what: Any, given: str) -> Any:
    """`get_file_info`, with an error that shows no secret of the URI.

    Raises:
        MissingFileError: the file system does not answer, or does not let us in.
    """
    try:
        return filesystem.get_file_info(what)
    except OSError as error:
        reason = without_secrets(first_line(error), given)
        raise MissingFileError(
            f"{redact(given)} cannot be looked at: {reason}", hint="check the address, the network and the credentials"
        ) from None


def safe_partition(part: str) -> bool:
    """Whether a folder `key=value` leads nowhere but below."""
    key, equals, value = part.partition("=")
    return bool(key and equals) and value not in {".", ".."} and not set(part) & set("/\\\0")


def stays_inside(name: str, *, folders: bool = False) -> bool:
    """Whether a name that was read from a file leads nowhere but into the folder it is meant for.

    Args:
        folders: hive folders, `year=2024/month=05`, which may be none; else a single file's name.
    """
    if folders:
        return all(safe_partition(part) for part in name.split("/")) if name else True
    return name not in {"", ".", ".."} and not set(name) & set("/\0")


def refuse_empty(path: str) -> None:
    """Refuses a path of no letters, which would mean the current folder with all that is in it.

    Raises:
        FlagError: it is empty.
    """
    if not path:
        raise FlagError(
            "a path is empty: ''", hint="give a path, or . for the current folder; is a variable of the shell empty?"
        )


def local_path(text: str | Path) -> Path:
    """A path on this machine, as a flag or its default gives it.

    Raises:
        FlagError: it is empty, or a URI.
    """
    text = str(text)
    refuse_empty(text)
    if is_uri(text):
        raise FlagError(f"{redact(text)} is not a local path", hint="give a local path; copy what lies elsewhere")
    return Path(text)
