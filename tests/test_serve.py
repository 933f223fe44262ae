"""`nanovlm serve`: OpenAI's client completes a sentence about a local photo, and bad requests get one clear message."""

import base64
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from PIL import Image

from nanovlm_hf.compat_nanovlm import IS_TRANSFORMERS_4
from nanovlm_hf.completion import complete, stream
from nanovlm_hf.loading import load_model

from helpers.output import only_line

PHOTO = Path(__file__).parents[1] / "hub_cards/space/examples/astronaut.jpg"
PREFIX = "A woman in an orange suit"
needs_5 = pytest.mark.skipif(IS_TRANSFORMERS_4, reason="`transformers serve` is part of Transformers 5")


@pytest.mark.skipif(not IS_TRANSFORMERS_4, reason="the command works")
def test_version_4_is_told_what_to_install(run):
    code, _, errors = run("serve")
    assert code == 2
    assert only_line(errors) == (
        "nanovlm: `nanovlm serve` needs a recent Transformers 5: pip install --upgrade 'transformers>=5'"
    )


@contextmanager
def running(**options):
    import uvicorn

    from nanovlm_hf.serving import build_app, server_config

    config = server_config(build_app("mini-short"), host="127.0.0.1", port=0, log_level="error", **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def address():
    if IS_TRANSFORMERS_4:
        pytest.skip("`transformers serve` is part of Transformers 5")
    with running() as found:
        yield found


@pytest.fixture
def client(address):
    from openai import OpenAI

    with closing(OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)) as client:
        yield client


@pytest.fixture(scope="module")
def expected():
    (one,) = complete(*load_model("mini-short"), [PHOTO], PREFIX)
    return one.texts[0]


def image_part(content=None):
    data = base64.b64encode(PHOTO.read_bytes() if content is None else content).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def text_part(text=PREFIX):
    return {"type": "text", "text": text}


def messages(*parts):
    return [{"role": "user", "content": list(parts)}]


def test_completes_a_sentence_about_a_local_photo(client, expected):
    reply = client.chat.completions.create(model="mini-short", messages=messages(image_part(), text_part()))
    choice = reply.choices[0]
    assert PREFIX + choice.message.content == expected
    assert choice.finish_reason == "stop"
    assert reply.usage.completion_tokens > 5


def test_streams_a_text_word_by_word(client):
    *_, expected = stream(*load_model("mini-short"), Image.open(PHOTO), PREFIX)
    chunks = client.chat.completions.create(
        model="mini-short", messages=messages(image_part(), text_part()), stream=True
    )
    words = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert PREFIX + "".join(words) == expected
    assert sum(map(bool, words)) > 5


def test_a_system_message_and_a_space_after_the_text_change_nothing(client, expected):
    asked = [{"role": "system", "content": "You are helpful."}, *messages(text_part(f"{PREFIX} "), image_part())]
    reply = client.chat.completions.create(model="mini-short", messages=asked)
    assert PREFIX + reply.choices[0].message.content == expected


def test_limits_and_sampling_are_obeyed(client, expected):
    def ask(**options):
        reply = client.chat.completions.create(
            model="mini-short", messages=messages(image_part(), text_part()), **options
        )
        return reply.choices[0], reply.usage.completion_tokens

    three, tokens = ask(max_tokens=3)
    assert (three.finish_reason, tokens) == ("length", 3)
    assert ask(max_completion_tokens=3)[0].message.content == three.message.content
    assert PREFIX + ask(temperature=0, top_p=1, frequency_penalty=0, max_tokens=10**6)[0].message.content == expected
    assert PREFIX + ask(temperature=1e-300)[0].message.content == expected
    sampled = [ask(temperature=1.5, seed=seed)[0].message.content for seed in range(4)]
    assert len(set(sampled)) > 1
    with ThreadPoolExecutor(4) as pool:  # at a time, each with its own seed
        together = pool.map(lambda seed: ask(temperature=1.5, seed=seed)[0].message.content, range(4))
        assert list(together) == sampled


