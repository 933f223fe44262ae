"""A plain PyTorch implementation of NanoVLM: the reference of `training_step.py`, not used elsewhere."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from nanovlm_hf import NanoVLMConfig


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = self.attend(*qkv)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.mlp(self.norm2(x)))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class LoopedBlock(Block):
    """Attention as in tutorials: a loop over heads, each with explicit attention weights and dropout."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        length, size = q.shape[-2:]
        heads = []
        for head in range(self.heads):
            weights = q[:, head] @ k[:, head].transpose(-2, -1) * size**-0.5
            if self.causal:
                mask = torch.tril(torch.ones(length, length)) == 0
                weights = weights.masked_fill(mask.to(weights.device), float("-inf"))
            heads.append(self.dropout(F.softmax(weights, dim=-1)) @ v[:, head])
        return torch.stack(heads, dim=1)


class PlainNanoVLM(nn.Module):
    """The model of section 2.2 with one image token; `forward` returns the mean cross-entropy."""

    def __init__(self, config: NanoVLMConfig, block: type[Block] = Block):
        super().__init__()
        vision, text = config.vision_config, config.text_config
        wide, narrow = vision.hidden_size, text.hidden_size
        self.conv1 = nn.Conv2d(3, wide, 16, stride=16)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1)
        self.conv_norm1, self.conv_norm2 = nn.LayerNorm(wide), nn.LayerNorm(wide)
        self.fc = nn.Linear(wide, wide)
        self.cls = nn.Parameter(torch.zeros(1, 1, wide))
        self.vision_positions = nn.Parameter(torch.randn(1, vision.num_patches + 1, wide) * 0.02)
        self.pre_norm, self.vision_norm = nn.LayerNorm(wide), nn.LayerNorm(wide)
        self.vision_blocks = nn.Sequential(
            *(block(wide, vision.num_attention_heads, causal=False) for _ in range(vision.num_hidden_layers))
        )
        self.projector = nn.Sequential(
            nn.Linear(wide, 4 * wide), nn.GELU(), nn.Linear(4 * wide, narrow), nn.Dropout(0.1)
        )
        self.tokens = nn.Embedding(text.vocab_size, narrow)
        self.text_positions = nn.Embedding(text.max_position_embeddings, narrow)
        self.text_blocks = nn.Sequential(
            *(block(narrow, text.num_attention_heads, causal=True) for _ in range(text.num_hidden_layers))
        )
        self.text_norm = nn.LayerNorm(narrow)
        self.dropout = nn.Dropout(0.1)

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.conv1(pixel_values).permute(0, 2, 3, 1)
        x = F.relu(self.conv_norm1(x)).permute(0, 3, 1, 2)
        x = F.relu(self.conv_norm2(self.conv2(x).permute(0, 2, 3, 1)))
        x = self.fc(x).flatten(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.vision_positions
        x = self.vision_norm(self.vision_blocks(self.pre_norm(self.dropout(x))))
        image_token = self.projector(x[:, :1])
        embeds = torch.cat([image_token, self.tokens(input_ids[:, 1:])], dim=1)
        embeds = self.dropout(embeds + self.text_positions.weight[: embeds.shape[1]])
        hidden = self.text_norm(self.text_blocks(embeds))
        logits = F.linear(hidden[:, :-1], self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
