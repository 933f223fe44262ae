"""Download images from the addresses of an untrusted annotation file.

Built on `requests` and `urllib3` instead of `datasets.DownloadManager`, which connects to any address (also of the
local network), has no limit for the size or the time of a download, and accepts any response as the file. `tenacity` is
not used: the retries are one loop, and their waits depend on `Retry-After` and on a deadline for all tries.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies, select_proxy
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NameResolutionError

from ..errors import InputError, first_line, scrub
from .sources import http_address

MAX_BYTES = 64 * 2**20  # of an image file, decompressed
TRIES = 4
SECONDS = 120.0  # for an image: all tries, redirects and waits
CONNECT_SECONDS, READ_SECONDS = 10, 30
MAX_WAIT = 60.0  # limit for Retry-After
MAX_REDIRECTS = 5
MIN_SPEED = 1024  # bytes per second, after FIRST_SECONDS
FIRST_SECONDS = 10.0
CHUNK = 1 << 16
MAX_ADDRESSES = 4  # of a host

T = TypeVar("T")


class _RefusedError(InputError):
    """An error that a retry would not change."""


class _BusyError(InputError):
    """A response that asks for a retry after `wait` seconds."""

    wait: float = 0.0


class Downloader:
    """Downloads files one after the other over persistent connections. Not thread-safe.

    Connects to public hosts only: a name is resolved, each of its addresses is checked, and the connection is made to
    the checked address. Proxies are taken from the environment; passwords are not (no `.netrc`).

    Args:
        allow_private: also connect to private, loopback and link-local addresses.
    """

    def __init__(self, allow_private: bool = False):
        self.allow_private = allow_private
        self.opened: weakref.WeakSet[HTTPConnection | socket.socket] = weakref.WeakSet()
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # sends none back
        self.session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        adapter = HTTPAdapter()
        adapter.poolmanager.pool_classes_by_scheme = _pool_classes(self.opened, allow_private)
        self.session.mount("http://", adapter)
        self.session.mount("https://", adapter)

    def fetch(self, url: str, path: Path, accept: Callable[[Path], T]) -> T:
        """Download a file and return the result of `accept`.

        Args:
            url: address, as returned by `http_address`.
            path: file to write.
            accept: function of the written file that raises `InputError` if it is incomplete; it is then retried.

        Raises:
            InputError: if no complete file arrives within `SECONDS` and `TRIES`.
            OSError: if the file cannot be written.
        """
        ends = time.monotonic() + SECONDS
        for number in range(1, TRIES + 1):
            try:
                self._download(url, path, ends)
                return accept(path)
            except InputError as error:
                wait = max(0.2 * 2**number, min(getattr(error, "wait", 0.0), MAX_WAIT))
                if isinstance(error, _RefusedError) or number == TRIES or time.monotonic() + wait > ends:
                    problem = str(error).replace(str(path), "the response")
                    raise InputError(f"{scrub(url, 200)}: {scrub(problem)}") from None
            time.sleep(wait)
        raise AssertionError("unreachable")

    def _download(self, url: str, path: Path, ends: float) -> None:
        late = f"not complete within {SECONDS:.0f} seconds"
        try:
            with self._deadline(ends), self._open(url) as response, path.open("wb") as file:
                for chunk in _chunks(response):
                    file.write(chunk)
            if time.monotonic() > ends:  # a closed connection may look like the end of the file
                raise _RefusedError(late)
        except InputError:
            raise
        # `requests` passes on some errors of urllib3, and ValueError for addresses that it finds malformed.
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            if time.monotonic() > ends:
                raise _RefusedError(late) from None
            raise InputError(_reason(error)) from None

    def _open(self, url: str) -> requests.Response:
        for _ in range(MAX_REDIRECTS + 1):
            address = http_address(url)
            if address is None:
                raise _RefusedError("the redirect target is not an http address")
            proxies = get_environ_proxies(address)
            if select_proxy(address, proxies) and not self.allow_private:
                _check_host(urlsplit(address).hostname)
            response = self.session.get(
                address, stream=True, allow_redirects=False, timeout=(CONNECT_SECONDS, READ_SECONDS), proxies=proxies
            )
            target = self.session.get_redirect_target(response)
            if target is None:
                _check_status(response)
                return response
            response.close()
            url = urljoin(address, target)
        raise _RefusedError(f"more than {MAX_REDIRECTS} redirects")

    @contextmanager
    def _deadline(self, ends: float) -> Iterator[None]:
        """Close the connections at a time: a timeout applies to one read only, and a server may send byte by byte."""
        timer = threading.Timer(max(0.0, ends - time.monotonic()), _shut_down, [self.opened])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """Yield the body in chunks; urllib3 raises if it is shorter than its Content-Length."""
    size, start = 0, time.monotonic()
    while chunk := response.raw.read1(CHUNK, decode_content=True):
        size += len(chunk)
        if size > MAX_BYTES:
            raise _RefusedError(f"more than {MAX_BYTES >> 20} MiB")
        seconds = time.monotonic() - start
        if seconds > FIRST_SECONDS and size < MIN_SPEED * seconds:
            raise _RefusedError(f"slower than {MIN_SPEED} bytes per second")
        yield chunk


def _check_status(response: requests.Response) -> None:
    if response.status_code < 300:
        return
    response.close()
    said = f"{response.status_code} {response.reason or ''}".strip()
    if response.status_code != 429 and response.status_code < 500:
        raise _RefusedError(said)
    busy = _BusyError(said)
    with suppress(urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        busy.wait = urllib3.Retry().parse_retry_after(response.headers.get("Retry-After", "0"))
    raise busy


def _reason(error: BaseException) -> str:
    """Return the innermost cause: the outer ones repeat the address and show Python objects."""
    while isinstance(inner := getattr(error, "reason", None) or next(iter(error.args), None), Exception):
        error = inner
    return first_line(error)


def _pool_classes(opened: weakref.WeakSet[HTTPConnection | socket.socket], allow_private: bool) -> dict[str, type]:
    """Return urllib3's pool classes with connections that check their address; they and their sockets join `opened`."""

    def checked(base: type[HTTPConnection]) -> type[HTTPConnection]:
        class Connection(base):
            def connect(self) -> None:
                opened.add(self)
                super().connect()
                opened.add(self.sock)  # of which `self` lets go if the server announces that it closes the connection

            def _new_conn(self) -> socket.socket:
                if allow_private or self.proxy is not None:  # `_open` has checked the address; the proxy may be private
                    return super()._new_conn()
                name = self._dns_host
                try:
                    addresses = _public_addresses(name, self.port)
                except OSError as error:
                    raise NameResolutionError(self.host, self, error) from error
                try:
                    for number, self._dns_host in enumerate(addresses, start=1):
                        try:
                            return super()._new_conn()
                        except urllib3.exceptions.HTTPError:
                            if number == len(addresses):
                                raise
                finally:
                    self._dns_host = name  # the certificate is verified against the name
                raise AssertionError("unreachable")

        return Connection

    class HTTPPool(HTTPConnectionPool):
        ConnectionCls = checked(HTTPConnection)

    class HTTPSPool(HTTPSConnectionPool):
        ConnectionCls = checked(HTTPSConnection)

    return {"http": HTTPPool, "https": HTTPSPool}


def _public_addresses(host: str, port: int) -> list[str]:
    """Return the addresses of a host.

    Raises:
        OSError: if the name cannot be resolved.
        InputError: if an address is not public.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if not is_public(address):
            raise _RefusedError(f"{address} is a private address (allowed with --allow-private)")
    return addresses[:MAX_ADDRESSES]


def is_public(address: str) -> bool:
    """Return whether an IP address is public; an address that embeds an IPv4 address is classified by that one."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        # NAT64 embeds the IPv4 address in the last four bytes.
        nat64 = ipaddress.ip_address(ip.packed[12:]) if ip in ipaddress.ip_network("64:ff9b::/96") else None
        embedded = ip.ipv4_mapped or ip.sixtofour or nat64
        if embedded is not None:
            return is_public(str(embedded))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _check_host(host: str | None) -> None:
    """Check the host that a proxy will connect to, if its name can be resolved here."""
    try:
        _public_addresses(host or "", 0)
    except OSError:
        return


def _shut_down(opened: weakref.WeakSet[Any]) -> None:
    for one in list(opened):
        try:
            getattr(one, "sock", one).shutdown(socket.SHUT_RDWR)
        except (AttributeError, OSError):  # already closed
            continue
