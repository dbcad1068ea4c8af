"""An S3-compatible server on a loopback port, and a proxy before it that makes what networks and stores do.

    with s3_server() as server, FaultProxy(server, seed=1) as proxy:
        proxy.faults = {"503": 0.05, "cut": 0.02}
        ...  # AWS_ENDPOINT_URL = proxy.url

Both live in threads of this process and end with it.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing-key-id",
    "AWS_SECRET_ACCESS_KEY": "testing-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}

FAULTS = ("500", "503", "timeout", "cut", "cut-answer", "lost-answer")
"""What may become of a request: InternalError; SlowDown; no answer for longer than the client waits; the connection
cut in the middle of its body, before the server has it; its answer cut in the middle; its answer lost, though it was
carried out."""

_ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{text}</Message></Error>"
_ERRORS = {
    "403": (403, "AccessDenied", "Access Denied"),  # by name only: it does not pass
    "500": (500, "InternalError", "We encountered an internal error."),
    "503": (503, "SlowDown", "Slow down."),
}
_TIMEOUT_S = 4.0
"""The AWS client gives up after 3 s in which nothing comes."""


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[str, int]]:
    """Starts the server; its host and port. It has no buckets."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield host, port
    finally:
        server.stop()


def make_bucket(server: tuple[str, int], name: str) -> None:
    connection = http.client.HTTPConnection(*server)
    connection.request("PUT", f"/{name}", headers={"Host": "localhost"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    connection.close()


class FaultProxy:
    """Passes requests on, or does to them what `faults` says.

    Attributes:
        faults: the share of requests that each of `FAULTS` meets.
        burst: how often at most the same request then goes on failing: the client tries three times by itself.
        match: only requests whose `METHOD path` it matches meet faults.
        most: how many faults there are at most.
        seen, injected: requests by method, faults by kind.
    """

    def __init__(self, server: tuple[str, int], *, seed: int = 0, burst: int = 1) -> None:
        self.server, self.burst = server, burst
        self.faults: dict[str, float] = {}
        self.match = re.compile("")
        self.most = sys.maxsize
        self.seen: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._failing: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def fault_of(self, method: str, path: str) -> str:
        """What the next request is to meet; an empty string for nothing."""
        request = f"{method} {path}"
        with self._lock:
            self.seen[method] += 1
            if not self.match.search(request) or self.injected.total() >= self.most:
                return ""
            fault, left = self._failing.pop(request, ("", 0))
            if not fault:
                draw = self._random.random()
                for kind, share in self.faults.items():
                    draw -= share
                    if draw < 0:
                        fault, left = kind, self._random.randint(1, self.burst)
                        break
            if fault and left > 1:
                self._failing[request] = fault, left - 1
            if fault:
                self.injected[fault] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do(self) -> None:
        fault = self.owner.fault_of(self.command, self.path)
        if fault == "cut":
            self._body(half=True)
            self._cut()
            return
        body = self._body()
        if fault == "timeout":
            time.sleep(_TIMEOUT_S)
            self._cut()
        elif fault in _ERRORS:
            status, code, text = _ERRORS[fault]
            content = _ERROR.format(code=code, text=text).encode()
            self._answer(status, [("Content-Type", "application/xml")], content)
        else:
            status, headers, content = self._passed_on(body)
            if fault == "lost-answer":
                self._cut()
            elif fault == "cut-answer" and len(content) > 1 and self.command != "HEAD":
                self._answer(status, headers, content, cut=True)
                self._cut()
            else:
                self._answer(status, headers, content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do

    def _body(self, *, half: bool = False) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if half:
                    return body
            while self.rfile.readline().strip():
                pass
            return body
        length = int(self.headers.get("Content-Length", 0))
        return self.rfile.read(length // 2 if half else length)

    def _passed_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.owner.server, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in {"transfer-encoding", "expect"}}
        headers["Content-Length"] = str(len(body))
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value  # of a HEAD, the object's
            elif name.lower() not in {"transfer-encoding", "connection"}:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)

    def _cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, ValueError):  # the client went, or was cut off
            super().handle()
