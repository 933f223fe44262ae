"""The training objective: cross-entropy of the texts, and beyond the paper two losses of the vision encoder."""

from __future__ import annotations

import torch
from torch import nn

from ..evaluation.likelihood import token_losses
from ..modeling_nanovlm import NanoVLMForConditionalGeneration
from .distillation import DistillationHead


class CompletionObjective(nn.Module):
    """A model with its losses. An image is encoded once, however many texts describe it.

    Args:
        model: the model to train.
        teacher_features: F, the number of features to predict, with distillation.
    """

    def __init__(self, model: NanoVLMForConditionalGeneration, teacher_features: int | None = None):
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        self.distillation = None if teacher_features is None else DistillationHead(width, teacher_features)

    def forward(
        self,
        pixel_values: torch.Tensor | None,
        texts: list[dict[str, torch.Tensor]],
        word_targets: torch.Tensor | None = None,
        teacher_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the losses of a batch, in nats.

        Args:
            pixel_values: (images, 3, height, width), or None if no text has an image.
            texts: a padded batch for each source, so that short texts are not padded to the length of long ones:
                `input_ids` (texts, image tokens + T), padded on the right; `targets` (labels,), the ids to predict;
                `positions` (labels,), where in the flattened `input_ids` each is predicted; `image_of_text` (texts,),
                the index of each text's image in `pixel_values`, -1 without one.
            word_targets: (images, vocabulary), target distribution of the bag-of-words loss, which is 0 without them;
                rows of 0 are ignored.
            teacher_features: (images, F), with distillation.

        Returns:
            The sum of the cross-entropy over all labels, and the sums of the bag-of-words loss and of the distillation
            loss over all images.
        """
        without_image = self.features_without_image()
        words_loss = distillation_loss = torch.zeros((), device=without_image.device)
        known = without_image
        if pixel_values is not None:
            outputs = self.model.get_image_features(pixel_values)
            features = outputs.pooler_output
            if word_targets is not None:
                words_loss = self.bag_of_words_losses(features, word_targets).sum()
            if self.distillation is not None:
                # With every strategy the state of [CLS] comes first.
                distillation_loss = self.distillation(outputs.last_hidden_state[:, 0], teacher_features).sum()
            known = torch.cat([features, without_image.to(features.dtype)])
        image_tokens = known.shape[1]
        # A micro-batch without images may have no text, as files may have fewer texts than a step has micro-batches.
        nothing = pixel_values is None and not texts
        text_loss = 0.0 * without_image.sum() if nothing else torch.zeros((), device=known.device)
        for text in texts:
            own = known[text["image_of_text"]]  # -1 is the last: without an image
            text_ids = text["input_ids"][:, image_tokens:]
            text_loss = text_loss + token_losses(self.model, own, text_ids, text["targets"], text["positions"]).sum()
        return text_loss, words_loss, distillation_loss

    def features_without_image(self) -> torch.Tensor:
        """Return the features that stand in for a missing image: the embedding of `<image>`, (1, I, C)."""
        config = self.model.config
        embedding = self.model.get_input_embeddings().weight[config.image_token_id]
        return embedding.expand(1, config.image_seq_length, -1)

    def bag_of_words_losses(self, features: torch.Tensor, word_targets: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy between the captions' words and those that the image token predicts, (images,).

        The image token predicts them through the token embedding, without parameters of its own. Without this loss the
        decoder learns to write before the image features are informative, and then ignores them.
        """
        image_token = nn.functional.layer_norm(features.float().mean(1), features.shape[-1:])
        logits = image_token @ self.model.get_input_embeddings().weight.float().T
        return -(word_targets * nn.functional.log_softmax(logits, dim=-1)).sum(-1)
