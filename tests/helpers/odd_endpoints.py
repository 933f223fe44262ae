"""How endpoints differ from a good one, by name: `chat_server.py` answers so under `/as/NAME/v1`."""

import asyncio
import json
import re
import zlib
from collections import Counter


def changed(**fields):
    """A reply with other fields at its top."""
    return lambda reply: reply | fields


def with_usage(usage):
    return changed(usage=usage)


def with_content(content):
    def change(reply):
        choice = reply["choices"][0]
        text = choice["message"]["content"]
        message = choice["message"] | {"content": content(text) if callable(content) else content}
        return reply | {"choices": [choice | {"message": message}]}

    return change


def without(name):
    return lambda reply: {key: value for key, value in reply.items() if key != name}


def thinking(reply):
    choice = {"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": "length"}
    return reply | {"choices": [choice]}


def in_parts(text):
    return [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Let me think about it."}]},
        {"type": "text", "text": text[:10]},
        {"type": "text", "text": text[10:]},
    ]


# What a good reply becomes.
REPLIES = {
    "no-usage": without("usage"),
    "null-usage": with_usage(None),
    "negative-usage": with_usage({"prompt_tokens": -1000, "completion_tokens": -1000}),
    "zero-usage": with_usage({"prompt_tokens": 0, "completion_tokens": 0}),
    "text-usage": with_usage({"prompt_tokens": "200", "completion_tokens": "thirty"}),
    "list-usage": with_usage([200, 30]),
    "number-usage": with_usage(230),
    "true-usage": with_usage({"prompt_tokens": True, "completion_tokens": [1]}),
    "nan-usage": with_usage({"prompt_tokens": float("nan"), "completion_tokens": float("inf")}),
    "huge-usage": with_usage({"prompt_tokens": 10**40, "completion_tokens": 1e300}),
    "parts": with_content(in_parts),
    "texts": with_content(lambda text: [text]),
    "object-content": with_content({"text": "A dog."}),
    "number-content": with_content(7),
    "surrogate": with_content(lambda text: text + " \ud83d"),
    "odd-names": changed(model=["m"], id={"a": 1}),
    "odd-finish": lambda reply: reply | {"choices": [reply["choices"][0] | {"finish_reason": ["stop"]}]},
    "null-choice": changed(choices=[None]),
    "text-choices": changed(choices="abc"),
    "object-choices": changed(choices={}),
    "null-message": changed(choices=[{"index": 0, "message": None}]),
    "text-message": changed(choices=[{"index": 0, "message": "A dog."}]),
    "thinking": thinking,
    "error": lambda reply: {"error": {"message": "upstream \x1b[31m provider busy"}},
    "error-in-choice": changed(choices=[{"error": {"message": "provider busy", "code": 502}}]),
    "list": lambda reply: [reply],
    "null": lambda reply: None,
}
# The body of a success that is no such reply.
BODIES = {
    "empty": b"",
    "html": b"<html><title>Busy</title><body>come back later</body></html>",
    "sse": b'data: {"choices": [{"delta": {"content": "A dog."}}]}\n\ndata: [DONE]\n\n',
    "cut": b'{"id": "x", "choices": [{"message": {"content": "A do',
    "deep": b'{"choices": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "digits": b'{"choices": [], "created": ' + b"9" * 6000 + b"}",
    "latin-1": '{"choices": [{"message": {"content": "caf\xe9'.encode("latin-1"),
}
# Status, body and headers of a refusal.
REFUSALS = {
    "refuse-all": (400, {"error": {"message": "Bad request number 17", "code": "bad_request"}}),
    "filter-all": (400, {"error": {"message": "The prompt was filtered", "code": "content_filter"}}),
    "detail": (422, {"detail": [{"loc": ["body", "messages", 0], "msg": "field required", "type": "missing"}]}),
    "text-detail": (400, {"detail": "no such thing here"}),
    "plain": (400, "your request is not wanted"),
    "no-credit": (402, {"error": {"message": "Insufficient Balance"}}),
    "billing": (400, {"error": {"message": "limit", "code": "billing_hard_limit_reached"}}),
    "forbidden": (403, {"error": {"message": "no"}}),
    "not-found": (404, {"detail": "Not Found"}),
    "unknown-model": (404, {"error": 'model "m" not found, try pulling it first'}),
    "escapes": (400, {"error": {"message": "\x1b]0;title\x07 first\nnanovlm: second \u202e"}}),
}
# A parameter that is refused, and with which status and body.
UNKNOWN_PARAMETERS = {
    "mistral": (
        "max_completion_tokens",
        422,
        {
            "object": "error",
            "message": {
                "detail": [
                    {
                        "type": "extra_forbidden",
                        "loc": ["body", "max_completion_tokens"],
                        "msg": "Extra inputs are not permitted",
                        "input": 120,
                    }
                ]
            },
        },
    ),
    "no-temperature": (
        "temperature",
        400,
        {
            "error": {
                "message": "Unsupported value: 'temperature' does not support 0.5 with this model. Only the default "
                "(1) value is supported.",
                "param": "temperature",
                "code": "unsupported_value",
            }
        },
    ),
    "no-schema": ("response_format", 400, {"error": {"message": "response_format is not supported by this server"}}),
    "hot": (
        "temperature",
        400,
        {"error": {"message": "temperature: Input should be less than or equal to 2", "param": "temperature"}},
    ),
}


class OddEndpoints:
    """Answers of odd endpoints; `server` is the good one, whose replies are changed."""

    def __init__(self, server):
        self.server = server
        self.seen = Counter()

    async def chat(self, mode, writer, body, content, headers):
        """Answer a request in a mode."""
        self.seen[mode] += 1
        self.seen[mode, content] += 1
        photo = re.search(r"photo (\d+)|number (\d+)", content)
        photo = int(photo[1] or photo[2]) if photo else 0
        server = self.server
        reply = server.completion(body, None)
        server.note(content, mode, {name: value for name, value in body.items() if name != "messages"})
        if mode in REPLIES:
            return server.send(writer, 200, json.dumps(REPLIES[mode](reply)).encode())
        if mode in BODIES:
            return server.send(writer, 200, BODIES[mode])
        if mode in REFUSALS:
            status, refusal = REFUSALS[mode]
            raw = refusal.encode() if isinstance(refusal, str) else json.dumps(refusal).encode()
            return server.send(writer, status, raw, kind="text/plain" if isinstance(refusal, str) else "text/json")
        if mode in UNKNOWN_PARAMETERS:
            name, status, refusal = UNKNOWN_PARAMETERS[mode]
            return server.send(writer, status, refusal) if name in body else server.send(writer, 200, reply)
        return await getattr(self, mode.replace("-", "_"))(writer, reply, photo, headers)

    async def refuse_some(self, writer, reply, photo, headers):
        """The first five photos at once, while the others take their time."""
        if photo <= 5:
            return self.server.error(writer, 400, f"The prompt of photo {photo} was filtered", "content_filter")
        await asyncio.sleep(0.5)
        return self.server.send(writer, 200, reply)

    async def refuse_first(self, writer, reply, photo, headers):
        """The first twelve photos, whenever they come."""
        if photo <= 12:
            return self.server.error(writer, 413, "Too long")
        return self.server.send(writer, 200, reply)

    async def down_after_ten(self, writer, reply, photo, headers):
        """Ten slow replies, and errors at once to everybody else."""
        if self.seen["down-after-ten"] > 10:
            return self.server.error(writer, 500, "down", headers=["Retry-After: 0"])
        await asyncio.sleep(2)
        return self.server.send(writer, 200, reply)

    async def key_revoked(self, writer, reply, photo, headers):
        if self.seen["key-revoked"] > 10:
            return self.server.error(writer, 401, f"bad key {headers['authorization']}")
        await asyncio.sleep(0.3)
        return self.server.send(writer, 200, reply)

    async def slow(self, writer, reply, photo, headers):
        await asyncio.sleep(1)
        return self.server.send(writer, 200, reply)

    async def echo_400(self, writer, reply, photo, headers):
        return self.server.error(writer, 400, f"bad request {photo % 3} with headers {headers}")

    async def echo_500(self, writer, reply, photo, headers):
        return self.server.error(writer, 500, f"failed with headers {headers}", headers=["Retry-After: 0"])

    async def echo_404(self, writer, reply, photo, headers):
        return self.server.error(writer, 404, f"model not found with headers {headers}")

    async def limited_inside(self, writer, reply, photo, headers):
        """A rate limit that comes as a success, once for each photo."""
        if self.seen["limited-inside", photo] == 0:
            self.seen["limited-inside", photo] = 1
            limited = {"error": {"message": "slow down", "code": 429}}
            return self.server.send(writer, 200, limited, ["Retry-After: 0.2"])
        return self.server.send(writer, 200, reply)

    async def long_waits(self, writer, reply, photo, headers):
        return self.server.error(writer, 429, "Rate limit reached", headers=["Retry-After: 999999"])

    async def drip(self, writer, reply, photo, headers):
        """A byte a second."""
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(1000):
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(1)

    async def endless(self, writer, reply, photo, headers):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
            await writer.drain()

    async def endless_refusal(self, writer, reply, photo, headers):
        writer.write(b"HTTP/1.1 400 X\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            await writer.drain()

    async def bomb(self, writer, reply, photo, headers):
        """A gigabyte of spaces in a megabyte."""
        return self.server.send(writer, 200, spaces(1024), ["Content-Encoding: gzip"])

    async def gzip(self, writer, reply, photo, headers):
        packer = zlib.compressobj(wbits=31)
        packed = packer.compress(json.dumps(reply).encode()) + packer.flush()
        return self.server.send(writer, 200, packed, ["Content-Encoding: gzip"])

    async def redirect(self, writer, reply, photo, headers):
        return self.server.send(writer, 307, b"", ["Location: /v1/chat/completions"])

    async def redirects(self, writer, reply, photo, headers):
        return self.server.send(writer, 307, b"", ["Location: /as/redirects/v1/chat/completions"])


def spaces(mebibytes):
    """That many MiB of spaces as gzip, without an end: a block that stands for itself, again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(b" " * 2**20) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + block * mebibytes
