"""What is minimised: cross-entropy of the texts, and beyond the paper the naming of visual words."""

from __future__ import annotations

import torch
from torch import nn

from nanovlm_hf import NanoVLMForConditionalGeneration


class CompletionObjective(nn.Module):
    """A model and its losses. A photo is encoded once, however many texts describe it."""

    def __init__(self, model: NanoVLMForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self, pixel_values: torch.Tensor, texts: list[dict[str, torch.Tensor]], word_targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of a batch, in nats.

        Args:
            pixel_values: (photos, 3, height, width).
            texts: for each source a padded batch of its own, so that short texts are not padded to long ones:
                `input_ids` (texts, T), padded on the right; `targets` (labels,), ids to predict; `places` (labels,),
                where in texts x T each is predicted; `photo_of_text` (texts,), the place of each text's photo in
                `pixel_values`.
            word_targets: (photos, vocabulary), shares of the words to name; rows of 0 count nothing.

        Returns:
            The sum of the cross-entropy over all labels, and the sum of the visual words' over all photos.
        """
        features = self.encode(pixel_values)
        text_loss = torch.zeros((), device=features.device)
        for text in texts:
            own = features.index_select(0, text["photo_of_text"])
            losses = self.token_losses(own, text["input_ids"], text["targets"], text["places"])
            text_loss = text_loss + losses.sum()
        return text_loss, self.visual_word_losses(features, word_targets).sum()

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projected features (photos, image tokens, C)."""
        return self.model.get_image_features(pixel_values).pooler_output

    def token_losses(
        self, features: torch.Tensor, input_ids: torch.Tensor, targets: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy of every label, (labels,).

        As the model's own loss, with the same numbers, but without asking the device for anything: the picture stands
        first and pads stand last, so neither has to be looked for, and causal attention needs no mask.
        """
        embeddings = self.model.get_input_embeddings()(input_ids[:, features.shape[1] :])
        inputs_embeds = torch.cat([features.to(embeddings.dtype), embeddings], dim=1)
        outputs = self.model.model(inputs_embeds=inputs_embeds, use_cache=False)
        # The LM head is a large part of a small decoder: it runs only where there is a label.
        hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, places)
        return nn.functional.cross_entropy(self.model.lm_head(hidden).float(), targets, reduction="none")

    def visual_word_losses(self, features: torch.Tensor, word_targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy between the words that the visual token names through the token embedding and the captions'.

        Without it the decoder learns to talk before the picture says anything, and never looks. (photos,)
        """
        visual_token = nn.functional.layer_norm(features.float().mean(1), features.shape[-1:])
        logits = visual_token @ self.model.get_input_embeddings().weight.float().T
        return -(word_targets * nn.functional.log_softmax(logits, dim=-1)).sum(-1)
