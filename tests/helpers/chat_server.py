"""A chat completions server on loopback that does what a good one does not: a real HTTP server, faults on demand.

    python chat_server.py PORT_FILE LOG [--faults SHARE] [--latency SECONDS] [--no-batches]

The text for a request depends on its messages alone. With `--faults 0.2`, two of ten requests, chosen by a hash of the
messages, meet a fault: most once or twice, a tenth of them for ever. Each request answered or refused is a line of LOG.
Wrong keys, models and accounts have names: the key `sk-wrong`, the key `sk-poor`, the model `no-such-model`. Under
`/as/NAME/v1` is an endpoint that differs from a good one in one way, by `odd_endpoints.py` and by `ODD_BATCHES`.
"""

import argparse
import asyncio
import hashlib
import json
import random
import re
import time
from collections import Counter
from pathlib import Path

from helpers.odd_endpoints import UNKNOWN_PARAMETERS, OddEndpoints, spaces

TRANSIENT = ("429", "429-later", "500", "hang", "reset", "malformed", "html", "empty-choices")
CONTENT = ("length", "empty", "refusal", "refusal-text", "words", "opening", "emoji", "german")
FOR_EVER = ("refusal-text", "words", "bad-request")
ODD_BATCHES = ("fails", "expires", "answers-oddly", "refuses-some", "bomb", "long-lines", "fails-all-lines", "mistral")
WHO = "boy girl dog cat bird horse man woman child baby bear fish goat duck farmer driver".split()
WHAT = "ball kite bus boat cake tree hat drum box bike train chair apple flower book cup".split()
HOW = "red blue green yellow big little old new round soft shiny funny warm cold tall tiny".split()
DOES = "finds holds sees likes pulls carries wants moves kicks shows makes watches".split()
WHERE = "park house street river garden beach kitchen field school station".split()


