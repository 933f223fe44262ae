"""A model that begins as a smaller one, or with its eyes (beyond the paper)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration
from nanovlm_hf.modeling_nanovlm import NanoVLMAttention, NanoVLMBlock, NanoVLMVisionModel

NOISE = 0.05  # of a copy's weights, as a share of their deviation, or it would learn what the first one learns


@torch.no_grad()
def grow(model: NanoVLMForConditionalGeneration, other: NanoVLMForConditionalGeneration) -> None:
    """Gives a model the eyes of another and, where its decoder is not smaller or otherwise headed, how it writes.

    The decoder grows as the encoder does, its added blocks last, and its words keep their learned positions behind more
    or fewer visual tokens. Otherwise the decoder begins anew, and with it the projector's second layer.

    Raises:
        InputError: as `grow_eyes`.
    """
    hidden = grow_eyes(model, other)
    own, others = model.model.multi_modal_projector.fc2, other.model.multi_modal_projector.fc2
    if _holds_decoder(model, other):
        _fill(own, others, _grow_decoder(model, other), hidden)


@torch.no_grad()
def grow_eyes(model: NanoVLMForConditionalGeneration, other: NanoVLMForConditionalGeneration) -> _Spread:
    """Gives a model the encoder of another, and the first layer of its projector.

    Blocks that the other lacks come before the last one, through which [CLS] alone passes on; they add nothing to
    their input until they have learned to (as in progressive stacking, Gong et al. 2019), so that the encoder's output
    is at first the other's. Where it is wider, some of the other's features come twice and count half each (Net2Net,
    Chen et al. 2015); LayerNorm sees their mean and variance nearly as before. Where it has more heads, several look
    where one of the other's looked, as nearly as their narrower queries and keys can, each for a part of its values.

    Returns:
        Which of the features that the other's first layer makes each of this one's is.

    Raises:
        InputError: if the other's encoder is wider, cuts pictures otherwise, or has more blocks, or if its heads
            do not share the width.
    """
    own_tower, tower = model.model.vision_tower, other.model.vision_tower
    _refuse_larger(own_tower, tower)
    features = _grow_encoder(own_tower, tower)
    own_layer, layer = model.model.multi_modal_projector.fc1, other.model.multi_modal_projector.fc1
    hidden = _spread(own_layer.out_features, layer.out_features)
    _fill(own_layer, layer, hidden, features)
    return hidden


@dataclass(frozen=True)
class _Spread:
    """Which of the other's features each of a layer's is.

    Attributes:
        index: (features,), the other's.
        share: (features,), what each counts, so that all copies of one count as much as it did.
        copied: (features,), 1.0 for those that are there already.
    """

    index: torch.Tensor
    share: torch.Tensor
    copied: torch.Tensor


def _spread(own: int, others: int, groups: int = 1) -> _Spread:
    """Every feature of the other once, and by chance some again; within each of so many groups of them."""
    size, others_size = own // groups, others // groups
    parts = [
        torch.cat([torch.arange(others_size), torch.randint(others_size, (size - others_size,))]) + group * others_size
        for group in range(groups)
    ]
    copied = (torch.arange(own) % size >= others_size).float()
    index = torch.cat(parts)
    return _Spread(index, 1 / torch.bincount(index)[index], copied)


def _fill(
    own: nn.Linear | nn.Conv2d, other: nn.Linear | nn.Conv2d, rows: _Spread, columns: _Spread | None = None
) -> None:
    """Gives a layer the other's weights: `rows` of what it makes, `columns` of what it takes."""
    weight = other.weight[rows.index]
    if columns is not None:
        weight = weight[:, columns.index] * columns.share.view(1, -1, *[1] * (weight.ndim - 2))
    noise = torch.randn_like(weight) * (NOISE * weight.std())
    own.weight.copy_(weight + noise * rows.copied.view(-1, *[1] * (weight.ndim - 1)))
    own.bias.copy_(other.bias[rows.index])


def _fill_norm(own: nn.LayerNorm, other: nn.LayerNorm, features: _Spread) -> None:
    own.weight.copy_(other.weight[features.index])
    own.bias.copy_(other.bias[features.index])


def _refuse_larger(own: NanoVLMVisionModel, other: NanoVLMVisionModel) -> None:
    for name in ("image_size", "patch_size"):
        wanted, found = getattr(own.config, name), getattr(other.config, name)
        if wanted != found:
            raise InputError(f"grow_from: its encoder's {name} is {found}, this model's is {wanted}")
    if len(other.blocks) > len(own.blocks):
        raise InputError(f"grow_from: its encoder has {len(other.blocks)} blocks, this model's {len(own.blocks)}")
    width, others_width = own.config.hidden_size, other.config.hidden_size
    heads, others_heads = own.config.num_attention_heads, other.config.num_attention_heads
    if others_width > width:
        raise InputError(f"grow_from: its encoder's hidden_size is {others_width}, this model's is {width}")
    if heads % others_heads or width % others_heads:
        raise InputError(
            f"grow_from: its encoder has {others_heads} heads, this model's {heads} and a hidden_size of {width}"
        )


