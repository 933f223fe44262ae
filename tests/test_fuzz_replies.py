"""Thousands of mutated answers, notes and lines: each ends in one line or in nothing, and the folder stays usable.

`NANOVLM_FUZZ_SEED` chooses other mutations, `NANOVLM_FUZZ_CASES` their number.
"""

import copy
import gzip
import json
import os
import random
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers.captions import rows, write_captions
from helpers.chat_server import good_text, grades, said
from helpers.gradings import rows_of, write_completions

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("api_key")]

SEED = int(os.environ.get("NANOVLM_FUZZ_SEED", 20261129))
CASES = int(os.environ.get("NANOVLM_FUZZ_CASES", "40"))
LONGEST_RUN = 60.0  # seconds by the clock, on a machine that other tests keep busy
ODD_VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        10**30,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "7",
        "abc",
        "\ud83d",
        "\x00\x1b[31m",
    ),
    *([], {}, [None], [[]], [{}], {"a": 1}, {"text": "A dog."}, ["A dog."], "x" * 50_000, "length", "content_filter"),
    *([{"type": "text", "text": 7}], [{"type": "text", "text": "A dog."}], {"message": "busy", "code": 429}, 429, 503),
]


def good(body):
    """Return the response of a good endpoint."""
    content = said(body)
    schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
    text = good_text(content, 3) if schema is None else grades(content, list(schema["properties"]))
    message = {"role": "assistant", "content": text}
    return {
        "id": "chat-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 200, "completion_tokens": 30, "total_tokens": 230},
    }


def places(content, path=()):
    """Yield the paths of all values in JSON content."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in items:
        yield from places(value, (*path, name))


def mutated(content, rng):
    """Return JSON content with one to three values replaced, removed, duplicated or wrapped."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(places(content)))
        if not path:
            if rng.random() < 0.2:
                content = rng.choice([copy.deepcopy(rng.choice(ODD_VALUES)), [content], {"error": content}])
            continue
        parent = content
        for name in path[:-1]:
            parent = parent[name]
        kind = rng.random()
        if kind < 0.6:
            parent[path[-1]] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif kind < 0.75:
            del parent[path[-1]]
        elif kind < 0.9:
            parent[path[-1]] = [parent[path[-1]], copy.deepcopy(rng.choice(ODD_VALUES))]
        elif isinstance(parent, dict):
            parent[rng.choice(["error", "detail", "message", "code", "param", "choices", "usage"])] = parent[path[-1]]
    return content


