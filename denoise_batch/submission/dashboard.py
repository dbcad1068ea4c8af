"""A cluster's dashboard, which takes jobs: where it is, whether it lets us in, and what it answers when it fails.

cluster = reach("http://localhost:8265")
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denoise_batch.errors import FlagError, NetworkError, RequestError
from denoise_batch.storage.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PORT = 8265
"""Ray's dashboard, where an address names no port."""

_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_TIMEOUT_SECONDS = 10.0
_REQUEST_SECONDS = 60.0
_TALKATIVE = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that answers, and lets us in.

    Attributes:
        url: its dashboard.
        ray_version: what it runs.
        client: Ray's `JobSubmissionClient`.
    """

    url: str
    ray_version: str
    client: Any


def reach(address: str | None) -> Cluster:
    """Finds the cluster's dashboard and makes sure that it lets us in and runs our version of Ray.

    Args:
        address: `http://HEAD:8265`; None takes RAY_API_SERVER_ADDRESS, else RAY_ADDRESS.

    Raises:
        FlagError: no address was given.
        NetworkError: nothing answers there, or not Ray.
        RequestError: it does not let us in, or runs another version of Ray.
    """
    urls = _urls(address)
    failure: NetworkError | None = None
    for url in urls:
        try:
            version, headers = _ask_version(url)
        except NetworkError as error:
            failure = failure or error
            continue
        ours = importlib.metadata.version("ray")
        if version != ours:
            raise RequestError(
                f"{redact(url)} runs Ray {version}, this installation has Ray {ours}: jobs need the same on both sides",
                hint=f"install ray=={version} here, or start the cluster with Ray {ours} (cluster.yaml pins it)",
            )
        return Cluster(url, version, _client(url, headers))
    assert failure is not None
    raise failure


def _ask_version(url: str) -> tuple[str, dict[str, str]]:
    """The cluster's version of Ray, and the headers that it wants.

    The token is sent where RAY_AUTH_MODE says so or the cluster asks for one, never unasked.
    """
    import requests

    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    token = _token() if mode == "token" else None
    for _ in range(2):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = requests.get(f"{url}/api/version", headers=headers, timeout=_TIMEOUT_SECONDS)
            status = answer.status_code
        except (requests.RequestException, ValueError) as error:
            reason = "no answer in time" if isinstance(error, requests.Timeout) else "nothing answers there"
            raise NetworkError(
                f"no Ray dashboard at {redact(url)}: {reason}",
                hint="check --address and that the cluster is up; a dashboard listens on its head's loopback alone "
                f"unless told otherwise: `ray dashboard cluster.yaml` brings it to http://localhost:{PORT}",
            ) from error
        if status == 401 and token is None and mode != "disabled":
            token = _token()
            if token is not None:
                continue
        break
    if status in {401, 403}:
        what = "wants a token, and there is none here" if token is None else "does not accept the token that is here"
        raise RequestError(
            f"{redact(url)} {what}",
            hint="put the cluster's token (on its head: ray get-auth-token) into ~/.ray/auth_token or RAY_AUTH_TOKEN, "
            "and leave RAY_AUTH_MODE unset or `token`",
        )
    try:
        version = answer.json()["ray_version"] if status == 200 else None
    except (ValueError, KeyError, TypeError):
        version = None
    if not isinstance(version, str):
        raise NetworkError(
            f"{redact(url)} answers, but not as a Ray dashboard does (HTTP {status})",
            hint=f"give the address of the cluster's dashboard, http://HEAD:{PORT}",
        )
    return version, headers


class HttpError(Exception):
    """The dashboard refused a request."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text.strip().splitlines()[-1] if text.strip() else 'no reason given'}")
        self.status = status


def _client(url: str, headers: dict[str, str]) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Ray's client, which by itself would wait for ever and hide the status in a text."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": _REQUEST_SECONDS, **options})

        def _raise_error(self, response: Any) -> None:
            raise HttpError(response.status_code, response.text)

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    # Ray lets its variables override the address that it is given.
    with _unset(_ADDRESS_VARIABLES), explained(url):
        return Client(url, headers=headers)


@contextlib.contextmanager
def _unset(names: Sequence[str]) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """What Ray's client raises, as NetworkError."""
    import requests
    from ray.exceptions import RayError

    try:
        yield
    except (requests.RequestException, ConnectionError, RayError, HttpError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise NetworkError(
            f"{redact(url)} failed: {reason[0]}", hint="look at the cluster's dashboard, then run the same again"
        ) from error


def _urls(address: str | None) -> list[str]:
    """Where the cluster's dashboard may be, by what a person gave.

    Raises:
        FlagError: nothing was given, or nothing that leads to a dashboard.
    """
    name = next((name for name in _ADDRESS_VARIABLES if os.environ.get(name)), None)
    source = "--address" if address else name
    address = address or (os.environ[name] if name else None)
    hint = (
        f"give --address http://HEAD:{PORT}, or set {_ADDRESS_VARIABLES[0]}; `ray dashboard cluster.yaml` brings a "
        f"cluster's dashboard to http://localhost:{PORT}"
    )
    if not address:
        raise FlagError("no cluster is named", hint=hint)
    scheme, slashes, rest = address.rpartition("://")
    if slashes:
        if scheme not in {"http", "https"}:
            raise FlagError(f"{source} {redact(address)} is not the address of a dashboard", hint=hint)
        return [address.rstrip("/")]
    if rest in {"auto", "local"}:
        raise FlagError(f"{source} {rest} does not name a cluster", hint=hint)
    host, colon, port = rest.rpartition(":")
    if not colon or not port.isdigit():
        return [f"http://{rest}:{PORT}"]
    # RAY_ADDRESS has the port of Ray's own protocol; the dashboard is beside it.
    return [f"http://{rest}"] + ([f"http://{host}:{PORT}"] if int(port) != PORT else [])


def _token() -> str | None:
    """The token for clusters that want one, from where Ray itself takes it.

    Raises:
        FlagError: the file that is named for it cannot be read.
    """
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if token:
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path("~/.ray/auth_token").expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError) as error:
        if named:
            reason = getattr(error, "strerror", None) or "is no text"
            raise FlagError(
                f"RAY_AUTH_TOKEN_PATH {path}: {reason}", hint="name a file that holds the cluster's token"
            ) from error
        return None
