"""Where things are: paths and URIs.

A path or URI goes through `locate`, which gives a pyarrow filesystem and a path on it. Inputs may lie on any of them.
"""

from __future__ import annotations

import os
import re
import threading
import urllib.parse
from pathlib import Path
from typing import Any

from denoise_batch.errors import FlagError, MissingFileError, first_line
from denoise_batch.storage.redaction import redact as redact  # (the same name: others find it here)
from denoise_batch.storage.redaction import without_secrets as without_secrets

# A path that a program has tidied up, or a person mistyped, has one slash: still not a local path.
_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)
_NOT_IN_A_URI = re.compile(r"""[^\x21-\x7e]|["<>\\^`{|}]""")
_STORES = ("s3://", "gs://", "gcs://")
_ALIASES = {"gcs://": "gs://", "abfs://": "abfss://"}
_AT_ONCE = "allow_delayed_open=true"
"""Has pyarrow put a small object by one request; by default every upload is one of several parts."""

_STORE_ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "STORAGE_EMULATOR_HOST",
)
_known_stores: dict[Any, tuple[Any, str]] = {}
_lock = threading.Lock()


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

    Spaces and letters beyond ASCII need not be percent-encoded in a URI.

    Raises:
        FlagError: the URI cannot be understood, its scheme is unknown, or it is of a store and names no bucket, or a
            key with an empty part.
        MissingFileError: its store does not answer.
    """
    from pyarrow import fs

    scheme = _SCHEME.match(path)
    if scheme is None:
        return fs.LocalFileSystem(), str(Path(path).absolute())
    if not scheme.group(0).endswith("//"):
        raise FlagError(f"{redact(path)} has one slash behind {scheme.group(1)}:", hint="a URI has two: s3://bucket/x")
    if "#" in path:
        # pyarrow would leave out what follows, and read or write something else.
        raise FlagError(f"{redact(path)} has a # in it, where a URI ends", hint="write %23 for a # in a name")
    if not is_utf8(path):
        raise FlagError(f"{redact(path)} is not UTF-8, as a URI is", hint="give another name")
    start = scheme.group(0).lower()
    if start.startswith(_STORES) and start not in _STORES:
        raise _without_bucket(path)
    uri = start + _NOT_IN_A_URI.sub(lambda found: urllib.parse.quote(found.group()), path[len(start) :])
    if start not in _STORES:
        return _from_uri(uri, path)
    address, question, query = uri.partition("?")
    authority, _, key = address[len(start) :].partition("/")
    key = urllib.parse.unquote(key.rstrip("/"))
    if not authority.rpartition("@")[2]:
        raise _without_bucket(path)
    if key and "" in key.split("/"):
        # Stores may have such keys; pyarrow opens none.
        raise FlagError(f"{redact(path)} has an empty part", hint="write one slash, not two: s3://bucket/a/b")
    if start == "s3://" and _AT_ONCE not in query:
        question, query = "?", f"{query}&{_AT_ONCE}".lstrip("&")
    filesystem, bucket = _store(f"{start}{authority}{question}{query}", path)
    return filesystem, f"{bucket}/{key}" if key else bucket


def _without_bucket(path: str) -> FlagError:
    return FlagError(f"{redact(path)} names no bucket", hint="write it behind two slashes: s3://bucket/x")


def _store(uri: str, given: str) -> tuple[Any, str]:
    """The filesystem of a bucket, and its name: one for all of a process, and with it connections and credentials.

    A new one for each of a million objects would ask as often for the machine's credentials and the bucket's region.
    """
    known = (uri, *map(os.environ.get, _STORE_ENVIRONMENT))  # what is set after all makes it another one
    with _lock:
        if known not in _known_stores:
            _known_stores[known] = _from_uri(uri, given)
        return _known_stores[known]


def _from_uri(uri: str, given: str) -> tuple[Any, str]:
    import pyarrow as pa
    from pyarrow import fs

    from denoise_batch.storage.object_store import patient, patiently

    try:
        filesystem, inner = patiently(lambda: fs.FileSystem.from_uri(uri))  # S3 is asked for the bucket's region
    except (pa.ArrowException, ValueError) as error:
        raise FlagError(
            f"cannot open {redact(given)}: {_reason(error, given)}",
            hint="give a local path, or a URI such as s3://bucket/folder; in names, % ? # are %25 %3F %23",
        ) from None  # the cause's text may repeat the URI, and -v would print it
    except OSError as error:
        raise MissingFileError(
            f"{redact(given)} cannot be reached: {_reason(error, given)}",
            hint="check the bucket's name, the network and the credentials",
        ) from None
    return (filesystem if isinstance(filesystem, fs.LocalFileSystem) else patient(filesystem)), inner


def _reason(error: BaseException, given: str) -> str:
    return without_secrets(re.sub(rf"[?&]{_AT_ONCE}", "", first_line(error)), given)


def place_of(path: str) -> tuple[str, str]:
    """What a path or URI names, however it is spelled: an endpoint or an empty string, and the place there.

    Links of local paths are followed.
    """
    if not is_remote(path):
        return "", os.path.realpath(locate(path)[1])
    scheme = scheme_of(path).lower()
    return endpoint_of(path), f"{_ALIASES.get(scheme, scheme)}{locate(path)[1]}"


def endpoint_of(uri: str) -> str:
    """The server that a URI names in its query, or an empty string."""
    return urllib.parse.parse_qs(uri.partition("?")[2]).get("endpoint_override", [""])[0]


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


def is_utf8(path: str) -> bool:
    """Whether a path is text: on disks names may be any bytes, which neither PyArrow nor Ray takes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


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
