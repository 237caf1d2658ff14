"""Where metrics are read: HTTP on a Unix socket, and a file for node_exporter's textfile collector."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

from ..logs import get_logger

log = get_logger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

FILE_INTERVAL_S = 15.0
"""How often the file is written: Prometheus' usual scrape interval."""

_REQUEST_TIMEOUT_S = 5.0
_LONGEST_REQUEST = 16 << 10
_MOST_CONNECTIONS = 16


class MetricsSocket:
    """Answers ``GET /metrics`` over HTTP at ``path``, readable by owner and group. One event loop.

    ``render`` returns the text; it is called on the event loop. A connection is closed after its answer.
    """

    def __init__(self, path: Path, render: Callable[[], bytes]) -> None:
        self._path = path
        self._render = render
        self._server: asyncio.Server | None = None
        self._open = 0

    async def start(self) -> None:
        """Begin to answer; raises ``OSError`` if the socket cannot be made."""
        self._path.unlink(missing_ok=True)
        before = os.umask(0o117)
        try:
            self._server = await asyncio.start_unix_server(
                self._serve, self._path, limit=_LONGEST_REQUEST, backlog=_MOST_CONNECTIONS
            )
        finally:
            os.umask(before)

    async def stop(self) -> None:
        """Answer no more, and remove the socket."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            # Each connection is a descriptor, and work that every session waits for.
            if self._open <= _MOST_CONNECTIONS:
                async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._answer(head))
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            log.debug("no metrics for a client", error=repr(error))
        except Exception:
            log.exception("metrics could not be collected")
        finally:
            self._open -= 1
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        target = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET\n")
        if target not in (b"/metrics", b"/"):
            return _response(HTTPStatus.NOT_FOUND, b"metrics are at /metrics\n")
        return _response(HTTPStatus.OK, self._render(), with_body=method == b"GET")


async def write_file(path: Path, render: Callable[[], bytes], interval_s: float = FILE_INTERVAL_S) -> None:
    """Write the text to ``path`` now and every ``interval_s``, each time whole, until cancelled."""
    said = ""
    while True:
        text = render()
        try:
            await asyncio.to_thread(_replace, path, text)
            said = ""
        except OSError as error:
            if str(error) != said:
                log.error("metrics_file cannot be written; it is tried again", path=path, error=error)
            said = str(error)
        await asyncio.sleep(interval_s)


def _replace(path: Path, text: bytes) -> None:
    # The collector reads every *.prom of the directory, whole or not.
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(text)
    fresh.chmod(0o644)
    fresh.replace(path)


def _response(status: HTTPStatus, body: bytes, *, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {CONTENT_TYPE}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
