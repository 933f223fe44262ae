"""A web page on which a model completes a sentence about an image, and the same sentence about a blank image.

Run as a script it is a Hugging Face Space; `nanovlm demo` starts the same page locally.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import HTTPException
from gradio.route_utils import API_PREFIX
from starlette.middleware import Middleware
from starlette.responses import JSONResponse

from nanovlm_hf import PRESETS, SHIPPED, InputError, NanoVLMConfig
from nanovlm_hf.completion import blank_image, stream
from nanovlm_hf.devices import cpu_count
from nanovlm_hf.export.page import EXAMPLES
from nanovlm_hf.images import open_image_file
from nanovlm_hf.loading import load_model
from nanovlm_hf.variants import VARIANTS

CACHED_MODELS = 2  # kept in memory; a Space has several visitors, but only two cores
LONGEST_QUEUE = 20  # waiting visitors; further ones are asked to come back later
LONGEST_PREFIX = 400  # characters
LARGEST_REQUEST = 100_000  # bytes, except for uploads
LARGEST_UPLOAD = 20 * 2**20  # bytes of a photo
UPLOADS = f"{API_PREFIX}/upload"
TOO_LONG = f"The beginning of the sentence may have at most {LONGEST_PREFIX} characters."
# The variants that have released models, with the words of a description.
STYLES = {
    name: "{} to {}".format(*variant.requested.words) for name, variant in VARIANTS.items() if f"mini-{name}" in SHIPPED
}
INTRODUCTION = """# How small can a vision-language model be?

NanoVLM completes a sentence about a photo in the words of a small child (parameters: {parameters}). It is tiny and has
seen few photos, so it often names the wrong object. The second text is what the same model writes for a blank image:
the difference shows what it takes from the photo."""


def sizes() -> list[str]:
    """Return the model sizes whose checkpoints for all styles are available locally."""
    return [size for size in PRESETS if {f"{size}-{style}" for style in STYLES} <= set(SHIPPED)]


def millions(size: str) -> str:
    """Return the number of parameters of a model size, such as `5.7M`."""
    return f"{NanoVLMConfig.from_preset(size).parameter_counts()['total'] / 1e6:.1f}M"


def model_of(name: str) -> tuple[Any, Any]:
    """Return a cached model and a copy of its processor, because tokenizers are not thread-safe."""
    with _loading:
        model, processor = _load(name)
        return model, copy.deepcopy(processor)


_loading = threading.Lock()  # Transformers initialises models through global state
_load = functools.lru_cache(maxsize=CACHED_MODELS)(load_model)


def complete(photo: str | None, prefix: str, size: str, style: str) -> Iterator[tuple[str, str]]:
    """Yield the completions for an image and for a blank image, word by word.

    The arguments are untrusted: any program can send them, not only the page.

    Args:
        photo: path of the image file.
        prefix: beginning of the sentence.
        size: mini, base or large.
        style: one of `STYLES`.

    Raises:
        gr.Error: shown on the page, if an argument is invalid.
    """
    if photo is None:
        raise gr.Error("Choose a photo first.", print_exception=False)
    if not isinstance(prefix, str) or len(prefix) > LONGEST_PREFIX:
        raise gr.Error(TOO_LONG, print_exception=False)
    if size not in sizes() or style not in list(STYLES):
        raise gr.Error(f"Choose one of {', '.join(sizes())}, and {' or '.join(STYLES)}.", print_exception=False)
    with_image = without_image = ""
    try:
        model, processor = model_of(f"{size}-{style}")
        image = open_image_file(photo)
        for with_image in stream(model, processor, image, prefix):
            yield with_image, without_image
        for without_image in stream(model, processor, blank_image(processor), prefix):
            yield with_image, without_image
    except InputError as error:
        raise gr.Error(str(error).replace(photo, Path(photo).name), print_exception=False) from None


def uploaded(photo: gr.Image, upload: Any) -> str | None:
    """Return the path of an upload without opening it.

    Gradio would open it with Pillow, which hides the reason if the file is not an image and logs a traceback.

    Raises:
        gr.Error: for a local file that was not uploaded.
    """
    if upload is None or not upload.path:
        return None
    if not Path(upload.path).resolve().is_relative_to(Path(photo.GRADIO_CACHE).resolve()):
        raise gr.Error("Upload the photo first.", print_exception=False)
    return upload.path


class SmallRequests:
    """ASGI middleware that rejects requests larger than any that the page sends, as Gradio keeps them for an hour.

    The bytes are counted as they arrive, since a request need not state its length.

    Args:
        app: the wrapped application.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = LARGEST_REQUEST + (LARGEST_UPLOAD if scope["path"] == UPLOADS else 0)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 9 or int(length) > limit:
            await JSONResponse({"detail": TOO_LONG}, status_code=413)(scope, receive, send)
            return
        size = 0

        async def receive_some() -> dict[str, Any]:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise HTTPException(413, TOO_LONG)
            return message

        await self.app(scope, receive_some, send)


def page() -> gr.Blocks:
    """Build the page."""
    choices = sizes()
    # No analytics; uploaded images are removed after an hour.
    with gr.Blocks(title="NanoVLM", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(INTRODUCTION.format(parameters=", ".join(map(millions, choices))))
        with gr.Row():
            with gr.Column(min_width=300):
                photo = gr.Image(label="Photo", type="filepath", image_mode=None, height=320)
                prefix = gr.Textbox("There is a", label="Beginning of the sentence", max_length=LONGEST_PREFIX)
                size = gr.Radio(
                    [(f"{one} ({millions(one)})", one) for one in choices],
                    value=choices[0],
                    label="Size",
                    visible=len(choices) > 1,
                )
                style = gr.Radio(
                    [(f"{style} ({words} words)", style) for style, words in STYLES.items()],
                    value=next(iter(STYLES)),
                    label="Style",
                )
                button = gr.Button("Complete", variant="primary")
            with gr.Column(min_width=300):
                with_image = gr.Textbox(label="With the photo", lines=4, buttons=["copy"], elem_id="looking")
                without_image = gr.Textbox(label="With a blank image", lines=4, elem_id="blind")
        # Arguments reach `complete` unprocessed: it validates them, without a traceback in the log.
        photo.preprocess = functools.partial(uploaded, photo)
        for one in (prefix, size, style):
            one.preprocess = lambda value: value
        folder = Path(__file__).parent / "examples"
        gr.Examples([[str(folder / f"{name}.jpg"), text] for name, text in EXAMPLES.items()], [photo, prefix])
        gr.on([button.click, prefix.submit], complete, [photo, prefix, size, style], [with_image, without_image])
    # Requests that would bypass the queue are rejected.
    blocks.queue(max_size=LONGEST_QUEUE, default_concurrency_limit=cpu_count(), api_open=False)
    return blocks


def launch(port: int | None = None) -> None:
    """Serve the page until Ctrl-C.

    Args:
        port: None for 7860, or the next free one.

    Raises:
        OSError: if the port is in use.
    """
    # Gradio's default fonts are loaded from Google's servers.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    wrap = ".table-wrap th { white-space: normal }"  # otherwise the examples are wider than a phone's screen
    page().launch(
        server_port=port,
        theme=theme,
        css=wrap,
        max_file_size=LARGEST_UPLOAD,
        footer_links=[],
        app_kwargs={"middleware": [Middleware(SmallRequests)]},
    )


if __name__ == "__main__":
    launch()
