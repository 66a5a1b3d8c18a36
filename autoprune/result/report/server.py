"""Server of the report of a search that runs: for this machine alone, at a secret address, from the journal alone.

Nothing but ``GET`` of two addresses is answered: the page and its data. Both begin with a random token, and the header
``Host`` must name this server, so that no web page that is open in the same browser can reach it by a name of its own.
"""

from __future__ import annotations

import logging
import secrets
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final
from urllib.parse import quote

from autoprune.result.report.snapshots import Snapshots

log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
PAGE, DATA = "", "data"
_TOKEN_BYTES = 24
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@final
class ReportServer:
    """Serves the report of a run on a random port until it is closed; use it in a ``with``.

    Args:
        run_dir: Folder with the journal of a search.
        model: ``FILE.py:NAME`` in the build command.

    Raises:
        FileNotFoundError: If there is no journal.
        FileFormatError: If it is no journal.
        OSError: If another program keeps it locked, or no port can be had.
    """

    def __init__(self, run_dir: Path, model: str | None = None) -> None:
        self._snapshots = Snapshots(run_dir, model)
        self._token = secrets.token_urlsafe(_TOKEN_BYTES)
        own = {"snapshots": self._snapshots, "token": self._token}
        self._server = _Server((ADDRESS, 0), type("Handler", (_Handler,), own))
        self._thread = threading.Thread(target=self._server.serve_forever, name="report", daemon=True)

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{ADDRESS}:{self._server.server_port}/{self._token}/"

    def wait(self) -> None:
        """Wait until it is closed, or for Ctrl-C."""
        while self._thread.is_alive():
            self._thread.join(timeout=1.0)  # returns to Python, so that Ctrl-C is heard on every system

    def close(self) -> None:
        """Stop answering and reading."""
        self._server.shutdown()
        self._server.server_close()
        self._snapshots.close()

    def __enter__(self) -> Self:
        self._snapshots.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless a viewer has only left before the page was sent."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    snapshots: Snapshots
    token: str
    timeout = 30.0  # a viewer that sends nothing holds a thread no longer
    server_version = "autoprune"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer with the page, its data, or a refusal."""
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") not in (f"{ADDRESS}:{port}", f"localhost:{port}"):
            self._refuse(HTTPStatus.FORBIDDEN, "this server answers to its own address alone")
            return
        token, _, name = self.path.partition("?")[0].removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self.token.encode()) or name not in (PAGE, DATA):
            self._refuse(HTTPStatus.NOT_FOUND, "nothing here; the address is the one that autoprune report printed")
            return
        now = self.snapshots.now()
        state = {"ETag": now.version, "X-Kind": now.kind, "X-State": quote(now.state)}
        if name == PAGE:
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", now.page(), state)
        elif self.headers.get("If-None-Match") == now.version:
            self._send(HTTPStatus.NOT_MODIFIED, "application/json", b"", state)
        else:
            self._send(HTTPStatus.OK, "application/json", now.data, state)

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._send(status, "text/plain; charset=utf-8", f"{reason}\n".encode(), {})

    def _send(self, status: HTTPStatus, kind: str, body: bytes, further: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, **further, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name in the standard library
        """Log requests for debugging alone, without the token."""
        log.debug("%s", (format % args).replace(self.token, "..."))
