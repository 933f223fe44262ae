"""How likely a model finds texts about photos: the measure behind grounding, retrieval and foils."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..modeling_nanovlm import NanoVLMForConditionalGeneration
from ..processing_nanovlm import NanoVLMProcessor

BATCH_SIZE = 64


class Likelihood:
    """A NanoVLM as a measure of texts given photos. Each photo is encoded once, whatever is asked about it.

    Args:
        model: in evaluation mode.
        processor: its own.
    """

    def __init__(self, model: NanoVLMForConditionalGeneration, processor: NanoVLMProcessor):
        self.model, self.processor = model, processor
        self.longest = model.config.text_config.max_position_embeddings - processor.image_seq_length

    @torch.no_grad()
    def encode(self, images: Iterator[Image.Image] | list[Image.Image]) -> torch.Tensor:
        """Projected features of RGB photos, (photos, image tokens, C)."""
        features, batch = [], []
        for image in images:
            batch.append(image)
            if len(batch) == BATCH_SIZE:
                features.append(self._encode(batch))
                batch = []
        if batch:
            features.append(self._encode(batch))
        return torch.cat(features)

    def _encode(self, images: list[Image.Image]) -> torch.Tensor:
        pixel_values = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return self.model.get_image_features(pixel_values.to(self.model.device)).pooler_output

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text and <eos>, cut where the model's positions end."""
        tokenizer = self.processor.tokenizer
        return [[*ids, tokenizer.eos_token_id][: self.longest] for ids in tokenizer(texts)["input_ids"]]

    @torch.no_grad()
    def losses(
        self, features: torch.Tensor, texts: list[list[int]], photo_of_text: np.ndarray | None = None
    ) -> np.ndarray:
        """Summed cross-entropy of each text given a photo, in nats.

        Args:
            features: of `encode`.
            texts: of `tokenize`.
            photo_of_text: (texts,), the photo of each; text i and photo i belong together if not given.

        Returns:
            (texts,), float64.
        """
        photo_of_text = np.arange(len(texts)) if photo_of_text is None else photo_of_text
        # Texts of like length together: little padding.
        order = np.argsort([len(ids) for ids in texts], kind="stable")
        sums = np.zeros(len(texts))
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            own = features[torch.from_numpy(photo_of_text[rows]).to(features.device)]
            sums[rows] = self._losses(own, [texts[row] for row in rows]).double().cpu().numpy()
        return sums

    def _losses(self, features: torch.Tensor, texts: list[list[int]]) -> torch.Tensor:
        length = max(map(len, texts))
        # The picture stands first and pads stand last, so causal attention needs no mask; pads predict nothing.
        input_ids = torch.full((len(texts), length), self.processor.tokenizer.pad_token_id)
        for line, ids in enumerate(texts):
            input_ids[line, : len(ids)] = torch.tensor(ids)
        said = torch.arange(length) < torch.tensor([[len(ids)] for ids in texts])
        input_ids, said = input_ids.to(features.device), said.to(features.device)
        embeddings = self.model.get_input_embeddings()(input_ids[:, :-1])
        inputs_embeds = torch.cat([features.to(embeddings.dtype), embeddings], dim=1)
        hidden = self.model.model(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
        # The LM head is most of the work: it runs where there is a word to predict, and nowhere else.
        logits = self.model.lm_head(hidden[:, features.shape[1] - 1 :][said]).float()
        losses = torch.zeros(said.shape, device=features.device)
        losses[said] = nn.functional.cross_entropy(logits, input_ids[said], reduction="none")
        return losses.sum(1)
