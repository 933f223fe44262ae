"""Photos over HTTP, some of them not at once: what COCO's server does on a bad day.

    python photo_server.py PORT_FILE LOG

`/NUMBER.jpg` is a picture made from the number. The last digit says what comes first: 1 a 503, 2 half of the bytes,
3 a 404 for ever, 4 a broken connection, 5 a page of text, 6 a 429 with Retry-After, 7 half of the bytes for ever.
"""

import io
import json
import random
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

SEEN = Counter()
LOCK = threading.Lock()
LOG = None


def photo(number):
    """A picture of 320 x 240 noise, as JPEG."""
    pixels = random.Random(number).randbytes(80 * 60 * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (80, 60), pixels).resize((320, 240)).save(buffer, "JPEG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        number = int(Path(self.path).stem)
        with LOCK:
            SEEN[number] += 1
            LOG.write(json.dumps({"photo": number}) + "\n")
            LOG.flush()
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

    def reply(self, status, content, headers=(), size=None):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if size is None else size))
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
