"""A local server for the page that runs the model in the browser."""

from __future__ import annotations

import errno
import sys
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .page import build_page

HOST = "127.0.0.1"
PORTS = range(7860, 7960)


class PageHandler(SimpleHTTPRequestHandler):
    """Serve the files of one folder, without listings of its folders."""

    extensions_map = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".json": "application/json",
        ".onnx": "application/octet-stream",
        ".svg": "image/svg+xml",
        ".txt": "text/plain; charset=utf-8",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")  # another page may follow at this address
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def list_directory(self, path: Any) -> None:
        self.send_error(404, "File not found")

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class PageServer(ThreadingHTTPServer):
    """A server that says nothing when a browser ends a download, as it does when a tab is closed."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def serve_page(port: int | None = None) -> None:
    """Build the page and serve it on localhost until Ctrl-C.

    Args:
        port: None for 7860, or the next free one.

    Raises:
        OSError: if the port is in use.
        InputError: if a checkpoint cannot be exported.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with page_server(folder, port) as server:
            build_page(folder)
            print(f"http://localhost:{server.server_port}/", flush=True)
            server.serve_forever()


def page_server(folder: Path, port: int | None = None) -> ThreadingHTTPServer:
    """Return a server for a folder that is bound to its port.

    Args:
        folder: to serve.
        port: None for 7860, or the next free one.

    Raises:
        OSError: if the port is in use.
    """
    handler = partial(PageHandler, directory=str(folder))
    for candidate in PORTS if port is None else (port,):
        try:
            return PageServer((HOST, candidate), handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    ports = f"port {port} is" if port is not None else f"ports {PORTS[0]} to {PORTS[-1]} are"
    raise OSError(f"{ports} in use: choose another one with --port")
