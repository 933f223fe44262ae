"""Cross-entropy of texts given images: one function for training, validation, grounding, retrieval and foils."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..modeling_nanovlm import NanoVLMForConditionalGeneration
from ..processing_nanovlm import NanoVLMProcessor

BATCH_SIZE = 64


def token_losses(
    model: NanoVLMForConditionalGeneration,
    features: torch.Tensor,
    text_ids: torch.Tensor,
    targets: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Return the cross-entropy of every label, in nats, (labels,).

    It equals the model's own loss, but needs no synchronization with the device: image tokens come first and padding
    last, so neither has to be searched for, and causal attention needs no mask.

    Args:
        features: (texts, image tokens, C), projected image features of each text.
        text_ids: (texts, T), the tokens after the image tokens, padded on the right.
        targets: (labels,), the ids to predict.
        positions: (labels,), where in texts x (image tokens + T), flattened, each of them is predicted.
    """
    embeddings = model.get_input_embeddings()(text_ids)
    inputs_embeds = torch.cat([features.to(embeddings.dtype), embeddings], dim=1)
    outputs = model.model(inputs_embeds=inputs_embeds, use_cache=False)
    # The LM head is a large part of a small decoder: it runs only where there is a label.
    hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, positions)
    return nn.functional.cross_entropy(model.lm_head(hidden).float(), targets, reduction="none")


class Likelihood:
    """Measure how likely a model finds texts given images. Each image is encoded once, however often it is used.

    Args:
        model: in evaluation mode.
        processor: of the model.
    """

    def __init__(self, model: NanoVLMForConditionalGeneration, processor: NanoVLMProcessor):
        self.model, self.processor = model, processor
        self.longest = model.config.text_config.max_position_embeddings - processor.image_seq_length

    def encode(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """Return the projected features of RGB images, (images, image tokens, C)."""
        image_processor, images = self.processor.image_processor, iter(images)
        batches = iter(lambda: list(itertools.islice(images, BATCH_SIZE)), [])
        return self.encode_pixels(image_processor(batch, return_tensors="pt")["pixel_values"] for batch in batches)

    @torch.no_grad()
    def encode_pixels(self, batches: Iterable[torch.Tensor]) -> torch.Tensor:
        """Return the projected features of batches of `pixel_values`, (images, image tokens, C)."""
        device = self.model.device
        return torch.cat([self.model.get_image_features(batch.to(device)).pooler_output for batch in batches])

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text and <eos>, truncated to the model's positions."""
        tokenizer = self.processor.tokenizer
        return [[*ids, tokenizer.eos_token_id][: self.longest] for ids in tokenizer(texts)["input_ids"]]

    @torch.no_grad()
    def losses(
        self, features: torch.Tensor, texts: list[list[int]], image_of_text: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the summed cross-entropy of each text given an image, in nats.

        Args:
            features: from `encode`.
            texts: from `tokenize`.
            image_of_text: (texts,), index of the image of each text; defaults to image i for text i.

        Returns:
            (texts,), float64.
        """
        image_of_text = np.arange(len(texts)) if image_of_text is None else image_of_text
        # Texts of similar length share a batch, which keeps padding short.
        order = np.argsort([len(ids) for ids in texts], kind="stable")
        sums = np.zeros(len(texts))
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            own = features[torch.from_numpy(image_of_text[rows]).to(features.device)]
            sums[rows] = self._losses(own, [texts[row] for row in rows]).cpu().double().numpy()
        return sums

    def _losses(self, features: torch.Tensor, texts: list[list[int]]) -> torch.Tensor:
        lengths = torch.tensor([len(ids) for ids in texts])
        width = int(lengths.max())
        input_ids = torch.full((len(texts), width), self.processor.tokenizer.pad_token_id)
        for row, ids in enumerate(texts):
            input_ids[row, : len(ids)] = torch.as_tensor(ids)
        is_label = torch.arange(width) < lengths[:, None]
        row, column = is_label.nonzero(as_tuple=True)
        image_tokens, device = features.shape[1], features.device
        # The last image token predicts the first word, and the last word of the longest text predicts nothing.
        positions = row * (image_tokens + width - 1) + image_tokens - 1 + column
        batch = (input_ids[:, :-1], input_ids[is_label], positions)
        losses = torch.zeros(is_label.shape, device=device)
        losses[row.to(device), column.to(device)] = token_losses(
            self.model, features, *(value.to(device) for value in batch)
        )
        return losses.sum(1)
