"""An OpenAI-compatible server: `/v1/chat/completions` completes the sentence that a message begins about its image.

Generation and the format of the replies are those of `transformers serve` (Transformers 5). Requests are validated
first, because that server opens any path and URL that a message names, and loads any model.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import errno
import functools
import socket
import uuid
from typing import Annotated, Any, Literal

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator
from starlette.requests import ClientDisconnect
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerationState, Modality
from uvicorn.protocols.http.h11_impl import H11Protocol

from .completion import finite_logits, fit_new_tokens
from .completion_files import LOWEST_TEMPERATURE
from .errors import InputError, first_line
from .files import parse_json, validate
from .generation_nanovlm import greedy_settings
from .images import open_image_file
from .loading import load_model
from .modeling_nanovlm import NanoVLMForConditionalGeneration
from .processing_nanovlm import NanoVLMProcessor

MAX_BODY = 2**24  # bytes of a request
BODY_SECONDS = 60  # in which a request has to arrive
IDLE_SECONDS = 15  # after which a connection without a request is closed
MAX_WAITING = 32  # connections at a time, from which on new ones are answered with 503
MAX_PARTS = 64  # messages of a request, and parts of a message
MAX_TEXT = 10_000  # characters of a request; the model reads about a thousand
SHUTDOWN_SECONDS = 10  # in which running requests may finish


class _Settings(BaseModel):
    """`extra="ignore"`: clients send fields that change nothing here, such as `detail` of an image."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _ImageURL(_Settings):
    url: str


class _TextPart(_Settings):
    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_TEXT)]


class _ImagePart(_Settings):
    type: Literal["image_url"]
    image_url: _ImageURL


_Part = Annotated[_TextPart | _ImagePart, Field(discriminator="type")]


class _Message(_Settings):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_Part], FailFast(), Field(max_length=MAX_PARTS)]

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class CompletionBody(_Settings):
    """The fields of a request that are used; those of `REFUSED` are errors, and any other is ignored."""

    model: str | None = None
    messages: Annotated[list[_Message], FailFast(), Field(min_length=1, max_length=MAX_PARTS)]
    stream: bool = False
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None


REFUSED = (
    *("tools", "functions", "response_format", "modalities", "logprobs", "top_logprobs"),
    *("stop", "logit_bias", "presence_penalty", "repetition_penalty", "top_k", "min_p"),
)


class _OneModel:
    """The part of the model manager of `transformers serve` that its handler uses, with one model that stays loaded."""

    def __init__(self, name: str):
        self.force_model = name
        self.model, self.processor = load_model(name)
        self.model.generate = functools.partial(_generate, self.model)

    def process_model_name(self, name: str) -> str:
        return name

    def load_model_and_processor(
        self, name: str, gguf_file: str | None = None
    ) -> tuple[NanoVLMForConditionalGeneration, NanoVLMProcessor]:
        return self.model, self.processor

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:
        return Modality.VLM


def _generate(
    model: NanoVLMForConditionalGeneration, generation_config: GenerationConfig, **inputs: Any
) -> torch.LongTensor:
    """Generate on the thread that does so for one request after another, with the seed of this one."""
    seed = generation_config.__dict__.pop("request_seed", None)
    if seed is not None:
        torch.manual_seed(seed)
    inputs |= {"generation_config": generation_config, "logits_processor": finite_logits()}
    return NanoVLMForConditionalGeneration.generate(model, **inputs)


class _Handler(ChatCompletionHandler):
    """The handler of `transformers serve` for messages that `_messages` returned."""

    def get_processor_inputs_from_messages(self, messages: list[dict[str, Any]], modality: Modality) -> Any:
        return messages

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        # The handler would set the seed at once, while another request is being generated.
        unseeded = {name: value for name, value in body.items() if name != "seed"}
        config = super()._build_generation_config(unseeded, model_generation_config, use_cb)
        config.request_seed = body.get("seed")
        temperature = body.get("temperature")
        if temperature is not None or "top_p" in body:
            config.do_sample = body.get("top_p", 1) < 1 if temperature is None else temperature >= LOWEST_TEMPERATURE
        if config.do_sample or body.get("stream"):
            greedy = greedy_settings(config)
            if "frequency_penalty" in body:
                greedy.pop("repetition_penalty", None)
            config.update(**greedy)
        return config


