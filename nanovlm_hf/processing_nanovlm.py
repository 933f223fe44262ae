"""Picture and partial text to model inputs: `<image> text`, padded for generation or for training.

No `from __future__ import annotations` here: Transformers 5 reads the annotations of the keyword classes as they are.
"""

from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, TextKwargs

from ._compat import IS_TRANSFORMERS_4, make_tokenizer_portable


class NanoVLMTextKwargs(TextKwargs, total=False):
    """Text arguments of a processor, and `return_labels`: prepare a training batch."""

    return_labels: bool


class NanoVLMProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of `NanoVLMProcessor` and their defaults."""

    text_kwargs: NanoVLMTextKwargs
    _defaults = {"text_kwargs": {"padding": True, "return_labels": False}}


class NanoVLMProcessor(ProcessorMixin):
    """Image processor and tokenizer in one, and the `<image>` placeholders between them.

    Args:
        image_processor: a `NanoVLMImageProcessor`.
        tokenizer: a `PreTrainedTokenizerFast` with an `<image>` token.
        image_seq_length: tokens a picture takes (`NanoVLMConfig.image_seq_length`): 1, or 196 or 197 beyond the paper.
        chat_template: none by default; a plain prefix is this model's whole prompt.

    Raises:
        ValueError: if the tokenizer has no `<image>` token.
    """

    if IS_TRANSFORMERS_4:  # version 5 infers these from __init__ and warns about them
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"
    valid_processor_kwargs = NanoVLMProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 1,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        self.image_token = "<image>"
        self.image_seq_length = image_seq_length
        if tokenizer is not None:
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            if self.image_token_id is None:
                raise ValueError(
                    f"the tokenizer has no {self.image_token} token: train one with `nanovlm data tokenizer`"
                )
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[NanoVLMProcessorKwargs],
    ) -> BatchFeature:
        """Prepares pictures and texts.

        Args:
            images: one picture a text, as `NanoVLMImageProcessor` takes them; a list of lists may leave texts without
                one; None for text alone.
            text: partial descriptions (prefixes), or whole ones with `return_labels`; None lets the model begin by
                itself. `<image>` goes before each, unless the text has one already.
            kwargs: arguments of the image processor and of the tokenizer, among them
                `return_labels`: True ends each text with `<eos>`, pads on the right and adds `labels`, -100 at the
                picture and the padding. False (default) pads on the left, for `generate()`.

        Returns:
            `input_ids` and `attention_mask` (B, T), `pixel_values` (B, 3, height, width), `labels` (B, T).

        Raises:
            ValueError: if neither is given, their numbers differ, or a text has more than one `<image>`.
        """
        if images is None and text is None:
            raise ValueError("give images, text or both")
        settings = self._merge_kwargs(
            NanoVLMProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        text_settings, image_settings = settings["text_kwargs"], settings["images_kwargs"]
        return_tensors = text_settings.pop("return_tensors", None)
        return_labels = text_settings.pop("return_labels")

        data: dict[str, Any] = {}
        pictures = None  # how many each text has
        if images is not None:
            image_settings.pop("return_tensors", None)
            images = self.image_processor.fetch_images(images)
            if isinstance(images, (list, tuple)) and any(isinstance(one, (list, tuple)) for one in images):
                pictures = [len(one) if isinstance(one, (list, tuple)) else 1 for one in images]
                images = [image for one in images for image in (one if isinstance(one, (list, tuple)) else [one])]
            else:
                images = make_flat_list_of_images(images)
                pictures = [1] * len(images)
            data.update(self.image_processor(images, **image_settings))
        prompts = self._prompts(text, pictures)
        if return_labels:
            prompts = [prompt + self.tokenizer.eos_token for prompt in prompts]
            text_settings["padding_side"] = "right"
        else:
            text_settings.setdefault("padding_side", "left")
        encoded = self.tokenizer(prompts, **text_settings)
        encoded.pop("token_type_ids", None)  # Transformers 4 makes them, generate() refuses them
        self._check_truncation(prompts, encoded["input_ids"])
        if return_labels:
            hidden = {self.image_token_id, self.tokenizer.pad_token_id}
            encoded["labels"] = [[-100 if token in hidden else token for token in ids] for ids in encoded["input_ids"]]
        data.update(encoded)
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _prompts(self, text: str | list[str] | None, pictures: list[int] | None) -> list[str]:
        """The texts, each with its `<image>` placeholders where it has a picture."""
        if text is None:
            text = [""] * len(pictures)
        texts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(one, str) for one in texts):
            raise ValueError("text must be a string or a list of strings")
        if pictures is not None and len(pictures) != len(texts):
            raise ValueError(f"{len(pictures)} images and {len(texts)} texts: give one text an image")
        placeholder = self.image_token * self.image_seq_length
        prompts = []
        for place, one in enumerate(texts):
            one = one.replace(placeholder, self.image_token)
            found = one.count(self.image_token)
            wanted = found if pictures is None else pictures[place]
            if wanted > 1 or found > wanted:
                raise ValueError(
                    f"{max(wanted, found)} {self.image_token} for {wanted} pictures in {one!r}: "
                    "this model takes one picture a text"
                )
            if found == 0 and wanted == 1:
                one = self.image_token + one
            prompts.append(one.replace(self.image_token, placeholder))
        return prompts

    def _check_truncation(self, prompts: list[str], input_ids: list[list[int]]) -> None:
        for prompt, ids in zip(prompts, input_ids, strict=True):
            if prompt.count(self.image_token) != sum(token == self.image_token_id for token in ids):
                raise ValueError(
                    f"max_length cuts into the {self.image_seq_length} {self.image_token} tokens: "
                    "raise it or drop truncation"
                )

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """As the tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """As the tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)

    def post_process_image_text_to_text(self, generated_outputs: torch.Tensor, **kwargs: Any) -> list[str]:
        """Texts of the generated ids (B, T), special tokens left out; Transformers' pipeline calls it."""
        return self.tokenizer.batch_decode(generated_outputs, **{"skip_special_tokens": True} | kwargs)

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> Any:
        """Tokens each picture takes, whatever its size; serving engines ask for it."""
        if image_sizes is None:
            return MultiModalData()
        number = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * number, num_image_patches=[1] * number)

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes of this processor's output."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As every processor's; Transformers 4.57 and 5.x both load what it writes."""
        saved = super().save_pretrained(str(save_directory), push_to_hub=push_to_hub, **kwargs)
        self._make_portable(save_directory)
        return saved

    def _upload_modified_files(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        self._make_portable(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _make_portable(self, folder: str | Path) -> None:
        # Version 5 nests the image processor in processor_config.json, where 4.57's AutoImageProcessor does not look.
        self.image_processor.save_pretrained(folder)
        make_tokenizer_portable(folder)


__all__ = ["NanoVLMProcessor"]
