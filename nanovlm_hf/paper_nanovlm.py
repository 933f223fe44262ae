"""The paper's model sizes (Table 1), its names for configuration fields, and parameter counts (Table 2).

This file is saved with checkpoints that carry their code, so it imports no other module of the package.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

TABLE_1 = ("mini", "base", "large")  # the paper's own among the presets
# With the names of the paper.
PRESETS = {
    "mini": {"n_blks": 1, "n_layer": 4, "n_head": 8, "head_size": 12, "n_embd": 96, "img_embd_dim": 400},
    "base": {"n_blks": 3, "n_layer": 8, "n_head": 8, "head_size": 16, "n_embd": 128, "img_embd_dim": 512},
    "large": {"n_blks": 5, "n_layer": 10, "n_head": 16, "head_size": 12, "n_embd": 192, "img_embd_dim": 512},
}
# The sizes that a run can set instead of those of its preset; `n_embd` follows from them.
PAPERS_NAMES = ("n_blks", "n_layer", "n_head", "head_size", "img_embd_dim")


def config_fields(
    n_blks: int,
    n_layer: int,
    n_head: int,
    head_size: int,
    n_embd: int,
    img_embd_dim: int,
    dropout: float,
    vocab_size: int,
) -> dict[str, dict[str, Any]]:
    """Return the fields of `vision_config` and `text_config` for the names of Table 1.

    Raises:
        ValueError: if `n_head * head_size` is not `n_embd`.
    """
    if n_head * head_size != n_embd:
        raise ValueError(f"n_head * head_size = {n_head} * {head_size} = {n_head * head_size}, n_embd is {n_embd}")
    vision_config = {
        "hidden_size": img_embd_dim,
        "num_hidden_layers": n_blks,
        "num_attention_heads": n_head,
        "hidden_dropout": dropout,
    }
    text_config = {
        "vocab_size": vocab_size,
        "hidden_size": n_embd,
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
        "hidden_dropout": dropout,
    }
    return {"vision_config": vision_config, "text_config": text_config}


def projector_widths(config: Any) -> tuple[int, int, int]:
    """Return the widths of the projector's input, hidden layer and output, with which Table 2's shares are met."""
    width = config.vision_config.hidden_size
    return width, 4 * width, config.text_config.hidden_size


def parameter_counts(config: Any) -> dict[str, int]:
    """Return the closed-form number of parameters of each part of a `NanoVLMConfig`; see its method of this name."""
    vision, text = config.vision_config, config.text_config
    width, patch_pixels = vision.hidden_size, vision.num_channels * vision.patch_size**2
    patch_embeddings = (patch_pixels + 1) * width + (9 * width + 1) * width + (width + 1) * width + 4 * width
    encoder = (
        patch_embeddings
        + width  # [CLS]
        + (vision.num_patches + 1) * width  # positions
        + 4 * width  # the LayerNorms before and after the layers
        + vision.num_hidden_layers * _layer_parameters(vision)
    )
    projector = sum((inputs + 1) * outputs for inputs, outputs in pairwise(projector_widths(config)))
    decoder = (
        text.vocab_size * text.hidden_size * (1 if config.tie_word_embeddings else 2)
        + text.max_position_embeddings * text.hidden_size
        + text.num_hidden_layers * _layer_parameters(text)
        + 2 * text.hidden_size  # the last LayerNorm
    )
    return {
        "encoder": encoder,
        "projector": projector,
        "decoder": decoder,
        "total": encoder + projector + decoder,
    }


def _layer_parameters(config: Any) -> int:
    width, inner = config.hidden_size, config.intermediate_size
    attention = 4 * (width + 1) * width
    mlp = (width + 1) * inner + (inner + 1) * width
    return attention + mlp + 4 * width


__all__ = ["PAPERS_NAMES", "PRESETS", "config_fields", "parameter_counts", "projector_widths"]
