"""A model that begins as a smaller one (beyond the paper): of fewer blocks in the encoder, or of another decoder."""

from __future__ import annotations

import torch
from torch import nn

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration
from nanovlm_hf.modeling_nanovlm import NanoVLMVisionModel


@torch.no_grad()
def grow(model: NanoVLMForConditionalGeneration, other: NanoVLMForConditionalGeneration) -> None:
    """Gives a model the encoder of another, and each weight of its projector and decoder that has the same shape.

    Where the decoders have one width, the words keep their learned positions behind more or fewer visual tokens.
    Blocks that the other lacks come before the last one, through which [CLS] alone passes on; they add nothing to
    their input until they have learned to (as in progressive stacking, Gong et al. 2019, and Net2Net, Chen et al.
    2015), so that the encoder's output is at first the other's. Where it has more heads each of the other's is split,
    which changes little: base-short writes as well with 16 heads in its encoder as with its 8.

    Raises:
        InputError: if the other's encoder is wider or narrower, cuts pictures otherwise, or has more blocks.
    """
    _grow_encoder(model.model.vision_tower, other.model.vision_tower)
    own, others = model.state_dict(), other.state_dict()
    same = {name: value for name, value in others.items() if name in own and value.shape == own[name].shape}
    model.load_state_dict({name: value for name, value in same.items() if "vision_tower" not in name}, strict=False)
    _grow_positions(model, other)


def _grow_positions(model: NanoVLMForConditionalGeneration, other: NanoVLMForConditionalGeneration) -> None:
    own, others = (one.model.language_model.position_embedding.weight for one in (model, other))
    if own.shape[1] != others.shape[1]:
        return
    seen, others_seen = (one.config.image_seq_length for one in (model, other))
    shared, words = min(seen, others_seen), min(len(own) - seen, len(others) - others_seen)
    own[:shared] = others[:shared]
    own[seen : seen + words] = others[others_seen : others_seen + words]


def _grow_encoder(own: NanoVLMVisionModel, other: NanoVLMVisionModel) -> None:
    for name in ("hidden_size", "intermediate_size", "image_size", "patch_size"):
        wanted, found = getattr(own.config, name), getattr(other.config, name)
        if wanted != found:
            raise InputError(f"grow_from: its encoder's {name} is {found}, this model's is {wanted}")
    more = len(own.blocks) - len(other.blocks)
    if more < 0:
        raise InputError(f"grow_from: its encoder has {len(other.blocks)} blocks, this model's {len(own.blocks)}")
    first = len(other.blocks) - 1
    for block in own.blocks[first : first + more]:
        for layer in (block.self_attn.out_proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    kept = [*own.blocks[:first], *own.blocks[first + more :]]
    for block, begun in zip(kept, other.blocks, strict=True):
        block.load_state_dict(begun.state_dict())
    rest = {name: value for name, value in other.state_dict().items() if not name.startswith("blocks.")}
    own.load_state_dict(rest, strict=False)