def test_requests_at_a_time_give_what_each_gives_alone(client, expected):
    def ask(_):
        reply = client.chat.completions.create(model="mini-short", messages=messages(image_part(), text_part()))
        return PREFIX + reply.choices[0].message.content

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(8))) == {expected}


def test_lists_its_model(client):
    assert [model.id for model in client.models.list()] == ["mini-short"]


def post(address, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", content)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


def url_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


NOT_OPENED = "request: image_url: send the image itself, as data:image/jpeg;base64,...; addresses are not opened"
BAD = {
    "no image": (messages(text_part()), {}, "request: messages: one image_url is needed, and there are 0"),
    "plain text": (
        [{"role": "user", "content": "A dog"}],
        {},
        "request: messages: one image_url is needed, and there are 0",
    ),
    "two images": (
        messages(image_part(), image_part(), text_part()),
        {},
        "request: messages: one image_url is needed, and there are 2",
    ),
    "a path": (messages(url_part(str(PHOTO.resolve())), text_part()), {}, NOT_OPENED),
    "a file address": (messages(url_part(PHOTO.resolve().as_uri()), text_part()), {}, NOT_OPENED),
    "an address": (messages(url_part("http://127.0.0.1:1/photo.jpg"), text_part()), {}, NOT_OPENED),
    "another type": (messages(url_part("data:text/html;base64,AAAA"), text_part()), {}, NOT_OPENED),
    "no image in it": (
        messages(image_part(b"<html>"), text_part()),
        {},
        "request: image_url: not an image that Pillow can read: use a JPEG, PNG or WebP file",
    ),
    "no base64": (messages(url_part("data:image/png;base64,*"), text_part()), {}, "request: image_url: not base64"),
    "image token": (
        messages(image_part(), text_part("A <image> dog")),
        {},
        "prefix: <image> stands for the image and must not be part of the text",
    ),
    **{
        f"special token {token}": (
            messages(image_part(), text_part(f"A{token}dog")),
            {},
            f"prefix: {token} is a special token and must not be part of the text",
        )
        for token in ("<eos>", "<bos>", "<pad>")
    },
    "too long": (messages(image_part(), text_part("word " * 400)), {}, "prefix: 402 tokens with the image's leave no"),
    "assistant last": (
        [*messages(image_part(), text_part()), {"role": "assistant", "content": "A dog"}],
        {},
        "request: messages: the last one has to be the user's: give the beginning of the sentence",
    ),
    "another model": (
        messages(image_part(), text_part()),
        {"model": "gpt-4o"},
        "request: model: this server has mini-short and no other",
    ),
    "a long text": (messages(image_part(), text_part("a" * 10_001)), {}, "request: messages.0.content.1.text.text: St"),
    "a long text in parts": (
        messages(image_part(), *[text_part("a" * 1_000)] * 11),
        {},
        "request: messages: 11,000 characters of text, the limit is 10,000: shorten them",
    ),
    "a long text in messages": (
        [{"role": role, "content": "a" * 6_000} for role in ("user", "assistant")] + messages(image_part()),
        {},
        "request: messages: 12,000 characters of text, the limit is 10,000: shorten them",
    ),
    "many parts": (messages(*[text_part("")] * 65), {}, "request: messages.0.content: List should have at most 64"),
    "no parts": ([{"role": "user", "content": [0] * 100_000}], {}, "request: messages.0.content.0: Input should be"),
    "top_k": (messages(image_part(), text_part()), {"top_k": 3}, "request: top_k: not supported: leave it out"),
    "audio": (
        messages({"type": "input_audio", "input_audio": {}}),
        {},
        "request: messages.0.content.0: Input tag 'input_audio'",
    ),
    "no messages": ([], {}, "request: messages: List should have at least 1 item"),
    "several replies": (messages(image_part(), text_part()), {"n": 2}, "request: n: not supported: leave it out"),
    "stop": (messages(image_part(), text_part()), {"stop": ["."]}, "request: stop: not supported: leave it out"),
    "temperature": (
        messages(image_part(), text_part()),
        {"temperature": -1},
        "request: temperature: Input should be greater than or equal to 0",
    ),
    "no limit": (messages(image_part(), text_part()), {"max_tokens": 0}, "request: max_tokens: Input should be great"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_one_message(address, name):
    asked, options, message = BAD[name]
    status, found = post(address, {"messages": asked, **options})
    assert status == 400
    assert found.startswith(message)
    assert "\n" not in found


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"messages": NaN}'])
def test_what_is_no_request_gets_one_message(address, body):
    status, found = post(address, body)
    assert status == 400
    assert found.startswith("request: ")


def test_sizes_are_bounded(address):
    from nanovlm_hf.serving import MAX_BODY

    status, found = post(address, b" " * (MAX_BODY + 1))
    assert (status, found) == (413, "the request is larger than 16 MiB: send a smaller image")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    status, found = post(address, {"messages": messages(image_part(bomb.getvalue()), text_part())})
    assert status == 400
    assert "pixels" in found


@needs_5
def test_no_more_requests_wait_than_the_limit():
    body = {"messages": messages(image_part(), text_part())}

    def status(address):
        request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code

    with running(limit_concurrency=3) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))), socket.create_connection((host, int(port))):
            time.sleep(0.5)  # until the server has accepted both
            assert status(address) == 503
        deadline = time.monotonic() + 30
        while status(address) != 200:
            assert time.monotonic() < deadline