def damaged(raw, rng):
    """Return bytes with some changed, removed, repeated or inserted."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(raw) + 1)
        kind = rng.random()
        if kind < 0.3 and place < len(raw):
            raw[place] = rng.randrange(256)
        elif kind < 0.5:
            del raw[place : place + rng.randint(1, 30)]
        elif kind < 0.7:
            raw[place:place] = bytes(rng.choices(b'[]{}",:\\\n\x00\xff', k=rng.randint(1, 5)))
        elif kind < 0.8:
            raw[place:place] = raw[place : place + 50]
        elif kind < 0.9:
            raw[place:place] = b"[" * rng.choice([10, 2000, 100_000])
        else:
            del raw[place:]
    return bytes(raw)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    rng = None  # of the mutations, or None for good replies

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = good(body)
        rng = self.rng
        status, headers = 200, {"Content-Type": "application/json"}
        if rng is None:
            raw = json.dumps(reply).encode()
        else:
            if rng.random() < 0.1:
                reply = {"error": {"message": "no", "type": "invalid", "param": "temperature", "code": "x"}}
                status = rng.choice([200, 400, 422, 429, 500, 503, 302, 418, 599])
            raw = json.dumps(mutated(reply, rng)).encode()
            if rng.random() < 0.3:
                raw = damaged(raw, rng)
            if rng.random() < 0.05:
                headers["Content-Encoding"] = rng.choice(["gzip", "br", "deflate", "zstd", "nonsense"])
                raw = gzip.compress(raw) if rng.random() < 0.5 else raw
            if rng.random() < 0.05:
                headers["Retry-After"] = rng.choice(["nan", "-1", "1e400", "soon", "", "99999999999999999999"])
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        wrong = rng is not None and rng.random() < 0.01
        self.send_header("Content-Length", str(len(raw) + (5 if wrong else 0)))
        self.end_headers()
        self.wfile.write(raw)
        self.close_connection = self.close_connection or wrong

    def log_message(self, *arguments):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    """Return the URL of an endpoint in this process, and a function that sets the mutations."""
    monkeypatch.setattr("nanovlm_hf.chat.client.LONGEST_PAUSE", 0.01)
    monkeypatch.setattr("nanovlm_hf.chat.client.RATE_LIMIT_PATIENCE", 0.2)

    class Own(Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", lambda rng: setattr(Own, "rng", rng)
    server.shutdown()
    server.server_close()


@pytest.fixture
def one_line(run):
    """Runs a command that may fail, in one line and in time."""

    def call(*arguments):
        began = time.monotonic()
        code, lines, errors = run(*arguments)
        assert time.monotonic() - began < LONGEST_RUN
        assert code in (0, 1), errors
        assert "Traceback" not in "".join(errors)
        said = [error for error in errors if error.startswith("nanovlm: ")]
        assert said or code == 0, errors  # notes about missing grades may stand before the one line of an error
        assert "unexpected" not in "".join(said), said
        return code, lines, said

    return call


@pytest.mark.parametrize("command", ["describe", "judge"])
def test_mutated_responses(one_line, endpoint, tmp_path, command):
    url, mutate_by = endpoint
    captions = write_captions(tmp_path / "captions.json", 40)
    texts = write_completions(tmp_path / "texts.jsonl", rows_of(40))
    for number in range(CASES // 8):
        out = tmp_path / f"out{number}"
        if command == "describe":
            call = ("data", "describe", "--captions", captions, "--variant", "short")
            options = ("--tries", 1)
        else:
            call, options = ("evaluate", "judge", "--completions", texts), ()
        call = (*call, "--out", out, "--base-url", url, "--concurrency", 8, "--timeout", 1)
        mutate_by(random.Random(SEED + number))
        one_line(*call, *options)
        assert (out / ("report.json" if command == "describe" else "judge.json")).exists()
        mutate_by(None)
        for _ in range(2):  # what was refused by an endpoint at odds is settled by the second time
            _, lines, _ = one_line(*call)
        assert lines
        if command == "describe":
            described, rejected = rows(out / "descriptions.jsonl"), rows(out / "rejected.jsonl")
            assert sorted(row["image_id"] for row in described + rejected) == list(range(1, 41))
            assert all(row["reasons"] for row in rejected)
        shutil.rmtree(out)


@pytest.mark.parametrize("name", ["replies.jsonl", "refused.jsonl"])
def test_mutated_lines_of_a_folder(one_line, endpoint, tmp_path, name):
    url, _ = endpoint
    rng = random.Random(SEED)
    captions = write_captions(tmp_path / "captions.json", 3)
    out = tmp_path / "out"
    call = ("data", "describe", "--captions", captions, "--variant", "short", "--out", out, "--base-url", url)
    assert one_line(*call)[0] == 0
    good_rows = rows(out / "replies.jsonl")
    if name == "refused.jsonl":
        good_rows = [row | {"reason": "refusal", "status": 400, "problem": "no", "final": True} for row in good_rows]
    named = 0
    for _ in range(CASES):
        (out / "replies.jsonl").unlink(missing_ok=True)
        (out / "refused.jsonl").unlink(missing_ok=True)
        lines = [json.dumps(row).encode() for row in good_rows]
        place = rng.randrange(len(lines))
        lines[place] = json.dumps(mutated(good_rows[place], rng)).encode()
        if rng.random() < 0.5:
            lines[place] = damaged(lines[place], rng)
        (out / name).write_bytes(b"\n".join(lines) + (b"\n" if rng.random() < 0.5 else b""))
        code, _, said = one_line(*call)
        if code and "remove the line" in said[0]:
            named += 1
            assert f"{name}: line " in said[0]
    assert CASES / 8 < named < CASES


def test_mutated_batch_jobs(one_line, server, tmp_path):
    rng = random.Random(SEED)
    captions = write_captions(tmp_path / "captions.json", 3)
    out = tmp_path / "out"
    call = ("data", "describe", "--captions", captions, "--variant", "short", "--out", out, "--max-cost", 1)
    call += ("--base-url", f"{server.url}/v1", "--batch", "--poll-seconds", 0.01)
    assert one_line(*call)[0] == 0
    files = {path.name: path.read_bytes() for path in (out / "batch").iterdir()}
    assert sorted(files) == ["00001.json", "00001.jsonl"]
    for number in range(CASES):
        shutil.rmtree(out / "batch")
        (out / "batch").mkdir()
        for name, raw in files.items():
            (out / "batch" / name).write_bytes(raw)
        name = ("00001.json", "00001.jsonl")[number % 2]
        content = [json.loads(line) for line in files[name].splitlines()]
        if number % 2:  # a job that is still to be fetched
            note = json.loads(files["00001.json"]) | {"fetched": False}
            (out / "batch" / "00001.json").write_text(json.dumps(note))
        place = rng.randrange(len(content))
        content[place] = mutated(content[place], rng)
        raw = b"\n".join(json.dumps(row).encode() for row in content) + b"\n"
        (out / "batch" / name).write_bytes(damaged(raw, rng) if rng.random() < 0.5 else raw)
        if rng.random() < 0.5:
            (out / "replies.jsonl").unlink(missing_ok=True)
        one_line(*call)
