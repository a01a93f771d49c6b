"""The metrics page over HTTP, for Prometheus: GET and HEAD only, a few connections at a time."""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from drivetrain.errors import BadInput
from drivetrain.runtime.exposition import CONTENT_TYPE

MOST_CONNECTIONS = 16
_PATIENCE_S = 10.0
_INDEX = "Drivetrain's exporter. Metrics are at /metrics\n"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    server_version = "drivetrain"
    sys_version = ""
    timeout = _PATIENCE_S  # of a client that sends or reads slowly

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if not self.server.takes(self.headers.get("Host", "")):
            # A web page elsewhere whose name was made to lead here must not read us.
            self._send(HTTPStatus.FORBIDDEN, "this host name is not this exporter's\n", with_body)
        elif path == "/metrics":
            self._send(HTTPStatus.OK, self.server.page(), with_body, CONTENT_TYPE)
        elif path == "/":
            self._send(HTTPStatus.OK, _INDEX, with_body)
        else:
            self._send(HTTPStatus.NOT_FOUND, "there is only /metrics\n", with_body)

    def _send(
        self, status: HTTPStatus, text: str, with_body: bool, kind: str = "text/plain"
    ) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line a scrape would fill somebody's log."""


class MetricsServer(ThreadingHTTPServer):
    """Serves ``page()`` at ``/metrics``. Raises BadInput when the address cannot be bound."""

    daemon_threads = True
    request_queue_size = MOST_CONNECTIONS

    def __init__(self, host: str, port: int, page: Callable[[], str]) -> None:
        self.page = page
        self._loopback = is_loopback(host)
        self._slots = threading.BoundedSemaphore(MOST_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise BadInput(
                f"the exporter cannot listen on {host} port {port}: {error}. Choose another with "
                "--host and --port"
            ) from error

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def takes(self, name: str) -> bool:
        """Whether a request for this ``Host`` is for us; on loopback only names of loopback are."""
        if not self._loopback:
            return True
        host = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        return is_loopback(host)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""


def write_textfile(path: Path, text: str) -> None:
    """Replace the file in one step: a reader sees the old page or the new one, readable for all.

    Raises BadInput when it cannot be written.
    """
    if path.suffix != ".prom":
        raise BadInput(f"{path}: the node exporter reads files that end in .prom only")
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise BadInput(f"the metrics cannot be written to {path}: {error}") from error
