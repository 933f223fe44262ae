"""Downloads from untrusted servers: duration, size and redirects."""

import json
import socket
import threading
import time
from urllib.parse import quote

import pytest
import requests

from nanovlm_hf import InputError
from nanovlm_hf.data import download
from nanovlm_hf.data.download import Downloader, is_public
from nanovlm_hf.data.sources import http_address

from helpers.servers import serve


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve("photo_server.py", tmp_path_factory.mktemp("photos")) as running:
        yield running


@pytest.fixture
def fetch(tmp_path):
    def call(url, allow_private=True):
        return Downloader(allow_private).fetch(url, tmp_path / "aside", lambda path: path.read_bytes())

    return call


def test_redirects_are_followed_and_counted(server, fetch):
    assert fetch(f"{server.url}/to/{server.url}/1000.jpg").startswith(b"\xff\xd8")
    assert fetch(f"{server.url}/to/%2F1000.jpg").startswith(b"\xff\xd8"), "a relative address"
    with pytest.raises(InputError, match="more than 5 redirects"):
        fetch(f"{server.url}/again")


def test_no_cookie_is_sent_back(server, fetch):
    before = len(server.entries())
    assert fetch(f"{server.url}/cookie/{quote('/to/%2F1000.jpg', safe='')}").startswith(b"\xff\xd8")
    asked = [entry for entry in server.entries()[before:] if "headers" in entry]
    assert [entry["path"].split("/")[1] for entry in asked] == ["cookie", "to"]
    assert not any("Cookie" in entry["headers"] for entry in asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[::1/x", "http://127.0.0.1:99999"]
)
def test_redirects_lead_to_http_addresses_only(server, fetch, target):
    with pytest.raises(InputError, match=r"not an http address|Invalid IPv6"):
        fetch(f"{server.url}/to/{target}")


@pytest.mark.parametrize("path", ["drip", "headers", "stall"])
def test_a_download_has_a_deadline(server, fetch, monkeypatch, path):
    monkeypatch.setattr(download, "SECONDS", 1.5)
    start = time.monotonic()
    with pytest.raises(InputError, match="not complete within 2 seconds"):
        fetch(f"{server.url}/{path}")
    assert time.monotonic() - start < 30


def test_a_download_has_a_minimum_speed(server, fetch, monkeypatch):
    monkeypatch.setattr(download, "FIRST_SECONDS", 0.5)
    with pytest.raises(InputError, match="slower than 1024 bytes per second"):
        fetch(f"{server.url}/drip")


def test_the_wait_that_a_server_requests_is_bounded(server, fetch, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    with pytest.raises(InputError, match="503"):
        fetch(f"{server.url}/busy")
    assert waits == [60.0] * 3
    monkeypatch.setattr(download, "SECONDS", 30.0)
    waits.clear()
    with pytest.raises(InputError, match="503"):
        fetch(f"{server.url}/busy")
    assert waits == [], "a wait that ends after the deadline is not begun"


@pytest.mark.parametrize("path", ["endless", "bomb"])
def test_the_size_of_a_download_is_bounded(server, fetch, monkeypatch, tmp_path, path):
    monkeypatch.setattr(download, "MAX_BYTES", 4 * 2**20)
    with pytest.raises(InputError, match="more than 4 MiB"):
        fetch(f"{server.url}/{path}")
    assert (tmp_path / "aside").stat().st_size <= 4 * 2**20


@pytest.fixture
def listener():
    """A loopback port that counts connections."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.3)

        def visitors() -> int:
            try:
                listening.accept()[0].close()
            except TimeoutError:
                return 0
            return 1

        yield listening.getsockname()[1], visitors


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "127.1", "2130706433", "0.0.0.0"])
def test_private_addresses_are_not_even_connected_to(fetch, listener, host):
    port, visitors = listener
    with pytest.raises(InputError, match="private address"):
        fetch(f"http://{host}:{port}/x.jpg", allow_private=False)
    assert visitors() == 0


def test_redirects_to_private_addresses_are_not_followed(server, fetch, listener, monkeypatch):
    port, visitors = listener
    # The first server is taken for a public one.
    public = download.is_public
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.1" or public(address))
    for target in (
        f"http://127.0.0.2:{port}/latest/meta-data",
        f"http://[::1]:{port}/",
        "http://169.254.169.254/latest",
    ):
        with pytest.raises(InputError, match="private address"):
            fetch(f"{server.url}/to/{target}", allow_private=False)
    assert visitors() == 0


def test_the_connection_is_made_to_the_checked_address(server, fetch, listener, monkeypatch):
    answers = iter(["127.0.0.1", "127.0.0.3", "127.0.0.3"])
    resolve = socket.getaddrinfo

    def rebind(host, port, *arguments, **options):
        return resolve(next(answers) if host == "photos.example" else host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.1")
    port = server.url.rpartition(":")[2]
    assert fetch(f"http://photos.example:{port}/1000.jpg", allow_private=False).startswith(b"\xff\xd8")
    with pytest.raises(InputError, match=r"127\.0\.0\.3 is a private address"):
        fetch(f"http://photos.example:{port}/1000.jpg", allow_private=False)


def test_is_public():
    for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(address), address
    for address in (
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "239.255.255.250", "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%2"),
        *("fc00::1", "fec0::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1"),
    ):
        assert not is_public(address), address


def test_passwords_of_the_home_folder_are_not_sent(server, fetch, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    assert requests.utils.get_netrc_auth(server.url) is not None, "the file is found"
    fetch(f"{server.url}/to/{server.url}/1000.jpg")
    entry = [entry for entry in server.entries() if entry.get("path", "").startswith("/to/")][-1]
    assert "authorization" not in {name.lower() for name in entry["headers"]}


def test_a_proxy_of_the_environment_is_used(server, fetch, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "nothing.example")
    before = len(server.entries())
    # The test server takes the last part of whatever address a proxy is asked for.
    assert fetch("http://no-such-host.example/1000.jpg", allow_private=False).startswith(b"\xff\xd8")
    assert len(server.entries()) == before + 1
    with pytest.raises(InputError, match="private address"):
        fetch("http://192.168.0.1/1000.jpg", allow_private=False)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(InputError, match="private address"):
        fetch(f"{server.url}/1000.jpg", allow_private=False)


@pytest.mark.parametrize(
    "address",
    [
        *("http://[::1/x", "http://host:99999/x", "http://host:port/x", "http://host/a\r\nb", "http://", "https:///x"),
        *("ftp://host/x", "file:///etc/passwd", "/etc/passwd", "javascript:1", "", None, 42, ["http://host"], {"a": 1}),
        *("http://ho\0st/", "http://host:0/", "//host/x"),
    ],
)
def test_malformed_addresses_are_ignored(address):
    assert http_address(address) is None


@pytest.mark.parametrize(
    ("address", "clean"),
    [
        ("http://user:pass@host/x.jpg?a=b@c#d", "http://host/x.jpg?a=b@c#d"),
        ("https://user@host:8443/x", "https://host:8443/x"),
        ("http://a:b@c@host/x", "http://host/x"),
        ("http://:secret@[::1]:80/x", "http://[::1]:80/x"),
        ("http://images.cocodataset.org/train2017/000000000009.jpg",) * 2,
        ("http://host/a b.jpg",) * 2,
    ],
)
def test_user_info_is_dropped_from_addresses(address, clean):
    assert http_address(address) == clean


@pytest.mark.parametrize(
    "address",
    ["http://host name/x.jpg", "http://ho%00st/", "http://" + "a" * 300 + "/x", "http://xn--\u00ff./", "http://./x"],
)
def test_addresses_that_only_the_library_finds_malformed_are_one_line(fetch, monkeypatch, address):
    monkeypatch.setattr(download, "TRIES", 1)
    with pytest.raises(InputError) as refused:
        fetch(address)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_bad_address_fails_its_image_alone(run, server, tmp_path):
    addresses = {
        10: f"{server.url}/1000.jpg",
        11: "http://[::1/x",
        12: "http://127.0.0.1:99999/x.jpg",
        13: 42,
        14: f"http://user:PASSW0RD@127.0.0.1:{server.url.rpartition(':')[2]}/1003.jpg",
        15: "http://127.0.0.1:9/a b\u2028.jpg",
        16: None,
        17: f"http://user:PASSW0RD@127.0.0.1:{server.url.rpartition(':')[2]}/1010.jpg",
    }
    images = [{"id": number, "file_name": f"{number}\x1b]0;.jpg", "coco_url": url} for number, url in addresses.items()]
    annotations = [{"image_id": number, "caption": "A dog."} for number in addresses]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    out = tmp_path / "out"
    code, lines, errors = run(
        "data", "ingest", "--captions", tmp_path / "captions.json", "--out", out, "--allow-private"
    )
    assert (code, lines) == (1, [f"{out / 'captions.json'}: 2 images"])
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in failed] == [11, 12, 13, 14, 15, 16]
    written = "".join(path.read_text() for path in out.glob("*.json*"))
    assert "PASSW0RD" not in written + "".join(errors)
    assert "\x1b" not in written


def test_ingest_refuses_private_addresses_by_default(run, server, tmp_path):
    images = [{"id": 1, "file_name": "1.jpg", "coco_url": f"{server.url}/1020.jpg"}]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": []}))
    code, _, _ = run("data", "ingest", "--captions", tmp_path / "captions.json", "--out", tmp_path / "out")
    assert code == 1
    assert "--allow-private" in (tmp_path / "out" / "failed.jsonl").read_text()
    assert not any(entry.get("photo") == 1020 for entry in server.entries())


def test_a_certificate_is_checked_against_the_name_and_not_the_address(monkeypatch, fetch):
    """The connection is made to a checked address; the TLS handshake uses the requested name."""
    hello = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept():
            connection, _ = listening.accept()
            with connection:
                hello.append(connection.recv(4096))

        thread = threading.Thread(target=accept)
        thread.start()
        resolve = socket.getaddrinfo
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, *rest, **more: resolve(host.replace("photos.example", "127.0.0.1"), *rest, **more),
        )
        monkeypatch.setattr(download, "is_public", lambda _: True)
        monkeypatch.setattr(download, "TRIES", 1)
        with pytest.raises(InputError):
            fetch(f"https://photos.example:{listening.getsockname()[1]}/x.jpg", allow_private=False)
        thread.join()
    assert b"photos.example" in hello[0]


def test_threads_end_with_the_downloads(server, fetch):
    before = threading.active_count()
    for _ in range(5):
        fetch(f"{server.url}/1000.jpg")
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before
