"""An HTTP server of images with the faults of a real one.

    python photo_server.py PORT_FILE LOG

`/NUMBER.jpg` is an image generated from the number. The last digit determines the first response: 1 a 503, 2 half of
the bytes, 4 a broken connection, 5 an HTML page, 6 a 429 with Retry-After; or all responses: 3 a 404, 7 half of
the bytes.
`/to/ADDRESS` redirects, `/cookie/ADDRESS` also sets a cookie, `/again` redirects to itself, and these never return an
image: `/busy` (503, "Retry-After: 3600"), `/drip` (a byte at a time), `/headers` (a header at a time), `/stall`
(nothing more after the header), `/endless`, `/bomb` (gzip of zeros).
"""

import gzip
import io
import json
import random
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

SEEN = Counter()
LOCK = threading.Lock()
LOG = None


def photo(number):
    """Return an image of 320 x 240 with noise, as JPEG."""
    pixels = random.Random(number).randbytes(80 * 60 * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (80, 60), pixels).resize((320, 240)).save(buffer, "JPEG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        _, name, rest = (self.path + "/").split("/", 2)
        if hasattr(self, f"give_{name}"):
            self.log({"path": self.path, "headers": dict(self.headers)})
            self.close_connection = True
            try:
                return getattr(self, f"give_{name}")(unquote(rest.rstrip("/")))
            except OSError:  # the client has closed the connection
                return None
        number = int(Path(self.path).stem)
        SEEN[number] += 1
        self.log({"photo": number})
        fault = number % 10
        content = photo(number)
        if fault == 3:
            return self.reply(404, b"not here")
        if fault == 7 or (fault == 2 and SEEN[number] == 1):
            self.close_connection = True
            return self.reply(200, content[: len(content) // 2], size=len(content))
        if SEEN[number] == 1 and fault == 1:
            return self.reply(503, b"busy")
        if SEEN[number] == 1 and fault == 4:
            self.close_connection = True
            return self.connection.close()
        if SEEN[number] == 1 and fault == 5:
            return self.reply(200, b"<html>Please log in</html>")
        if SEEN[number] == 1 and fault == 6:
            return self.reply(429, b"slower", {"Retry-After": "1"})
        return self.reply(200, content)

    def log(self, entry):
        with LOCK:
            LOG.write(json.dumps(entry) + "\n")
            LOG.flush()

    def give_to(self, address):
        self.reply(302, b"", {"Location": address})

    def give_cookie(self, address):
        self.reply(302, b"", {"Location": address, "Set-Cookie": "visitor=7; Path=/"})

    def give_again(self, _):
        self.reply(302, b"", {"Location": "/again"})

    def give_busy(self, _):
        self.reply(503, b"", {"Retry-After": "3600"})

    def give_drip(self, _):
        self.reply(200, b"", size=10_000)
        while True:
            self.wfile.write(b"x")
            time.sleep(0.05)

    def give_headers(self, _):
        self.send_response(200)
        while True:
            self.send_header("X-More", "and more")
            self.flush_headers()
            time.sleep(0.05)

    def give_stall(self, _):
        self.reply(200, b"", size=10_000)
        time.sleep(60)

    def give_endless(self, _):
        self.reply(200, b"", size=2**40)
        while True:
            self.wfile.write(bytes(1 << 20))

    def give_bomb(self, _):
        self.reply(200, gzip.compress(gzip.compress(bytes(1 << 27))), {"Content-Encoding": "gzip, gzip"})

    def reply(self, status, content, headers=(), size=None):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if size is None else size))
        if self.close_connection:  # or the client may send its next request on a connection that is about to close
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)


def main():
    global LOG
    port_file, log = map(Path, sys.argv[1:3])
    LOG = log.open("a")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    aside = port_file.with_suffix(".partial")
    aside.write_text(str(server.server_address[1]))
    aside.rename(port_file)
    server.serve_forever()


if __name__ == "__main__":
    main()
