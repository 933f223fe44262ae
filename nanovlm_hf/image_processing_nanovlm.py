"""Pictures to `pixel_values`, with Pillow and NumPy alone (section 2.2.1: 224 x 224 pixels)."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, get_size_dict
from transformers.image_transforms import to_channel_dimension_format
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    infer_channel_dimension_format,
    make_flat_list_of_images,
    to_numpy_array,
    valid_images,
)
from transformers.utils import TensorType

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


class NanoVLMImageProcessor(BaseImageProcessor):
    """Turns any picture that Pillow can open into normalised pixels.

    EXIF rotation is applied; transparency is laid over white; grey, palette, CMYK and 16-bit pictures become RGB. The
    picture is squashed to `size`, as the photos of the paper are; with `do_center_crop` its central square is taken
    first. Every argument can be given anew in a call.

    Args:
        do_convert_rgb: apply the EXIF rotation and convert to RGB.
        do_center_crop: cut out the largest central square before resizing.
        do_resize: resize to `size`.
        size: `{"height": pixels, "width": pixels}`.
        resample: Pillow's resampling filter.
        do_rescale: multiply by `rescale_factor`.
        rescale_factor: 1/255 takes 8-bit values to 0..1.
        do_normalize: subtract `image_mean` and divide by `image_std`.
        image_mean, image_std: one number a channel (ImageNet's by default).
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
        super().__init__(**kwargs)
        self.do_convert_rgb = do_convert_rgb
        self.do_center_crop = do_center_crop
        self.do_resize = do_resize
        self.size = get_size_dict(size or {"height": 224, "width": 224})
        self.resample = resample
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = list(IMAGENET_DEFAULT_MEAN if image_mean is None else image_mean)
        self.image_std = list(IMAGENET_DEFAULT_STD if image_std is None else image_std)

    def preprocess(
        self,
        images: ImageInput,
        return_tensors: str | TensorType | None = None,
        data_format: str | ChannelDimension = ChannelDimension.FIRST,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares one picture or several.

        Args:
            images: Pillow images, arrays or tensors with values from 0 to 255 (or a list of them).
            return_tensors: `"pt"` or `"np"`; None gives a list of arrays.
            data_format: where the channels of the result stand.
            input_data_format: where those of array inputs stand; looked for when None.
            kwargs: arguments of the class, for this call.

        Returns:
            `pixel_values`, (images, 3, height, width) in float32.

        Raises:
            ValueError: for an input that is no picture, or an unknown argument.
        """
        settings = self._settings(kwargs)
        images = make_flat_list_of_images(self.fetch_images(images))
        if not valid_images(images):
            raise ValueError("images must be Pillow images, NumPy arrays or tensors, one or a list of them")
        pixels = [
            to_channel_dimension_format(
                self._prepare(image, input_data_format, settings), data_format, ChannelDimension.LAST
            )
            for image in images
        ]
        return BatchFeature(data={"pixel_values": pixels}, tensor_type=return_tensors)

    def _settings(self, overrides: dict[str, Any]) -> dict[str, Any]:
        # Transformers' processors and pipelines hand some arguments of other image processors to every one.
        foreign = overrides.keys() - set(SETTINGS) - {"device", "disable_grouping", "crop_size", "do_pad", "pad_size"}
        if foreign:
            raise ValueError(f"NanoVLMImageProcessor does not know {', '.join(sorted(foreign))}")
        settings = {name: getattr(self, name) for name in SETTINGS}
        settings.update({name: value for name, value in overrides.items() if name in SETTINGS and value is not None})
        settings["size"] = get_size_dict(settings["size"])
        return settings

    def _prepare(self, image: Any, input_data_format: Any, settings: dict[str, Any]) -> np.ndarray:
        """One picture as an array (height, width, channels)."""
        if not isinstance(image, Image.Image):
            image = _array_to_pil(to_numpy_array(image), input_data_format)
        if settings["do_convert_rgb"]:
            image = to_rgb(image)
        if settings["do_center_crop"]:
            image = _central_square(image)
        if settings["do_resize"]:
            size = (settings["size"]["width"], settings["size"]["height"])
            image = image.resize(size, settings["resample"], reducing_gap=3.0)
        pixels = np.asarray(image)
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if not settings["do_rescale"] and not settings["do_normalize"]:
            return pixels
        # One multiplication and one addition do both steps.
        scale = np.float32(settings["rescale_factor"] if settings["do_rescale"] else 1.0)
        shift = np.float32(0.0)
        if settings["do_normalize"]:
            std = np.asarray(settings["image_std"], np.float32)
            scale, shift = scale / std, -np.asarray(settings["image_mean"], np.float32) / std
        return pixels.astype(np.float32) * scale + shift


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright 8-bit RGB picture: EXIF rotation applied, transparency laid over white, 16-bit values scaled."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        # 16-bit greys span 0..65535; other integer and float pictures are taken to be 8-bit when they fit into it.
        scale = 255.0 / 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 1.0
        return Image.fromarray(np.clip(values * scale, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _array_to_pil(array: np.ndarray, input_data_format: Any) -> Image.Image:
    if array.ndim == 3:
        input_data_format = input_data_format or infer_channel_dimension_format(array, num_channels=(1, 3, 4))
        array = to_channel_dimension_format(array, ChannelDimension.LAST, input_data_format)
        if array.shape[-1] == 1:
            array = array[:, :, 0]
    if array.dtype == np.uint16:
        array = array // 257
    elif array.dtype != np.uint8 and array.size and array.max() <= 1 and array.dtype.kind == "f":
        array = array * 255  # floats from 0 to 1
    return Image.fromarray(np.clip(np.round(array), 0, 255).astype(np.uint8))


def _central_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


__all__ = ["NanoVLMImageProcessor"]
