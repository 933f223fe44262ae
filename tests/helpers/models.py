"""Tiny models, processors and images."""

import numpy as np
import torch
from PIL import Image

from nanovlm_hf import NanoVLMConfig, NanoVLMForConditionalGeneration, NanoVLMImageProcessor, NanoVLMProcessor
from nanovlm_hf.configuration_nanovlm import VISION_FEATURE_SELECT_STRATEGIES

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 200), "yellow": (220, 210, 40)}


SENTENCES = [
    "A little boy and his mother walk through the green grass to see the water.",
    "Two brown birds sit together under an old tree, waiting for their breakfast.",
    *(
        f"There is a big {colour} {thing}. It looks so {feeling}!"
        for colour in COLOURS
        for thing in ("ball", "kite", "bus", "dog", "castle", "flower", "mountain")
        for feeling in ("happy", "shiny", "soft", "funny", "warm")
    ),
]


STRATEGIES = VISION_FEATURE_SELECT_STRATEGIES


def tiny_config(strategy: str = "cls", **kwargs) -> NanoVLMConfig:
    """Return a config of two layers in each tower and 4 patches, without dropout and with large weights."""
    vision_config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "hidden_dropout": 0.0,
    }
    sizes = NanoVLMConfig(vision_config=vision_config, vision_feature_select_strategy=strategy)
    return NanoVLMConfig(
        vision_config=vision_config,
        text_config={
            "vocab_size": 320,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 47 + sizes.image_seq_length,
            "hidden_dropout": 0.0,
            "initializer_range": 0.3,
        },
        vision_feature_select_strategy=strategy,
        **kwargs,
    )


def tiny_model(strategy: str = "cls", **kwargs) -> NanoVLMForConditionalGeneration:
    torch.manual_seed(0)
    return NanoVLMForConditionalGeneration(tiny_config(strategy, **kwargs)).eval()


def tiny_processor(tokenizer, strategy: str = "cls") -> NanoVLMProcessor:
    image_processor = NanoVLMImageProcessor(size={"height": 32, "width": 32})
    return NanoVLMProcessor(image_processor, tokenizer, image_seq_length=tiny_config(strategy).image_seq_length)


def random_image(seed: int = 0, size: tuple[int, int] = (48, 40), mode: str = "RGB") -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "CMYK": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode=mode) if mode == "CMYK" else Image.fromarray(pixels.squeeze())


def old_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights of a model or of one of its towers under the names of version 0.1.0."""
    changes = {
        "embed_positions": "position_embedding",
        "layers.": "blocks.",
        "layer_norm": "norm",
        "patch_embeddings.": "patch_embedding.",
        "position_embeddings": "position_embedding",
        "pre_layernorm": "pre_norm",
        "post_layernorm": "norm",
        "embeddings.": "",
    }

    def old_name(name: str) -> str:
        for new, old in changes.items():
            name = name.replace(new, old)
        return name

    return {old_name(name): weight for name, weight in weights.items()}