def digest(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def good_text(content, sentences):
    """Sentences of seven to nine words, one with the last word of the first caption; a function of the content."""
    rng = random.Random(digest(content))
    line = "The {} {} {} a {} {} in the {}."
    made = [line.format(*map(rng.choice, (HOW, WHO, DOES, HOW, WHAT, WHERE))) for _ in range(sentences)]
    caption = re.search(r"^1\. .*?([a-z]+)\W*$", content, re.MULTILINE)
    if caption:
        made[0] = re.sub(r"\w+(?= in the)", caption[1], made[0])
    return " ".join(made)


def said(body):
    """The words of the last message; of a picture beside them, that there is one."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] if part["type"] == "text" else "(a picture)" for part in content)


def grades(content, criteria, fault=None):
    """Grades as JSON, the same for the same content; two faults are grades that nobody can take."""
    rng = random.Random(digest("grades" + content))
    found = {name: rng.randint(2, 9) for name in criteria}
    if fault == "emoji":
        found[criteria[0]] = 11
    elif fault == "german":
        del found[criteria[-1]]
    return json.dumps(found)


class Server:
    def __init__(self, log, faults, latency, batches, structure, refused):
        self.log, self.faults, self.latency, self.batches_allowed = log, faults, latency, batches
        self.structure, self.refused = structure, refused
        self.seen = Counter()
        self.files, self.batches, self.modes = {}, {}, {}
        self.odd = OddEndpoints(self)

    def fault_of(self, content):
        """The fault that a request meets now, or None."""
        rng = random.Random(digest("fault" + content))
        self.seen[content] += 1
        label = re.search(r"(?:photo|number) (\d+)", content)
        if label and int(label[1]) <= self.refused:
            return "bad-request"
        if rng.random() >= self.faults:
            return None
        if rng.random() < 0.1:
            return rng.choice(FOR_EVER)
        fault = rng.choice(TRANSIENT + CONTENT)
        return fault if self.seen[content] <= (2 if fault == "500" else 1) else None

    def note(self, content, status, sent=None):
        label = re.search(r"photo (\d+)", content)
        entry = {"photo": label and int(label[1]), "status": status, "time": time.monotonic(), "sent": sent}
        self.log.write(json.dumps(entry | {"picture": "(a picture)" in content}) + "\n")
        self.log.flush()

    def completion(self, body, fault):
        content = said(body)
        text = good_text(content, 7 if "60-70" in content else 3)
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
        if schema is not None and self.structure:
            text = grades(content, list(schema["properties"]), fault)
        message, finish = {"role": "assistant", "content": text}, "stop"
        if fault == "length":
            message["content"], finish = text[:50], "length"
        elif fault == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "I'm sorry, I can't help with that."}
        else:
            bad = {
                "empty": "",
                "refusal-text": "I'm sorry, but I can't help with that request about the picture.",
                "words": "A dog.",
                "opening": "Oh, " + text,
                "emoji": text if schema else text + " \N{SMILING FACE WITH OPEN MOUTH}",
                "german": text
                if schema
                else "Der Junge spielt mit dem Hund im Garten. Die Sonne scheint und alle sind sehr froh heute.",
            }
            message["content"] = bad.get(fault, text)
        usage = {"prompt_tokens": 200, "completion_tokens": 30, "total_tokens": 230}
        choices = [] if fault == "empty-choices" else [{"index": 0, "message": message, "finish_reason": finish}]
        return {
            "id": f"chat-{digest(content) % 10**9}",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": choices,
            "usage": usage,
        }

    async def handle(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in head.split("\r\n"))
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if headers.get("transfer-encoding") == "chunked":
                    body = await self.chunks(reader)
                method, path, _ = head.split(" ", 2)
                await self.answer(writer, method, path.partition("?")[0], headers, body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def chunks(self, reader):
        content = b""
        while size := int(await reader.readline(), 16):
            content += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        return content

    def send(self, writer, status, body, headers=(), kind="application/json"):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(content)}", *headers]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)

    def error(self, writer, status, message, code=None, headers=()):
        self.send(writer, status, {"error": {"message": message, "type": "error", "code": code}}, headers)

    async def answer(self, writer, method, path, headers, raw):
        key = headers.get("authorization", "").removeprefix("Bearer ")
        if key == "sk-wrong":
            return self.error(writer, 401, f"Incorrect API key provided: {key}", "invalid_api_key")
        if key == "sk-poor":
            return self.error(writer, 429, "You exceeded your current quota", "insufficient_quota")
        if odd := re.fullmatch(r"/as/([\w-]+)(/v1/.*)", path):
            if odd[2] == "/v1/chat/completions":
                body = json.loads(raw)
                return await self.odd.chat(odd[1], writer, body, said(body), headers)
            return self.batch_api(writer, method, odd[2], raw, odd[1])
        if path == "/v1/chat/completions":
            return await self.chat(writer, json.loads(raw))
        if self.batches_allowed:
            return self.batch_api(writer, method, path, raw)
        return self.error(writer, 404, "no such endpoint")

    async def chat(self, writer, body):
        content = said(body)
        if body["model"] == "no-such-model":
            return self.error(writer, 404, "The model `no-such-model` does not exist", "model_not_found")
        fault = self.fault_of(content)
        if self.latency:
            await asyncio.sleep(self.latency)
        self.note(content, fault or "good")
        if fault == "429":
            return self.error(writer, 429, "Rate limit reached", "rate_limit_exceeded", ["Retry-After: 0.2"])
        if fault == "429-later":
            return self.error(writer, 429, "Rate limit reached", "rate_limit_exceeded")
        if fault == "500":
            return self.error(writer, 500, "The server had an error")
        if fault == "bad-request":
            return self.error(writer, 400, "This prompt is not accepted")
        if fault == "hang":
            await asyncio.sleep(3)
        if fault == "malformed":
            return self.send(writer, 200, b'{"id": "x", "choices": [')
        if fault == "html":
            return self.send(writer, 200, b"<html>busy</html>", kind="text/html")
        reply = self.completion(body, fault)
        if fault == "reset":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n{")
            await writer.drain()
            writer.transport.abort()
            return None
        return self.send(writer, 200, reply)

    def batch_api(self, writer, method, path, raw, mode=None):
        if method == "POST" and path == "/v1/files":
            # One file a form, whose lines are JSON objects.
            content = b"\n".join(line for line in raw.split(b"\n") if line.startswith(b"{"))
            file_id = f"file-{len(self.files)}"
            self.files[file_id] = content
            return self.send(writer, 200, self.file(file_id))
        if method == "POST" and path == "/v1/batches":
            return self.send(writer, 200, self.start_batch(json.loads(raw), mode))
        if path == "/v1/batches":
            self.note("", "list")
            mine = [batch for batch in reversed(self.batches.values()) if self.modes[batch["id"]] == mode]
            listed = {"object": "list", "data": mine, "has_more": mode is not None}
            return self.send(writer, 200, listed)
        match = re.fullmatch(r"/v1/batches/(\w+)", path)
        if match and match[1] in self.batches:
            return self.send(writer, 200, self.look_at(self.batches[match[1]]))
        if match := re.fullmatch(r"/v1/files/([\w-]+)/content", path):
            if mode == "bomb":
                return self.send(writer, 200, spaces(4096), ["Content-Encoding: gzip"])
            return self.send(writer, 200, self.files[match[1]], kind="application/octet-stream")
        return self.error(writer, 404, "no such endpoint")

    def file(self, file_id):
        size = len(self.files[file_id])
        return {
            "id": file_id,
            "object": "file",
            "bytes": size,
            "created_at": 1,
            "filename": "x.jsonl",
            "purpose": "batch",
            "status": "processed",
        }

    def start_batch(self, request, mode):
        batch_id = f"batch_{len(self.batches)}"
        self.modes[batch_id] = mode
        self.batches[batch_id] = {
            "id": batch_id,
            "object": "batch",
            "endpoint": request["endpoint"],
            "input_file_id": request["input_file_id"],
            "completion_window": "24h",
            "status": "validating",
            "created_at": 1,
            "metadata": request.get("metadata"),
            "output_file_id": None,
            "error_file_id": None,
        }
        self.note("", f"batch of {self.files[request['input_file_id']].count(b'custom_id')}")
        return self.batches[batch_id]

    def look_at(self, batch):
        """A batch moves on each time somebody looks at it."""
        mode = self.modes[batch["id"]]
        first = list(self.modes.values()).count(mode) == 1
        if batch["status"] == "validating" and mode == "fails" and first:
            problem = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached for sk-test-secret"}
            batch |= {"status": "failed", "errors": {"object": "list", "data": [problem]}}
        elif batch["status"] == "validating" and mode == "expires" and first:
            batch["status"] = "expired"
        elif batch["status"] == "validating":
            lines = [json.loads(line) for line in self.files[batch["input_file_id"]].split(b"\n")]
            if any(line["body"]["model"] == "no-such-model" for line in lines):
                problem = {"code": "model_not_found", "message": "The model does not exist", "line": 1, "param": None}
                batch |= {"status": "failed", "errors": {"object": "list", "data": [problem]}}
            else:
                batch["status"] = "in_progress"
        elif batch["status"] == "in_progress":
            self.finish(batch)
        return batch

    def finish(self, batch):
        """Transient faults are requests that expire; content faults are replies, as in the live API."""
        good, bad = [], []
        for line in self.files[batch["input_file_id"]].split(b"\n"):
            request = json.loads(line)
            content = said(request["body"])
            fault = self.fault_of(content)
            self.note(content, fault or "good")
            row = {"id": f"r{len(good) + len(bad)}", "custom_id": request["custom_id"], "response": None, "error": None}
            if fault in TRANSIENT:
                bad.append(
                    row | {"error": {"code": "batch_expired", "message": "This request was not executed in time"}}
                )
            elif fault == "bad-request":
                body = {"error": {"message": "This prompt is not accepted", "code": None}}
                bad.append(row | {"response": {"status_code": 400, "request_id": "x", "body": body}})
            else:
                body = self.completion(request["body"], fault)
                good.append(row | {"response": {"status_code": 200, "request_id": "x", "body": body}})
        lines = [json.dumps(row).encode() for row in good]
        if self.modes[batch["id"]] in ODD_BATCHES:
            lines, bad = self.odd_lines(self.modes[batch["id"]], good, batch["id"]), []
        for name, content in (("output_file_id", lines), ("error_file_id", [json.dumps(row).encode() for row in bad])):
            if content:
                batch[name] = f"file-{len(self.files)}"
                self.files[batch[name]] = b"\n".join(content)
        batch["status"] = "expired" if bad else "completed"

    def odd_lines(self, mode, rows, batch_id):
        """The lines of an odd batch's output, of those that a good one would have."""
        lines = [json.dumps(row).encode() for row in rows]
        refused = {"status_code": 400, "body": {"error": {"message": "This prompt is not accepted"}}}
        if mode == "refuses-some":
            return lines[6:] + [json.dumps(row | {"response": refused}).encode() for row in rows[:6]]
        if mode == "fails-all-lines" and list(self.modes.values()).count(mode) == 1:
            failed = {"status_code": 500, "body": {"error": {"message": "The server had an error"}}}
            return [json.dumps(row | {"response": failed}).encode() for row in rows]
        if mode == "long-lines":
            return [lines[0] + b" " * 2**23, *lines[1:], b"[" * 10_000_000]
        if mode == "mistral" and b"max_completion_tokens" in self.files[self.batches[batch_id]["input_file_id"]]:
            _, status, body = UNKNOWN_PARAMETERS["mistral"]
            refused = {"status_code": status, "body": body}
            return [json.dumps(row | {"response": refused}).encode() for row in rows]
        if mode == "answers-oddly":
            foreign = [rows[0] | {"custom_id": name} for name in ("a-b", "", 7, None, ["x"], "-1", "0" * 32 + "-1")]
            odd = [{}, [], None, "text", {"custom_id": rows[1]["custom_id"]}]
            odd += [rows[1] | {"response": value} for value in (None, [], "x", {"status_code": "200"}, {"body": 3})]
            odd += [
                rows[1] | {"response": {"status_code": 200, "body": body}} for body in (None, [], "x", {"choices": 1})
            ]
            odd = [json.dumps(row).encode() for row in foreign + odd] + [b"nonsense", b"\xff\xfe", b"[" * 100_000]
            return odd + lines[2:] + lines[2:]  # of the first two there is no reply, and two of all others
        return lines


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("port_file", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--no-batches", action="store_true")
    parser.add_argument("--no-structure", action="store_true", help="ignore the schema and chat")
    parser.add_argument("--refused", type=int, default=-1, help="prompts of the first photos that are refused for ever")
    arguments = parser.parse_args()
    batches, structure = not arguments.no_batches, not arguments.no_structure
    with arguments.log.open("a") as log:
        server = Server(log, arguments.faults, arguments.latency, batches, structure, arguments.refused)
        listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, limit=2**24)
        aside = arguments.port_file.with_suffix(".partial")
        aside.write_text(str(listener.sockets[0].getsockname()[1]))
        aside.rename(arguments.port_file)
        await listener.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
