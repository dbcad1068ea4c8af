"""What may be shown of a URI: where it leads, but neither user nor password nor query, which may be secret.

    redact("s3://KEY:SECRET@bucket/a.parquet?session_token=T") == "s3://bucket/a.parquet"

Every path or URI that a person gave goes through `redact` before it is printed, logged or written down; every text
that a library made of one goes through `without_secrets`.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl, unquote, unquote_plus

# `--data=s3://…` is one word of a command line; a person may forget a slash, and then it is still a secret.
_URI = re.compile(r"(?:-[^=\s]*=)?[a-z][a-z0-9+.-]+:/+", re.IGNORECASE)
_FLAG = re.compile(r"^-[^=\s]*=")
_HIDDEN = "…"
_PUBLIC = {"region", "scheme", "endpoint_override", "project_id", "default_bucket_location"}
"""Parts of a query that messages may repeat, but for a user and password in them."""

_SHORTEST = 3  # of the pieces looked for in other texts: shorter ones are in every text


def redact(path: str) -> str:
    """A URI without what may be secret in it: user, password, query and fragment. Local paths stay as they are."""
    match = _URI.match(path)
    if match is None:
        return path
    place = re.split(r"[?#]", path[match.end() :], maxsplit=1)[0]
    if _names_a_user(place):
        # A secret may hold anything that was not percent-encoded, a slash too: then the @ stands behind it. Where no @
        # is left, it holds a question mark, and nobody can say where it ends.
        place = place.rpartition("@")[2] if "@" in place else _HIDDEN
    return match.group(0) + place


def redact_all(value: Any) -> Any:
    """JSON-like content with every string in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_all(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(inner) for inner in value]
    return value


def has_secrets(path: str) -> bool:
    """Whether a path or URI holds what may be secret: a user, a password, more of a query than where a store is."""
    return bool(_secrets(path))


def without_secrets(text: str, path: str) -> str:
    """A library's message about a path, in which the path is redacted; where it repeats more of it, another one."""
    path = _FLAG.sub("", path)
    shown = text.replace(path, redact(path))
    return "(the reason repeats what may be secret)" if any(piece in shown for piece in _secrets(path)) else shown


def _names_a_user(place: str) -> bool:
    authority = unquote(place.partition("/")[0])
    _, colon, port = authority.rpartition(":")
    return "@" in authority or bool(colon and not port.isdigit())


def _secrets(path: str) -> set[str]:
    """What a text must not contain of what `redact` leaves out, in pieces, as it stands and decoded."""
    match = _URI.match(path)
    if match is None:
        return set()
    rest = path[match.end() :]
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    hidden = [
        value.rpartition("@")[0] if name in _PUBLIC else value for name, value in parse_qsl(rest.partition("?")[2])
    ]
    if _names_a_user(place):
        user, colon, password = ((place if "@" in place else rest).rpartition("@")[0] or place).partition(":")
        hidden.append(password if colon else user)
    pieces = {piece for part in hidden for text in (part, unquote(part), unquote_plus(part)) for piece in _split(text)}
    return {piece for piece in pieces if len(piece) >= _SHORTEST}


def _split(text: str) -> list[str]:
    return [text, *re.split(r"[:/@?#&=%]", text)]
