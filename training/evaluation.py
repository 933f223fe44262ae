"""Validation: the loss with the right photo, with a wrong one, and the gap between them."""

from __future__ import annotations

import numpy as np
import torch
from objective import CompletionObjective
from pixels import normalise
from texts import TokenizedTexts

from nanovlm_hf import NanoVLMImageProcessor
from nanovlm_hf.evaluation.grounding import gap

BATCH_SIZE = 64


@torch.no_grad()
def evaluate(
    objective: CompletionObjective,
    photos: np.ndarray,
    texts: TokenizedTexts,
    image_processor: NanoVLMImageProcessor,
    device: torch.device,
) -> dict[str, float]:
    """Loss of the texts given their photos, and given the next photo instead (beyond the paper).

    Args:
        photos: uint8 (rows, height, width, 3), at least two.
        texts: of the same rows; their first source is judged.

    Returns:
        `eval_loss` and `eval_loss_wrong_photo` in nats per token, `grounding_gap` (their difference: 0 for a model
        that does not look), and `grounding_gap_stderr` over photos.
    """
    training = objective.training
    objective.eval()
    sums = np.zeros((len(photos), 3))  # loss with the right photo, with the wrong one, tokens
    features = []
    for start in range(0, len(photos), BATCH_SIZE):
        pixel_values = normalise(torch.from_numpy(photos[start : start + BATCH_SIZE].copy()), image_processor)
        features.append(objective.encode(pixel_values.to(device)).float())
    right = torch.cat(features)
    wrong = right.roll(1, dims=0)
    for start in range(0, len(photos), BATCH_SIZE):
        rows = list(range(start, min(start + BATCH_SIZE, len(photos))))
        batch = {name: value.to(device) for name, value in texts.pad(texts.names[0], rows).items()}
        photo_of_text = batch["photo_of_text"] + start
        text_of_label = batch["places"] // batch["input_ids"].shape[1]
        photo_of_label = photo_of_text[text_of_label].cpu().numpy()
        for column, source in enumerate((right, wrong)):
            losses = objective.token_losses(
                source[photo_of_text], batch["input_ids"], batch["targets"], batch["places"]
            )
            np.add.at(sums[:, column], photo_of_label, losses.cpu().numpy())
        np.add.at(sums[:, 2], photo_of_label, 1)
    objective.train(training)
    return gap(*sums.T)
