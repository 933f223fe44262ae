"""Compare exported graphs with PyTorch: logits, and the text of several prompts."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..errors import completion_line
from ..generation_nanovlm import greedy_settings
from ..images import open_image_file
from .runtime import OnnxModel

if TYPE_CHECKING:
    from ..modeling_nanovlm import NanoVLMForConditionalGeneration
    from ..processing_nanovlm import NanoVLMProcessor

PREFIXES = ("", "There is a", "A little boy", "The big red")
NEW_TOKENS = 40


def example_images() -> list[Image.Image]:
    """Return the demo's images, which are in the public domain, and an image of noise."""
    folder = Path(str(files("nanovlm_hf.hub_cards.space"))) / "examples"
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    return [open_image_file(path) for path in sorted(folder.glob("*.jpg"))] + [Image.fromarray(noise)]


@torch.no_grad()
def compare_with_pytorch(
    model: NanoVLMForConditionalGeneration, processor: NanoVLMProcessor, folder: Path, dtype: str
) -> dict[str, Any]:
    """Complete every prefix about every example image in both runtimes, greedily.

    Returns:
        `completions`, how many were compared; `same_text`, how many of them are equal; `max_logit_difference`, the
        largest absolute difference of the logits of a prompt's last token.
    """
    exported = OnnxModel(folder, dtype)
    greedy = {"do_sample": False, "num_beams": 1} | greedy_settings(model.generation_config)
    same, largest, compared = 0, 0.0, 0
    for image in example_images():
        features = exported.encode(image)
        for prefix in PREFIXES:
            inputs = processor(images=image, text=prefix, return_tensors="pt")
            limit = min(NEW_TOKENS, exported.positions - inputs["input_ids"].shape[1])
            tokens = model.generate(**inputs, max_new_tokens=limit, **greedy)[0]
            text = completion_line(processor.tokenizer.decode(tokens, skip_special_tokens=True))
            prompt = inputs["input_ids"][0].tolist()
            completed = exported.generate(features, prompt, limit, num_beams=1)
            same += text == exported.text(prompt + completed)
            expected = model(**inputs).logits[0, -1].numpy()
            largest = max(largest, float(np.abs(exported.logits(features, prompt) - expected).max()))
            compared += 1
    return {"completions": compared, "same_text": same, "max_logit_difference": round(largest, 6)}
