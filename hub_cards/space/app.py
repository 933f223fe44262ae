"""A page on which a model completes a sentence about a photo, beside what it says of a blank picture.

Run as a program it is a Hugging Face Space; `nanovlm demo` starts the same page on one's own machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from nanovlm_hf import PRESETS, SHIPPED, InputError, NanoVLMConfig
from nanovlm_hf.completion import blank_picture, load_model, stream
from nanovlm_hf.photos import open_photo

EXAMPLES = {
    "camera": "A man in a black coat",
    "astronaut": "A woman in an orange suit",
    "cat": "A brown cat looks",
    "coffee": "A red cup of coffee",
    "rocket": "A tall rocket in the dark sky",
}
MODELS_AT_HAND = 2  # in memory at a time; a Space has several visitors, but two cores
INTRODUCTION = """# How small can a vision-language model be?

NanoVLM completes a sentence about a photo in a small child's words (parameters: {parameters}). It has seen eight
thousand photos, mostly of people and dogs outdoors, so it often names the wrong thing. The second line is what the same
model says without looking, of a blank picture: what differs is what it saw."""


def sizes() -> list[str]:
    """The sizes of which both styles are on this machine."""
    return [size for size in PRESETS if {f"{size}-short", f"{size}-long"} <= set(SHIPPED)]


def millions(size: str) -> str:
    """How many parameters a size has, as `5.7M`."""
    return f"{NanoVLMConfig.from_preset(size).parameter_counts()['total'] / 1e6:.1f}M"


@functools.lru_cache(maxsize=MODELS_AT_HAND)
def model_of(name: str) -> tuple[Any, Any]:
    """A model and its processor, kept for the next visitor."""
    return load_model(name)


def complete(photo: str | None, prefix: str, size: str, style: str) -> Iterator[tuple[str, str]]:
    """What a model says of a photo, and of a blank picture, as the words come.

    Args:
        photo: file.
        prefix: how the sentence begins.
        size: mini, base or large.
        style: short or long.

    Raises:
        gr.Error: shown on the page, where there is no photo or it cannot be opened, or the prefix is too long.
    """
    if photo is None:
        raise gr.Error("Choose a photo first.", print_exception=False)
    seen = unseen = ""
    try:
        model, processor = model_of(f"{size}-{style}")
        image = open_photo(photo)
        for seen in stream(model, processor, image, prefix):
            yield seen, unseen
        for unseen in stream(model, processor, blank_picture(processor), prefix):
            yield seen, unseen
    except InputError as error:
        raise gr.Error(str(error).replace(photo, Path(photo).name), print_exception=False) from None


def page() -> gr.Blocks:
    """The page; `launch()` starts it."""
    choices = sizes()
    # Nothing is told to anybody, and visitors' photos are removed after an hour.
    with gr.Blocks(title="NanoVLM", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(INTRODUCTION.format(parameters=", ".join(map(millions, choices))))
        with gr.Row():
            with gr.Column(min_width=300):
                photo = gr.Image(label="Photo", type="filepath", image_mode=None, height=320)
                prefix = gr.Textbox("There is a", label="How the sentence begins", max_length=400)
                size = gr.Radio(
                    [(f"{one} ({millions(one)})", one) for one in choices],
                    value=choices[0],
                    label="Size",
                    visible=len(choices) > 1,
                )
                style = gr.Radio(
                    [("short (20 to 25 words)", "short"), ("long (60 to 70 words)", "long")],
                    value="short",
                    label="Style",
                )
                button = gr.Button("Complete", variant="primary")
            with gr.Column(min_width=300):
                seen = gr.Textbox(label="Looking at the photo", lines=4, buttons=["copy"], elem_id="looking")
                unseen = gr.Textbox(label="Without looking", lines=4, elem_id="blind")
        folder = Path(__file__).parent / "examples"
        gr.Examples([[str(folder / f"{name}.jpg"), begins] for name, begins in EXAMPLES.items()], [photo, prefix])
        gr.on([button.click, prefix.submit], complete, [photo, prefix, size, style], [seen, unseen])
    return blocks


def launch(port: int | None = None) -> None:
    """Serves the page until Ctrl-C.

    Args:
        port: 7860, or the next one that is free, when None.

    Raises:
        OSError: if the port is taken.
    """
    # Gradio's own fonts come from a server of Google's.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    wrap = ".table-wrap th { white-space: normal }"  # or the examples are wider than a phone
    page().launch(server_port=port, theme=theme, css=wrap, max_file_size="20mb", footer_links=[])


if __name__ == "__main__":
    launch()
