"""HTTP clients for `openai` that limit the size of responses after decompression, and the number of redirects.

Without a limit, an endless reply or a gzip bomb would exhaust the memory.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, BinaryIO

import httpx2
import openai

MAX_BODY = 4 * 2**20  # bytes; a reply of 4,096 tokens has some 20,000
MAX_LINE = MAX_BODY  # bytes of a line in a batch's file, which is one reply
MAX_REDIRECTS = 5
_LEFT_OUT = ("content-encoding", "content-length", "transfer-encoding")  # describe the body before decoding


class BodyError(ValueError):
    """The body of a response is too large, or takes too long."""


class AsyncBoundedClient(openai.DefaultAioHttpClient):
    """Client over aiohttp, which takes two thirds of httpx2's time for a request and is a requirement of `datasets`."""

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send a request and read the body, up to `MAX_BODY` bytes.

        Raises:
            BodyError: if the body is larger.
        """
        options |= {"stream": True, "follow_redirects": False}
        for _ in range(MAX_REDIRECTS):
            response = await super().send(request, **options)
            try:
                content = b"".join([chunk async for chunk in _bounded_async(response.aiter_bytes())])
            finally:
                await response.aclose()
            if response.next_request is None:
                return _loaded(response, content, request)
            request = response.next_request
        raise BodyError(f"more than {MAX_REDIRECTS} redirects")


class BoundedClient(openai.DefaultHttpxClient):
    """Blocking client for the Batch API; the body of a streamed response is left to the caller.

    Args:
        seconds: that the body of a response may take in total.
    """

    def __init__(self, seconds: float, **options: Any):
        super().__init__(**options)
        self.seconds = seconds

    def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        """Send a request and read the body, like `AsyncBoundedClient.send`."""
        options |= {"stream": True, "follow_redirects": False}
        for _ in range(MAX_REDIRECTS):
            response = super().send(request, **options)
            if stream and response.is_success:
                return response
            try:
                content = b"".join(_bounded(response.iter_bytes(), MAX_BODY, self.seconds))
            finally:
                response.close()
            if response.next_request is None:
                return _loaded(response, content, request)
            request = response.next_request
        raise BodyError(f"more than {MAX_REDIRECTS} redirects")


def save(chunks: Iterator[bytes], file: BinaryIO, max_bytes: int, seconds: float) -> None:
    """Write a body to a file on arrival.

    Raises:
        BodyError: if it is larger than `max_bytes`, or takes more than `seconds`.
    """
    for chunk in _bounded(chunks, max_bytes, seconds):
        file.write(chunk)


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file; those longer than `MAX_LINE` are skipped."""
    while line := file.readline(MAX_LINE):
        whole = line.endswith(b"\n") or len(line) < MAX_LINE
        while not whole:
            rest = file.readline(MAX_LINE)
            whole = rest.endswith(b"\n") or len(rest) < MAX_LINE
            line = b""
        if line.strip():
            yield line


def _loaded(response: httpx2.Response, content: bytes, request: httpx2.Request) -> httpx2.Response:
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in _LEFT_OUT]
    return httpx2.Response(response.status_code, headers=headers, content=content, request=request)


def _too_large(max_bytes: int) -> BodyError:
    return BodyError(f"it is larger than {max_bytes // 2**20} MiB")


async def _bounded_async(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > MAX_BODY:
            raise _too_large(MAX_BODY)
        yield chunk


def _bounded(chunks: Iterator[bytes], max_bytes: int, seconds: float) -> Iterator[bytes]:
    size, began = 0, time.monotonic()
    for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        if time.monotonic() - began > seconds:
            raise BodyError(f"it took more than {seconds:g} s")
        yield chunk