def _grow_encoder(own: NanoVLMVisionModel, other: NanoVLMVisionModel) -> _Spread:
    """Fills the encoder, and says which of the other's features each of its output is."""
    features = _spread(own.config.hidden_size, other.config.hidden_size)
    embedding, others = own.patch_embedding, other.patch_embedding
    _fill(embedding.conv1, others.conv1, features)
    _fill(embedding.conv2, others.conv2, features, features)
    _fill(embedding.fc, others.fc, features, features)
    _fill_norm(embedding.norm1, others.norm1, features)
    _fill_norm(embedding.norm2, others.norm2, features)
    for name in ("cls_token", "position_embedding"):
        getattr(own, name).copy_(getattr(other, name)[..., features.index])
    for name in ("pre_norm", "norm"):
        _fill_norm(getattr(own, name), getattr(other, name), features)

    _grow_blocks(own.blocks, other.blocks, features, before=len(other.blocks) - 1)
    return features


def _grow_blocks(own: nn.ModuleList, others: nn.ModuleList, features: _Spread, before: int) -> None:
    """Fills the blocks; those that the other lacks come before a place among its own, and add nothing at first."""
    added = own[before : before + len(own) - len(others)]
    for block in added:
        for layer in (block.self_attn.out_proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    kept = [*own[:before], *own[before + len(added) :]]
    for block, begun in zip(kept, others, strict=True):
        _grow_block(block, begun, features)


def _grow_block(own: NanoVLMBlock, other: NanoVLMBlock, features: _Spread) -> None:
    attention, others = own.self_attn, other.self_attn
    width, others_width = attention.q_proj.out_features, others.q_proj.out_features
    within_heads = _spread(width, others_width, groups=others.config.num_attention_heads)
    for name in ("q_proj", "k_proj", "v_proj"):
        _fill(getattr(attention, name), getattr(others, name), within_heads, features)
    # Products of queries and keys: a feature that comes twice counts once, and wider heads divide by more.
    for layer, scale in ((attention.q_proj, (width / others_width) ** 0.5), (attention.k_proj, 1.0)):
        factors = within_heads.share.sqrt() * scale
        layer.weight.mul_(factors[:, None])
        layer.bias.mul_(factors)
    _split_heads(attention, others.config.num_attention_heads)
    _fill(attention.out_proj, others.out_proj, features, within_heads)
    hidden = _spread(own.mlp.fc1.out_features, other.mlp.fc1.out_features)
    _fill(own.mlp.fc1, other.mlp.fc1, hidden, features)
    _fill(own.mlp.fc2, other.mlp.fc2, features, hidden)
    _fill_norm(own.norm1, other.norm1, features)
    _fill_norm(own.norm2, other.norm2, features)


def _split_heads(attention: NanoVLMAttention, heads: int) -> None:
    """Has every head among so many, where the attention has a multiple of them, work as several, each on its part of
    the values: they share the nearest query and key weights of their width."""
    parts = attention.config.num_attention_heads // heads
    if parts == 1:
        return
    layers = (attention.q_proj, attention.k_proj)
    # The bias is the weight of one more input, which is always 1.
    whole = [torch.cat([layer.weight, layer.bias[:, None]], dim=1).unflatten(0, (heads, -1)) for layer in layers]
    bases, factors = zip(*(torch.linalg.qr(weights.mT) for weights in whole), strict=True)
    left, singular, right = torch.linalg.svd(factors[0] @ factors[1].mT)
    # Narrower heads divide their products by less.
    strength = (singular / parts**0.5).sqrt()[:, None]
    for layer, basis, side in zip(layers, bases, (left, right.mT), strict=True):
        nearest = ((basis @ side) * strength)[..., : attention.head_dim].mT
        shared = nearest.repeat_interleave(parts, dim=0).flatten(0, 1)
        layer.weight.copy_(shared[:, :-1])
        layer.bias.copy_(shared[:, -1])


def _holds_decoder(model: NanoVLMForConditionalGeneration, other: NanoVLMForConditionalGeneration) -> bool:
    own, others = (one.config.text_config for one in (model, other))
    return (
        own.vocab_size == others.vocab_size
        and own.hidden_size >= others.hidden_size
        and own.num_hidden_layers >= others.num_hidden_layers
        and own.hidden_size % others.num_attention_heads == 0
        and own.num_attention_heads % others.num_attention_heads == 0
    )


def _grow_decoder(model: NanoVLMForConditionalGeneration, other: NanoVLMForConditionalGeneration) -> _Spread:
    """Fills decoder and head, and says which of the other's features each of an embedding is."""
    own, others = model.model.language_model, other.model.language_model
    features = _spread(own.config.hidden_size, others.config.hidden_size)
    own.embed_tokens.weight.copy_(others.embed_tokens.weight[:, features.index])
    model.lm_head.weight.copy_(other.lm_head.weight[:, features.index])
    seen, others_seen = (one.config.image_seq_length for one in (model, other))
    positions, begun = own.position_embedding.weight, others.position_embedding.weight[:, features.index]
    shared, words = min(seen, others_seen), min(len(positions) - seen, len(begun) - others_seen)
    positions[:shared] = begun[:shared]
    positions[seen : seen + words] = begun[others_seen : others_seen + words]
    _grow_blocks(own.blocks, others.blocks, features, before=len(others.blocks))
    # The head takes every copy of a feature: together they count once.
    _fill_norm(own.norm, others.norm, features)
    own.norm.weight.mul_(features.share)
    own.norm.bias.mul_(features.share)
    return features