def build_app(name: str) -> FastAPI:
    """Return the server's application.

    Args:
        name: released checkpoint, folder or Hub id; requests may omit it.

    Raises:
        InputError: if the checkpoint cannot be loaded.
    """
    models = _OneModel(name)
    handler = _Handler(models, GenerationState())
    reading = asyncio.Semaphore(1)  # one request at a time, as its content may need many times its size
    app = FastAPI(title="NanoVLM", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(InputError)
    async def refuse(request: Request, error: InputError) -> JSONResponse:
        return _error(400, str(error))

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        return _error(500, f"unexpected {type(error).__name__}: the server's log has the traceback")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        try:
            content = await asyncio.wait_for(_body(request), BODY_SECONDS)
        except TimeoutError:
            return _error(408, f"the request did not arrive within {BODY_SECONDS} seconds")
        if content is None:
            return _error(413, f"the request is larger than {MAX_BODY // 2**20} MiB: send a smaller image")
        async with reading:  # in a thread, as decoding an image takes a while
            body = await asyncio.to_thread(_checked, content, models)
        return await handler.handle_request(body, f"chatcmpl-{uuid.uuid4().hex}")

    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        entry = {"id": name, "object": "model", "created": 0, "owned_by": "nanovlm_hf"}
        return JSONResponse({"object": "list", "data": [entry]})

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    return app


def serve(name: str, host: str, port: int) -> None:
    """Serve a checkpoint until Ctrl-C.

    Args:
        name: released checkpoint, folder or Hub id.
        host: address to listen at.
        port: 0 for any free port.

    Raises:
        InputError: if the checkpoint cannot be loaded, or the address is in use or not of this machine.
    """
    _check_address(host, port)
    uvicorn.Server(server_config(build_app(name), host=host, port=port, log_level="info")).run()


def _check_address(host: str, port: int) -> None:
    """Check that a server can listen at an address; Uvicorn itself would fail after the model is loaded."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise InputError(f"--port {port}: in use: choose another") from None
        problem = f"cannot listen there ({first_line(error)}): choose an address of this machine, or another --port"
        raise InputError(f"--host {host}: {problem}") from None


def server_config(app: FastAPI, **options: Any) -> uvicorn.Config:
    """Return the configuration of a server that bounds the number of connections, and how long they are idle.

    Args:
        app: application.
        options: further arguments of `uvicorn.Config`.
    """
    bounds = {"limit_concurrency": MAX_WAITING, "timeout_graceful_shutdown": SHUTDOWN_SECONDS}
    return uvicorn.Config(app, **{"http": _Connection, "ws": "none", **bounds, **options})


class _Connection(H11Protocol):
    """A connection that is closed if it has had no request for `IDLE_SECONDS`.

    Uvicorn alone waits for the first request without a limit, and for the rest of any request that has begun.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(IDLE_SECONDS, self._close_if_idle, None)

    def _close_if_idle(self, last: Any) -> None:
        """Close the connection if it is as idle as `IDLE_SECONDS` ago, when `last` was its last request."""
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is last:
            self.transport.close()
        else:
            self.loop.call_later(IDLE_SECONDS, self._close_if_idle, self.cycle if idle else self)


async def _body(request: Request) -> bytes | None:
    """Return the content of a request, or None if it is too large."""
    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_BODY:
                return None
    except ClientDisconnect:
        raise InputError("request: the connection ended before its content") from None
    return bytes(content)


def _checked(content: bytes, models: _OneModel) -> dict[str, Any]:
    """Return the fields of a request as the handler takes them, with the decoded image in its messages.

    Raises:
        InputError: naming the field that is missing, invalid or not supported.
    """
    fields = validate(parse_json(content.decode("utf-8", "replace"), "request"), dict[str, Any], "request")
    refused = [field for field in REFUSED if fields.get(field)]
    if refused or fields.get("n") not in (None, 1):
        raise InputError(f"request: {refused[0] if refused else 'n'}: not supported: leave it out")
    request = validate(fields, CompletionBody, "request")
    _check_length(request)  # before the texts are tokenized, while all other requests wait
    if request.model not in (None, models.force_model):
        raise InputError(f"request: model: this server has {models.force_model} and no other")
    messages, prefix = _messages(request, models.processor)
    limit = request.max_completion_tokens or request.max_tokens or models.model.generation_config.max_new_tokens
    most = fit_new_tokens(models.model.config, models.processor, prefix, None)
    body = request.model_dump(exclude_none=True, exclude={"messages", "max_completion_tokens"})
    if not request.frequency_penalty:  # 0 would switch off the checkpoint's own
        body.pop("frequency_penalty", None)
    return body | {"messages": messages, "max_tokens": min(limit or most, most)}


def _messages(request: CompletionBody, processor: NanoVLMProcessor) -> tuple[list[dict[str, Any]], str]:
    """Return the messages as the chat template takes them, and the text that they begin."""
    if request.messages[-1].role != "user":
        raise InputError("request: messages: the last one has to be the user's: give the beginning of the sentence")
    urls, texts, messages = [], [], []
    for message in request.messages:
        if message.role not in ("user", "assistant"):  # the model follows no instructions
            continue
        converted: list[dict[str, Any]] = []
        for part in message.content:
            if isinstance(part, _ImagePart):
                urls.append(part.image_url.url)
                converted.append({"type": "image", "image": None})
            else:
                texts.append(part.text)
                converted.append(part.model_dump())
        messages.append({"role": message.role, "content": converted})
    if len(urls) != 1:
        raise InputError(f"request: messages: one image_url is needed, and there are {len(urls)}")
    size = processor.image_processor.size
    image = _decoded(urls[0], (size["width"], size["height"]))
    for converted in (message["content"] for message in messages):
        for one in converted:
            if one["type"] == "image":
                one["image"] = image
    return messages, " ".join(text.strip() for text in texts)


def _check_length(request: CompletionBody) -> None:
    parts = (part for message in request.messages for part in message.content)
    length = sum(len(part.text) for part in parts if isinstance(part, _TextPart))
    if length > MAX_TEXT:
        raise InputError(f"request: messages: {length:,} characters of text, the limit is {MAX_TEXT:,}: shorten them")


def _decoded(url: str, size: tuple[int, int]) -> Image.Image:
    """Return the image of a data URL; no other address is opened, since anybody may send a request."""
    where = "request: image_url"
    head, separator, content = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and separator):
        raise InputError(f"{where}: send the image itself, as data:image/jpeg;base64,...; addresses are not opened")
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: not base64 ({first_line(error)})") from None
    return open_image_file(where, data, size=size)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)
