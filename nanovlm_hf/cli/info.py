"""`nanovlm info`."""

from __future__ import annotations

from typing import Annotated

import typer


def info(
    model: Annotated[
        str, typer.Argument(help="Preset (mini, base, large), released checkpoint, local folder or Hub id.")
    ],
) -> None:
    """Print the shape and the number of parameters of each part of a model (Table 2 of the paper)."""
    from ..configuration_nanovlm import NanoVLMConfig
    from ..loading import load_config
    from ..paper_nanovlm import PRESETS, projector_widths

    config = NanoVLMConfig.from_preset(model) if model in PRESETS else load_config(model)
    counts = config.parameter_counts()
    vision, text = config.vision_config, config.text_config
    shapes = {
        "encoder": f"{vision.num_hidden_layers} blocks of {vision.hidden_size}, {vision.num_attention_heads} heads",
        "projector": " -> ".join(map(str, projector_widths(config))),
        "decoder": f"{text.num_hidden_layers} blocks of {text.hidden_size}, {text.num_attention_heads} heads, "
        f"{text.vocab_size} entries",
        "total": f"{config.image_seq_length} image token{'s' * (config.image_seq_length > 1)}, "
        f"{text.max_position_embeddings} positions",
    }
    print(f"{'part':<10} {'parameters':>12} {'share':>6}  shape")
    for part, count in counts.items():
        print(f"{part:<10} {count:>12,} {100 * count / counts['total']:>5.1f}%  {shapes[part]}")
