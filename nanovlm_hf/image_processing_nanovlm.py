"""Prepare images as `pixel_values` with Pillow, or tensors with PyTorch (section 2.2.1: 224 x 224 pixels)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, get_size_dict
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    is_valid_image,
)
from transformers.utils import TensorType, is_torch_tensor

from .pillow_nanovlm import central_square, scale_and_shift, to_rgb
from .tensor_images_nanovlm import FILTERS, prepare_tensor, to_tensor

SETTINGS = (
    "do_convert_rgb",
    "do_center_crop",
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
# Arguments of other image processors that this one does not support, and the alternative.
NOT_SUPPORTED = {
    "crop_size": "do_center_crop crops the largest central square, which is resized to size",
    "do_pad": "images are resized to size",
    "pad_size": "images are resized to size",
}
LARGEST_SIDE = 4096


class NanoVLMImageProcessor(BaseImageProcessor):
    """Prepare Pillow images, arrays and tensors as normalised pixels.

    EXIF rotation is applied; transparent images are composited on white; grey, palette, CMYK and 16-bit images are
    converted to RGB. Images are resized to `size` without keeping their aspect ratio, as in the paper; with
    `do_center_crop` the central square is cropped first. Every argument can be overridden in a call.

    Tensors and arrays of floats are resized by PyTorch, tensors on their device, if `resample` is bilinear or bicubic:
    within one of 255 grey levels of Pillow's result. Everything else is resized by Pillow.

    As in other image processors, values of arrays and tensors are multiplied by `rescale_factor` with `do_rescale`: the
    default 1/255 is for values in 0..255, and floats in 0..1 need `do_rescale=False`. Floats are resized as floats.
    Integers of any type are 8-bit values; larger ones need a `rescale_factor` that maps them to 0..1 (1/65535).

    Args:
        do_convert_rgb: apply the EXIF rotation and convert to RGB.
        do_center_crop: crop the largest central square before resizing.
        do_resize: resize to `size`.
        size: `{"height": pixels, "width": pixels}`, up to 4096 each.
        resample: Pillow's resampling filter.
        do_rescale: multiply by `rescale_factor`.
        rescale_factor: 1/255 maps 8-bit values to 0..1.
        do_normalize: subtract `image_mean` and divide by `image_std`.
        image_mean: one number for each channel (ImageNet's by default), or one for all.
        image_std: one number for each channel (ImageNet's by default), or one for all.

    Raises:
        ValueError: naming the first invalid setting.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        do_convert_rgb: bool = True,
        do_center_crop: bool = False,
        do_resize: bool = True,
        size: dict[str, int] | None = None,
        resample: int = PILImageResampling.BICUBIC,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ):
        _refuse_unsupported(kwargs)
        super().__init__(**kwargs)
        settings = {
            "do_convert_rgb": do_convert_rgb,
            "do_center_crop": do_center_crop,
            "do_resize": do_resize,
            "size": {"height": 224, "width": 224} if size is None else size,
            "resample": resample,
            "do_rescale": do_rescale,
            "rescale_factor": rescale_factor,
            "do_normalize": do_normalize,
            "image_mean": list(IMAGENET_DEFAULT_MEAN) if image_mean is None else image_mean,
            "image_std": list(IMAGENET_DEFAULT_STD) if image_std is None else image_std,
        }
        for name, value in _checked(settings).items():
            setattr(self, name, value)

    def preprocess(
        self,
        images: ImageInput,
        return_tensors: str | TensorType | None = None,
        data_format: str | ChannelDimension = ChannelDimension.FIRST,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare one image or several.

        Args:
            images: one or a list of Pillow images, arrays or tensors; arrays and tensors are (height, width), of three
                dimensions, or batches of four.
            return_tensors: `"pt"` or `"np"`; None returns a list of arrays.
            data_format: channel dimension of the result.
            input_data_format: channel dimension of array inputs; inferred if None.
            kwargs: arguments of the class to override; `device` of the returned tensors, by default that of the first
                image.

        Returns:
            `pixel_values`, (images, 3, height, width) in float32.

        Raises:
            ValueError: for an input that is not an image, values that do not fit the settings, and unknown, unsupported
                or invalid arguments.
        """
        device = kwargs.pop("device", None)
        if device is not None and str(device) != "cpu" and return_tensors != "pt":
            raise ValueError("device needs return_tensors='pt'")
        settings = self._settings(kwargs)
        images = [image for one in images_of_texts(images) for image in one]
        if not images:
            raise ValueError("images has no image: give at least one")
        images = self.fetch_images(images)
        pixels = [self._prepare(image, input_data_format, settings) for image in images]
        if ChannelDimension(data_format) == ChannelDimension.LAST:
            pixels = [one.permute(1, 2, 0) for one in pixels]
        if return_tensors != "pt" or len({one.shape for one in pixels}) != 1:
            arrays = [one.cpu().numpy() for one in pixels]
            return BatchFeature(data={"pixel_values": arrays}, tensor_type=return_tensors)
        device = pixels[0].device if device is None else device
        return BatchFeature(data={"pixel_values": torch.stack([one.to(device) for one in pixels])})

    def _settings(self, overrides: dict[str, Any]) -> dict[str, Any]:
        _refuse_unsupported(overrides)
        unknown = overrides.keys() - set(SETTINGS) - NOT_SUPPORTED.keys() - {"disable_grouping"}  # has no effect here
        if unknown:
            raise ValueError(f"NanoVLMImageProcessor does not know {', '.join(sorted(unknown))}")
        settings = {name: getattr(self, name) for name in SETTINGS}
        settings.update({name: value for name, value in overrides.items() if name in SETTINGS and value is not None})
        return _checked(settings)

    def _prepare(self, image: Any, input_data_format: Any, settings: dict[str, Any]) -> torch.Tensor:
        """Return one image as a tensor (channels, height, width)."""
        if isinstance(image, Image.Image):
            return _rescale_and_normalise(_from_pil(image, settings), settings)
        pixels = to_tensor(image, input_data_format, settings)
        by_pillow = not is_torch_tensor(image) or settings["resample"] not in FILTERS
        if by_pillow and pixels.dtype == torch.uint8:
            array = pixels.permute(1, 2, 0).cpu().numpy()
            resized = _from_pil(Image.fromarray(array[:, :, 0] if len(pixels) == 1 else array), settings)
            pixels = resized.to(pixels.device)
        else:
            pixels = prepare_tensor(pixels, settings)
        return _rescale_and_normalise(pixels, settings)


def images_of_texts(images: Any) -> list[list[Any]]:
    """Return a list of images for each text: one image where there is no list of lists.

    Args:
        images: an image, a batch as an array or tensor of four dimensions, or a sequence of images or of sequences of
            them. A string is the path or address of an image.

    Raises:
        ValueError: for anything else, and for no images at all.
    """
    if _is_image(images):
        images = [images]
    if not _is_list(images):
        raise ValueError(f"images must be {_IMAGES}, not {_name(images)}")
    if all(_dimensions(one) == 4 for one in images):
        images = [image for batch in images for image in batch]
    if not len(images):
        raise ValueError("images is empty: give at least one image, or None for text only")
    texts = [list(one) if _is_list(one) else [one] for one in images]
    for image in (image for one in texts for image in one):
        if not _is_image(image) or _dimensions(image) not in (None, 2, 3):
            raise ValueError(f"images must be {_IMAGES}; this list has {_name(image)}")
    return texts


_IMAGES = "Pillow images, NumPy arrays or tensors of 2 or 3 dimensions, or a list of them"


def _is_image(value: Any) -> bool:
    return isinstance(value, str) or is_valid_image(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, range))


def _dimensions(value: Any) -> int | None:
    """Return the number of dimensions of an array or tensor, None for anything else."""
    return len(value.shape) if _is_image(value) and hasattr(value, "shape") else None


def _name(value: Any) -> str:
    dimensions = _dimensions(value)
    return type(value).__name__ + ("" if dimensions is None else f" of {dimensions} dimensions")


def _refuse_unsupported(arguments: dict[str, Any]) -> None:
    for name, instead in NOT_SUPPORTED.items():
        if arguments.get(name):
            raise ValueError(f"{name} is not supported: {instead}")


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in normal form.

    Raises:
        ValueError: naming the first invalid setting.
    """
    checked = dict(settings)
    for name in ("do_convert_rgb", "do_center_crop", "do_resize", "do_rescale", "do_normalize"):
        if not isinstance(settings[name], (bool, np.bool_)):
            raise ValueError(f"{name} must be true or false, not {settings[name]!r}")
    try:
        size = dict(get_size_dict(settings["size"]))
    except Exception:  # Transformers raises several types for an invalid size
        size = {}
    if size.keys() != {"height", "width"} or not all(_is_side(side) for side in size.values()):
        raise ValueError(
            f"size must have an integer height and width from 1 to {LARGEST_SIDE}, not {settings['size']!r}"
        )
    checked["size"] = {name: int(size[name]) for name in ("height", "width")}
    if settings["resample"] not in list(PILImageResampling) or isinstance(settings["resample"], bool):
        raise ValueError(f"resample must be one of Pillow's filters, 0 to 5, not {settings['resample']!r}")
    checked["resample"] = int(settings["resample"])
    if not _is_number(settings["rescale_factor"]) or settings["rescale_factor"] == 0:
        raise ValueError(f"rescale_factor must be a number other than 0, not {settings['rescale_factor']!r}")
    channels = (3,) if settings["do_convert_rgb"] else (1, 3, 4)
    for name in ("image_mean", "image_std"):
        values = settings[name]
        if _is_number(values):
            values = [values] * 3
        if not isinstance(values, (list, tuple, np.ndarray)) or not all(map(_is_number, values)):
            raise ValueError(f"{name} must be a list of numbers, not {settings[name]!r}")
        if len(values) not in channels:
            raise ValueError(f"{name} must have one number for each channel (3), not {len(values)}")
        if name == "image_std" and not all(value > 0 for value in values):
            raise ValueError(f"image_std must be above 0, not {settings[name]!r}")
        checked[name] = [float(value) for value in values]
    return checked


def _is_number(value: Any) -> bool:
    return isinstance(value, (Real, np.number)) and not isinstance(value, (bool, np.bool_)) and math.isfinite(value)


def _is_side(value: Any) -> bool:
    return _is_number(value) and value == int(value) and 1 <= value <= LARGEST_SIDE


def _from_pil(image: Image.Image, settings: dict[str, Any]) -> torch.Tensor:
    """Return a Pillow image converted and resized, (channels, height, width)."""
    if 0 in image.size:
        raise ValueError(f"images must have pixels, and one has a size of {image.width} x {image.height}")
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ValueError("images must have pixels that are finite numbers: replace NaN and infinity first")
    if settings["do_convert_rgb"]:
        image = to_rgb(image)
    if settings["do_center_crop"]:
        left, top, side = central_square(image.width, image.height)
        image = image.crop((left, top, left + side, top + side))
    if settings["do_resize"]:
        size = (settings["size"]["width"], settings["size"]["height"])
        image = image.resize(size, settings["resample"], reducing_gap=3.0)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _rescale_and_normalise(pixels: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """Return an image (channels, height, width) rescaled and normalised by one multiplication and one addition."""
    if not settings["do_rescale"] and not settings["do_normalize"]:
        return pixels
    for name in ("image_mean", "image_std"):
        if settings["do_normalize"] and len(settings[name]) != len(pixels):
            raise ValueError(f"{name}: {len(settings[name])} numbers for an image of {len(pixels)} channels")
    scale, shift = (torch.as_tensor(one, device=pixels.device) for one in scale_and_shift(settings))
    return pixels.float() * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)


__all__ = ["NanoVLMImageProcessor", "images_of_texts"]