@needs_5
@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /"],
)
def test_idle_connections_are_closed(monkeypatch, sent):
    import asyncio

    import uvicorn

    from nanovlm_hf import serving

    monkeypatch.setattr(serving, "IDLE_SECONDS", 0.1)

    async def health(scope, receive, send):
        if scope["type"] == "lifespan":
            return
        await asyncio.sleep(0.5)  # a request that takes longer is not idle
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def received():
        server = uvicorn.Server(serving.server_config(health, host="127.0.0.1", port=0, log_level="error"))
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
        writer.write(sent)
        content = await asyncio.wait_for(reader.read(), 4)
        writer.close()
        server.should_exit = True
        await running
        return content

    assert (b"200 OK" in asyncio.run(received())) == (b"HTTP/1.1" in sent)


def test_a_request_that_does_not_arrive_ends(address, monkeypatch):
    monkeypatch.setattr("nanovlm_hf.serving.BODY_SECONDS", 0.2)
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


def test_the_loading_of_other_models_is_not_offered(address):
    for path in ("/load_model", "/reset", "/v1/responses", "/docs", "/openapi.json"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(urllib.request.Request(f"{address}{path}", b"{}"), timeout=60)


@needs_5
def test_a_missing_model_is_one_line(run, tmp_path):
    code, _, errors = run("serve", tmp_path / "none")
    assert code == 1
    assert "not a local folder" in only_line(errors)


@needs_5
def test_an_address_that_cannot_be_used_is_one_line(run, monkeypatch):
    monkeypatch.setattr("nanovlm_hf.serving.build_app", lambda name: pytest.fail("the model is loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, errors = run("serve", "--port", port)
    assert (code, only_line(errors)) == (1, f"nanovlm: --port {port}: in use: choose another")
    for host in ("192.0.2.1", "no.such.host.invalid", "a" * 70, "::2"):
        code, _, errors = run("serve", "--host", host)
        assert code == 1
        assert only_line(errors).startswith(f"nanovlm: --host {host}: cannot listen there (")


@needs_5
def test_a_missing_extra_is_one_line(run, monkeypatch):
    monkeypatch.setattr("nanovlm_hf.extras.find_spec", lambda name: None)
    code, _, errors = run("serve")
    assert code == 2
    assert "pip install 'nanovlm-hf[serve]'" in only_line(errors)
