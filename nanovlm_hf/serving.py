"""An OpenAI-compatible server: `/v1/chat/completions` completes the sentence that a message begins about its image.

Generation and the format of the replies are those of `transformers serve` (Transformers 5). Requests are validated
first, because that server opens any path and URL that a message names, and loads any model.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.requests import ClientDisconnect
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerationState, Modality

from .completion import fit_new_tokens, greedy_settings
from .errors import InputError, first_line
from .files import parse_json, validate
from .images import open_image_file
from .loading import load_model
from .modeling_nanovlm import NanoVLMForConditionalGeneration
from .processing_nanovlm import NanoVLMProcessor

MAX_BODY = 2**25  # bytes of a request
MAX_WAITING = 32  # requests and connections at a time; further ones are answered with 503
MAX_MESSAGES = 64


class _Settings(BaseModel):
    """`extra="ignore"`: clients send fields that change nothing here, such as `detail` of an image."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _ImageURL(_Settings):
    url: str


class _TextPart(_Settings):
    type: Literal["text"]
    text: str


class _ImagePart(_Settings):
    type: Literal["image_url"]
    image_url: _ImageURL


_Part = Annotated[_TextPart | _ImagePart, Field(discriminator="type")]


class _Message(_Settings):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[_Part]

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatRequest(_Settings):
    """The fields of a request that are used. A field that would change the reply and is not here is refused."""

    model: str | None = None
    messages: Annotated[list[_Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool = False
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None


REFUSED = ("tools", "functions", "response_format", "stop", "logit_bias", "logprobs")


class _OneModel:
    """The part of the model manager of `transformers serve` that its handler uses, with one model that stays loaded."""

    def __init__(self, name: str):
        self.force_model = name
        self.model, self.processor = load_model(name)

    def process_model_name(self, name: str) -> str:
        return name

    def load_model_and_processor(
        self, name: str, gguf_file: str | None = None
    ) -> tuple[NanoVLMForConditionalGeneration, NanoVLMProcessor]:
        return self.model, self.processor

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:
        return Modality.VLM


class _Handler(ChatCompletionHandler):
    """The handler of `transformers serve` for messages that `_messages` returned."""

    def get_processor_inputs_from_messages(self, messages: list[dict[str, Any]], modality: Modality) -> Any:
        return messages

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        config = super()._build_generation_config(body, model_generation_config, use_cb)
        temperature = body.get("temperature")
        config.do_sample = body.get("top_p", 1) < 1 if temperature is None else temperature > 0
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
    app = FastAPI(title="NanoVLM", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(InputError)
    async def refuse(request: Request, error: InputError) -> JSONResponse:
        return _error(400, str(error))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        content = await _body(request)
        if content is None:
            return _error(413, f"the request is larger than {MAX_BODY // 2**20} MiB: send a smaller image")
        # Decoding an image takes a while, in which other requests are answered.
        body = await asyncio.to_thread(_checked, content, models)
        return await handler.handle_request(body, f"chatcmpl-{id(request):x}")

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
        InputError: if the checkpoint cannot be loaded.
    """
    app = build_app(name)
    config = uvicorn.Config(app, host=host, port=port, limit_concurrency=MAX_WAITING, log_level="info")
    uvicorn.Server(config).run()


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
    request = validate(fields, ChatRequest, "request")
    if request.model not in (None, models.force_model):
        raise InputError(f"request: model: this server has {models.force_model} and no other")
    messages, prefix = _messages(request)
    limit = request.max_completion_tokens or request.max_tokens or models.model.generation_config.max_new_tokens
    most = fit_new_tokens(models.model.config, models.processor, prefix, None)
    body = request.model_dump(exclude_none=True, exclude={"messages", "max_completion_tokens"})
    return body | {"messages": messages, "max_tokens": min(limit or most, most)}


def _messages(request: ChatRequest) -> tuple[list[dict[str, Any]], str]:
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
    image = _decoded(urls[0])
    for converted in (message["content"] for message in messages):
        for one in converted:
            if one["type"] == "image":
                one["image"] = image
    return messages, " ".join(text.strip() for text in texts)


def _decoded(url: str) -> Image.Image:
    """Return the image of a data URL; no other address is opened, since anybody may send a request."""
    where = "request: image_url"
    head, separator, content = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and separator):
        raise InputError(f"{where}: send the image itself, as data:image/jpeg;base64,...; addresses are not opened")
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: not base64 ({first_line(error)})") from None
    return open_image_file(where, data)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)
