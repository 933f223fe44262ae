"""Augmentation: from decoded images to `pixel_values`.

An image is cropped as bytes, where it is stored, which only copies it. Resizing and normalising a whole batch
at once, on the device, takes 2% of a training step of mini on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..image_processing_nanovlm import NanoVLMImageProcessor

MIN_AREA = 0.6  # share of an image that a crop keeps
MAX_LOG_ASPECT = 0.2  # logarithm of the aspect ratio of a crop
LIGHT, CONTRAST, TINT = 0.15, 0.15, 0.05  # largest relative change of colours


@dataclass(frozen=True)
class AugmentationParameters:
    """How the images of a batch are augmented: one crop size for the batch, everything else for each image.

    Attributes:
        size: (height, width) of the crops.
        corners: (images, 2), row and column of the upper left corner of each crop.
        mirrored: (images,), whether left and right are swapped.
        gain, bias: (images, 3), float32, applied to each colour channel in the range 0 to 1.
    """

    size: tuple[int, int]
    corners: np.ndarray
    mirrored: np.ndarray
    gain: np.ndarray
    bias: np.ndarray

    @classmethod
    def identity(cls, images: int, height: int, width: int) -> AugmentationParameters:
        """Return the parameters that leave images unchanged."""
        return cls(
            (height, width),
            np.zeros((images, 2), dtype=np.int64),
            np.zeros(images, dtype=bool),
            np.ones((images, 3), dtype=np.float32),
            np.zeros((images, 3), dtype=np.float32),
        )

    @classmethod
    def sample(
        cls, batch_rng: np.random.Generator, rngs: list[np.random.Generator], mentions_side: np.ndarray, size: int
    ) -> AugmentationParameters:
        """Sample a crop of 60% to 100% of the area, a change of light, and mirroring in half of the cases.

        Args:
            batch_rng: samples the size of the crops.
            rngs: sample everything else, one generator for each image.
            mentions_side: (images,), whether a text says left or right; such images are not mirrored.
            size: height and width of the images.
        """
        area = batch_rng.uniform(MIN_AREA, 1.0)
        aspect = np.exp(batch_rng.uniform(-MAX_LOG_ASPECT, MAX_LOG_ASPECT))
        height, width = (min(size, round(size * (area * factor) ** 0.5)) for factor in (1 / aspect, aspect))
        samples = np.array([rng.random(7) for rng in rngs])
        corners = np.floor(samples[:, :2] * (size - height + 1, size - width + 1)).astype(np.int64)
        light, contrast, tint = (2 * part - 1 for part in (samples[:, 3:4], samples[:, 4:5], samples[:, 5:7]))
        # Red and blue change relative to green: warmer or colder light.
        tints = np.concatenate([tint[:, :1], np.zeros_like(light), tint[:, 1:]], axis=1)
        gain = (1 + LIGHT * light) * (1 + CONTRAST * contrast) * (1 + TINT * tints)
        return cls(
            (height, width),
            corners,
            (samples[:, 2] < 0.5) & ~mentions_side,
            gain.astype(np.float32),
            np.broadcast_to(0.5 * (1 - (1 + CONTRAST * contrast)), gain.shape).astype(np.float32),
        )


def crop(images: np.ndarray | torch.Tensor, indices: list[int], parameters: AugmentationParameters) -> torch.Tensor:
    """Return crops of some images, uint8 (len(indices), 3, height, width), on the device of the images."""
    height, width = parameters.size
    device = images.device if isinstance(images, torch.Tensor) else "cpu"
    crops = torch.empty((len(indices), height, width, 3), dtype=torch.uint8, device=device)
    for position, (index, (top, left), mirrored) in enumerate(
        zip(indices, parameters.corners, parameters.mirrored, strict=True)
    ):
        part = images[index, top : top + height, left : left + width]
        part = part if isinstance(part, torch.Tensor) else torch.from_numpy(np.array(part))
        crops[position] = part.flip(1) if mirrored else part
    return crops.permute(0, 3, 1, 2)


def to_pixel_values(
    crops: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, image_processor: NanoVLMImageProcessor
) -> torch.Tensor:
    """Return `pixel_values` (images, 3, 224, 224) of uint8 crops, as the image processor makes them of images.

    Args:
        crops: uint8 (images, 3, height, width), on the CPU or on the device of `gain`.
        gain, bias: (images, 3), applied to colours in the range 0 to 1.
    """
    size = (image_processor.size["height"], image_processor.size["width"])
    if crops.shape[-2:] != size:
        # On the CPU, PyTorch resizes bytes fast if the channels are last; other devices cannot resize bytes.
        crops = crops if crops.device.type == "cpu" else crops.float()
        crops = nn.functional.interpolate(crops, size, mode="bilinear", antialias=True)
    crops = crops.to(gain.device)
    mean, std = (
        torch.tensor(value, device=gain.device) for value in (image_processor.image_mean, image_processor.image_std)
    )
    scale = image_processor.rescale_factor * gain / std
    shift = (bias - mean) / std
    # `contiguous` comes first: on bytes it costs a quarter of what it does on floats.
    return crops.contiguous().float().mul_(scale[:, :, None, None]).add_(shift[:, :, None, None])


def normalise(images: torch.Tensor, image_processor: NanoVLMImageProcessor) -> torch.Tensor:
    """Return `pixel_values` (images, 3, height, width) of uint8 (images, height, width, 3), without augmentation."""
    ones = torch.ones(len(images), 3, device=images.device)
    return to_pixel_values(images.permute(0, 3, 1, 2), ones, torch.zeros_like(ones), image_processor)
