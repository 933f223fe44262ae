"""From stored photos to `pixel_values`: cut out beside the store, all else on the device.

A photo is cut while it is still bytes, which is a copy; resizing and normalising the whole batch at once costs two
hundredths of a training step of mini on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from nanovlm_hf import NanoVLMImageProcessor

LEAST_AREA = 0.6  # of a photo that a crop keeps
STRETCH = 0.2  # a crop is narrower or wider by up to exp of this
LIGHT, CONTRAST, TINT = 0.15, 0.15, 0.05  # how far colours go, as shares


@dataclass(frozen=True)
class Look:
    """How the photos of a batch are seen: one size of crop for all, the rest for each.

    Attributes:
        size: (height, width) of the crops.
        corners: (photos, 2), row and column of their upper left corners.
        mirrored: (photos,), whether left and right change places.
        gain, bias: (photos, 3), float32: what each colour of 0 to 1 is multiplied with, and what is added.
    """

    size: tuple[int, int]
    corners: np.ndarray
    mirrored: np.ndarray
    gain: np.ndarray
    bias: np.ndarray


def plain_look(photos: int, height: int, width: int) -> Look:
    """As they are."""
    return Look(
        (height, width),
        np.zeros((photos, 2), dtype=np.int64),
        np.zeros(photos, dtype=bool),
        np.ones((photos, 3), dtype=np.float32),
        np.zeros((photos, 3), dtype=np.float32),
    )


def random_look(shared: np.random.Generator, own: list[np.random.Generator], has_side: np.ndarray, size: int) -> Look:
    """A random crop of 60% to 100%, mirrored half of the time where no text names a side, in other light.

    Args:
        shared: draws the crops' size.
        own: draws the rest, one for each photo.
        has_side: (photos,), whose texts say left or right.
        size: height and width of the photos.
    """
    area, ratio = shared.uniform(LEAST_AREA, 1.0), np.exp(shared.uniform(-STRETCH, STRETCH))
    high, wide = (min(size, round(size * (area * factor) ** 0.5)) for factor in (1 / ratio, ratio))
    drawn = np.array([rng.random(7) for rng in own])
    corners = np.floor(drawn[:, :2] * (size - high + 1, size - wide + 1)).astype(np.int64)
    light, contrast, tint = (2 * part - 1 for part in (drawn[:, 3:4], drawn[:, 4:5], drawn[:, 5:7]))
    # Red and blue against green: warmer or colder light.
    tints = np.concatenate([tint[:, :1], np.zeros_like(light), tint[:, 1:]], axis=1)
    gain = (1 + LIGHT * light) * (1 + CONTRAST * contrast) * (1 + TINT * tints)
    return Look(
        (high, wide),
        corners,
        (drawn[:, 2] < 0.5) & ~has_side,
        gain.astype(np.float32),
        np.broadcast_to(0.5 * (1 - (1 + CONTRAST * contrast)), gain.shape).astype(np.float32),
    )


def cut(photos: np.ndarray | torch.Tensor, rows: list[int], look: Look) -> torch.Tensor:
    """The crops of these rows of the store, uint8 (photos, 3, height, width), where the store is."""
    high, wide = look.size
    device = photos.device if isinstance(photos, torch.Tensor) else "cpu"
    crops = torch.empty((len(rows), high, wide, 3), dtype=torch.uint8, device=device)
    for place, (row, (top, left), mirrored) in enumerate(zip(rows, look.corners, look.mirrored, strict=True)):
        crop = photos[row, top : top + high, left : left + wide]
        crop = crop if isinstance(crop, torch.Tensor) else torch.from_numpy(np.array(crop))
        crops[place] = crop.flip(1) if mirrored else crop
    return crops.permute(0, 3, 1, 2)


def to_pixel_values(
    crops: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, image_processor: NanoVLMImageProcessor
) -> torch.Tensor:
    """`pixel_values` (photos, 3, 224, 224) of uint8 crops, as the image processor makes them of photos.

    Args:
        crops: uint8 (photos, 3, height, width).
        gain, bias: (photos, 3), of colours of 0 to 1.
    """
    size = (image_processor.size["height"], image_processor.size["width"])
    if crops.shape[-2:] != size:
        # PyTorch is fast at bytes whose channels stand last, on the CPU; other devices resize no bytes.
        crops = crops if crops.device.type == "cpu" else crops.float()
        crops = nn.functional.interpolate(crops, size, mode="bilinear", antialias=True)
    mean, std = (
        torch.tensor(value, device=crops.device) for value in (image_processor.image_mean, image_processor.image_std)
    )
    scale = image_processor.rescale_factor * gain / std
    shift = (bias - mean) / std
    # Contiguous first: on bytes that costs a quarter of what it does on floats.
    return crops.contiguous().float().mul_(scale[:, :, None, None]).add_(shift[:, :, None, None])


def normalise(photos: torch.Tensor, image_processor: NanoVLMImageProcessor) -> torch.Tensor:
    """uint8 (photos, height, width, 3) to `pixel_values` (photos, 3, height, width), as they are."""
    ones = torch.ones(len(photos), 3, device=photos.device)
    return to_pixel_values(photos.permute(0, 3, 1, 2), ones, torch.zeros_like(ones), image_processor)
