"""Prepare images that are arrays or tensors, on the tensor's device, within a grey level of Pillow's result.

Resizing a tensor is what torchvision's `resize` does, which is a function of PyTorch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, to_numpy_array
from transformers.utils import is_torch_tensor, logging

from .pillow_nanovlm import central_square

logger = logging.get_logger(__name__)

FILTERS = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers: those that PyTorch resizes with
_TYPES = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
}
_TYPES |= {torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64}
_LARGEST = 3.4e38  # of a float32
REDUCING_GAP = 3.0  # an image is first reduced to no less than three times the size, as in Pillow's `resize`


def to_tensor(image: Any, input_data_format: Any, settings: dict[str, Any]) -> torch.Tensor:
    """Return an array or tensor as a tensor (channels, height, width) of uint8 or float32 on its device.

    Args:
        input_data_format: channel dimension of the input; inferred if None.
        settings: of the image processor.

    Raises:
        ValueError: if it is not an image, has no pixels in memory, has values that are not finite, or integers that are
            neither 8-bit values nor rescaled to 0..1.
    """
    if is_torch_tensor(image) and (image.layout != torch.strided or image.is_meta or image.dtype not in _TYPES):
        raise ValueError(
            f"images must be dense tensors of ordinary numbers, not {image.dtype} with {image.layout} on {image.device}"
        )
    array = image.detach() if is_torch_tensor(image) else to_numpy_array(image)
    if array.ndim not in (2, 3):
        raise ValueError(f"images must have 2 or 3 dimensions, not {array.ndim}")
    channels_last = array.ndim > 2 and _channels_last(array, input_data_format)
    array = _values(array, settings)
    pixels = array if is_torch_tensor(array) else torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if pixels.ndim == 2:
        return pixels[None]
    return pixels.permute(2, 0, 1) if channels_last else pixels


def prepare_tensor(pixels: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """Return an image (channels, height, width) converted, cropped and resized, 8-bit or float as it was."""
    is_float = pixels.is_floating_point()
    white = 255.0 if not is_float else 1 / settings["rescale_factor"] if settings["do_rescale"] else 1.0
    if settings["do_convert_rgb"]:
        pixels = _to_rgb(pixels, white)
    if settings["do_center_crop"]:
        left, top, side = central_square(pixels.shape[2], pixels.shape[1])
        pixels = pixels[:, top : top + side, left : left + side]
    size = (settings["size"]["height"], settings["size"]["width"])
    if not settings["do_resize"] or pixels.shape[1:] == size:
        return pixels
    # The filter overshoots at edges. As Pillow does for 8-bit images, values are clipped after each of two passes.
    limits = (0.0, next((most for most in (white, 255.0) if pixels.max() <= most), float("inf")))
    if not pixels.min() >= 0:
        limits = (-float("inf"), float("inf"))
    if settings["resample"] in FILTERS:
        return _resize(pixels, size, FILTERS[settings["resample"]], limits)
    return _resize_with_pillow(pixels, size, settings["resample"], limits)


def _channels_last(array: Any, input_data_format: Any) -> bool:
    if input_data_format is None:
        grey_or_rgb = any(channels in (1, 3) for channels in (array.shape[0], array.shape[-1]))
        input_data_format = infer_channel_dimension_format(array, num_channels=None if grey_or_rgb else 4)
    return ChannelDimension(input_data_format) == ChannelDimension.LAST


def _values(array: Any, settings: dict[str, Any]) -> Any:
    """Return an array or tensor with values of uint8 or float32."""
    as_tensor = is_torch_tensor(array)
    uint8, float32 = (torch.uint8, torch.float32) if as_tensor else (np.uint8, np.float32)
    convert = array.to if as_tensor else array.astype
    is_float = array.is_floating_point() if as_tensor else array.dtype.kind == "f"
    is_number = not array.is_complex() if as_tensor else array.dtype.kind in "buif"
    if not is_number or 0 in array.shape:
        raise ValueError(f"images must have pixels that are numbers, not {array.dtype} of shape {tuple(array.shape)}")
    if array.dtype == uint8:
        return array
    if as_tensor and not is_float:
        array = array.long()  # PyTorch has no minimum of unsigned integers with more than 8 bits
        convert = array.to
    least, most = array.min(), array.max()
    if not (float(least) >= -_LARGEST and float(most) <= _LARGEST):  # NaN is neither
        raise ValueError("images must have pixels that are finite numbers of 32 bits: replace NaN and infinity first")
    if settings["do_rescale"] and least >= 0 and most <= 1:
        logger.warning_once(
            "Values from 0 to 1 are multiplied by rescale_factor again: give do_rescale=False for images that are "
            "rescaled already."
        )
    if is_float:
        return convert(float32)
    if least >= 0 and most <= 255:
        return convert(uint8)
    if least < 0 or not settings["do_rescale"] or int(most) * settings["rescale_factor"] > 1 + 1e-6:
        raise ValueError(
            f"images of integers must have values from 0 to 255, or rescale_factor must take them to 0..1 (1/65535); "
            f"these have {int(least)} to {int(most)}"
        )
    return convert(float32)


def _to_rgb(pixels: torch.Tensor, white: float) -> torch.Tensor:
    """Return an image in RGB, composited on white."""
    if len(pixels) == 1:
        return pixels.expand(3, -1, -1)
    if len(pixels) != 4:
        return pixels
    alpha = (pixels[3:].float() / white).clamp(0, 1)
    colours = pixels[:3] * alpha + white * (1 - alpha)
    return colours if pixels.is_floating_point() else colours.round().to(pixels.dtype)


def _resize(pixels: torch.Tensor, size: tuple[int, int], mode: str, limits: tuple[float, float]) -> torch.Tensor:
    """Resize with antialiasing, one axis after the other; 8-bit values are rounded after each."""
    is_float, dtype, device = pixels.is_floating_point(), pixels.dtype, pixels.device
    pixels = pixels[None].float()
    if device.type == "mps":  # not every version of PyTorch resizes with antialiasing there
        pixels = pixels.cpu()
    was = pixels.shape[2:]
    factors = [max(int(old / new / REDUCING_GAP), 1) for old, new in zip(was, size, strict=True)]
    if max(factors) > 1:
        pixels = nn.functional.avg_pool2d(pixels, factors, ceil_mode=True, count_include_pad=False)
        pixels = pixels if is_float else (pixels + 0.5).floor()
    # Scales rather than sizes: the last pixel of a reduced image may stand for fewer than the others do. PyTorch rounds
    # the resulting size down, so that a scale must not be too small by the last bit.
    down, across = ((1 + 1e-9) * new * factor / old for old, new, factor in zip(was, size, factors, strict=True))
    for scale in ((1.0, across), (down, 1.0)):
        pixels = nn.functional.interpolate(pixels, scale_factor=scale, mode=mode, antialias=True).clamp(*limits)
        pixels = pixels if is_float else pixels.round()
    return pixels[0].to(device, dtype)


def _resize_with_pillow(
    pixels: torch.Tensor, size: tuple[int, int], resample: int, limits: tuple[float, float]
) -> torch.Tensor:
    """Resize the channels, one axis after the other, as images of floats."""
    channels = [Image.fromarray(one.float().cpu().numpy()) for one in pixels]
    for width, height in ((size[1], pixels.shape[1]), (size[1], size[0])):
        resized = [np.asarray(one.resize((width, height), resample, reducing_gap=REDUCING_GAP)) for one in channels]
        channels = [Image.fromarray(one.clip(*limits)) for one in resized]
    return torch.from_numpy(np.stack([np.asarray(one) for one in channels])).to(pixels.device)


__all__ = ["FILTERS", "prepare_tensor", "to_tensor"]
