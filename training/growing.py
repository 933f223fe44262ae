"""A model that begins with the eyes of another (beyond the paper): of fewer blocks, or of another decoder."""

from __future__ import annotations

import torch
from torch import nn

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration


@torch.no_grad()
def take_encoder(model: NanoVLMForConditionalGeneration, other: NanoVLMForConditionalGeneration) -> None:
    """Gives a model the visual encoder of another, and of its projector what fits.

    Blocks that the other lacks come before the last one, through which [CLS] alone passes on; they add nothing to
    their input until they have learned to (as in progressive stacking, Gong et al. 2019, and Net2Net, Chen et al.
    2015), so that the encoder's output is at first the other's to the bit.

    Raises:
        InputError: if the other is wider or narrower, cuts pictures otherwise, or has more blocks.
    """
    own, others = model.model.vision_tower, other.model.vision_tower
    for name in ("hidden_size", "num_attention_heads", "intermediate_size", "image_size", "patch_size"):
        wanted, found = getattr(own.config, name), getattr(others.config, name)
        if wanted != found:
            raise InputError(f"init_encoder_from: its encoder's {name} is {found}, this model's is {wanted}")
    more = len(own.blocks) - len(others.blocks)
    if more < 0:
        raise InputError(f"init_encoder_from: its encoder has {len(others.blocks)} blocks, this one {len(own.blocks)}")
    added = range(len(others.blocks) - 1, len(others.blocks) - 1 + more)
    for block in (own.blocks[place] for place in added):
        for layer in (block.self_attn.out_proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    kept = [block for place, block in enumerate(own.blocks) if place not in added]
    for block, begun in zip(kept, others.blocks, strict=True):
        block.load_state_dict(begun.state_dict())
    rest = {name: value for name, value in others.state_dict().items() if not name.startswith("blocks.")}
    own.load_state_dict(rest, strict=False)
    _take_projector(model.model.multi_modal_projector, other.model.multi_modal_projector)


def _take_projector(own: nn.Module, other: nn.Module) -> None:
    own.fc1.load_state_dict(other.fc1.state_dict())
    if own.fc2.weight.shape == other.fc2.weight.shape:
        own.fc2.load_state_dict(other.fc2.state_dict())
