"""Prepare images and texts as model inputs: `<image>` and text, padded for generation or training.

It must not import `annotations` from `__future__`: Transformers 5 reads the annotations of the kwargs classes.
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, TextKwargs, Unpack
from transformers.utils import TensorType

from .compat_nanovlm import IS_TRANSFORMERS_4, make_tokenizer_portable
from .hub_nanovlm import registered
from .image_processing_nanovlm import NanoVLMImageProcessor, images_of_texts

# A chat as a prompt: the image first, then the texts of user and assistant, without roles. If the last text is the
# assistant's, it ends a description, as in training data; `continue_final_message` removes the `<eos>` again.
CHAT_TEMPLATE = """\
{%- set prompt = namespace(images='', text='') -%}
{%- for message in messages if message['role'] in ('user', 'assistant') -%}
    {%- if message['content'] is string -%}
        {%- set prompt.text = (prompt.text + ' ' + message['content'] | trim) | trim -%}
    {%- else -%}
        {%- for content in message['content'] or [] -%}
            {%- if content['type'] in ('image', 'image_url') -%}
                {%- set prompt.images = prompt.images + '<image>' -%}
            {%- elif content['type'] == 'text' -%}
                {%- set prompt.text = (prompt.text + ' ' + content['text'] | trim) | trim -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{{- prompt.images + prompt.text -}}
{%- if messages and messages[-1]['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
"""


class NanoVLMTextKwargs(TextKwargs, total=False):
    """Text arguments of a processor, and `return_labels` to prepare a training batch."""

    return_labels: bool
    return_mm_token_type_ids: bool
    return_text_replacement_offsets: bool


class NanoVLMProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of `NanoVLMProcessor` and their defaults."""

    text_kwargs: NanoVLMTextKwargs
    _defaults = {"text_kwargs": {"padding": True, "return_labels": False}}


class NanoVLMProcessor(ProcessorMixin):
    """Combine an image processor and a tokenizer, and insert the `<image>` placeholders.

    Args:
        image_processor: a `NanoVLMImageProcessor`.
        tokenizer: a `PreTrainedTokenizerFast` with an `<image>` token.
        image_seq_length: tokens of an image, as in `NanoVLMConfig.image_seq_length`.
        chat_template: None stands for `CHAT_TEMPLATE`: the image, then the texts of the messages without roles.

    Raises:
        ValueError: if the tokenizer has no `<image>` token.
    """

    if IS_TRANSFORMERS_4:  # version 5 infers these from __init__ and warns if they are given
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "NanoVLMImageProcessor"  # AutoImageProcessor warns that there is no fast one
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
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    @staticmethod
    def get_possibly_dynamic_module(module_name: str) -> type:
        """Return the class of a part of the processor by name; this one may not be registered with an Auto class."""
        if module_name == NanoVLMImageProcessor.__name__:
            return NanoVLMImageProcessor
        return ProcessorMixin.get_possibly_dynamic_module(module_name)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[NanoVLMProcessorKwargs],
    ) -> BatchFeature:
        """Prepare images and texts.

        Whitespace at the ends of a text and after a leading `<image>` is stripped: tokens start with the space before a
        word, so a trailing space would become a token that the model has never seen before a word.

        Args:
            images: one image for each text; in a list of lists, texts may have none. None for text only.
            text: prefixes to complete, or whole descriptions with `return_labels`; None stands for empty prefixes.
                `<image>` is prepended to a text that has an image and no placeholder.
            kwargs: arguments of the image processor and the tokenizer, and these:
                `return_labels`: append `<eos>`, pad on the right and return `labels`, -100 at image and padding tokens.
                By default texts are padded on the left, for `generate()`.
                `return_mm_token_type_ids`: return `mm_token_type_ids`, 1 at image tokens and 0 elsewhere.
                `return_text_replacement_offsets`: return `text_replacement_offsets`, a list for each text with the
                characters that were replaced by image tokens, as processors of Transformers 5.15 and newer do.

        Returns:
            `input_ids` and `attention_mask` (B, T), `pixel_values` (B, 3, height, width) unless no text has an image,
            `labels` (B, T).

        Raises:
            ValueError: if both are None, one is empty or of another type, their numbers differ, a text has more than
                one `<image>`, or `videos` or `audio` is given.
        """
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name}: this model takes images and text only")
        if images is None and text is None:
            raise ValueError("give images, text or both")
        settings = self._merge_kwargs(
            NanoVLMProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        text_settings, image_settings = settings["text_kwargs"], settings["images_kwargs"]
        return_tensors = text_settings.pop("return_tensors", None)
        return_labels = text_settings.pop("return_labels")
        return_types, return_offsets = (
            # Version 5 also accepts them outside the arguments of text and images.
            text_settings.pop(name, settings.get(name, False))
            for name in ("return_mm_token_type_ids", "return_text_replacement_offsets")
        )

        data: dict[str, Any] = {}
        image_counts = None  # one for each text
        if images is not None:
            # Tensors stay on their device, and `device` moves them, only if tensors are returned.
            image_settings["return_tensors"] = return_tensors if return_tensors in ("pt", TensorType.PYTORCH) else None
            images = images_of_texts(images)
            image_counts = [len(one) for one in images]
            if any(image_counts):  # no text has an image: the model takes no `pixel_values`
                data.update(self.image_processor([image for one in images for image in one], **image_settings))
        texts = [""] * len(image_counts or []) if text is None else _texts(text)
        prompts = self._prompts(texts, image_counts)
        offsets = [self._replacement_offsets(*pair) for pair in zip(texts, prompts, strict=True)]
        if return_labels:
            prompts = [prompt + self.tokenizer.eos_token for prompt in prompts]
            text_settings["padding_side"] = "right"
            returns_mask = text_settings.get("return_attention_mask") is not False
            text_settings["return_attention_mask"] = True
        else:
            text_settings.setdefault("padding_side", "left")
        encoded = self.tokenizer(prompts, **text_settings)
        encoded.pop("token_type_ids", None)  # of Transformers 4; generate() does not accept them
        self._check_truncation(prompts, encoded["input_ids"])
        if return_types:
            encoded["mm_token_type_ids"] = [
                [int(token == self.image_token_id) for token in ids] for ids in encoded["input_ids"]
            ]
        if return_labels:
            # By the mask rather than by the pad token, which may be `<eos>` as well.
            encoded["labels"] = [
                [token if kept and token != self.image_token_id else -100 for token, kept in zip(*row, strict=True)]
                for row in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
            ]
            if not returns_mask:
                del encoded["attention_mask"]
        data.update(encoded)
        batch = BatchFeature(data=data, tensor_type=return_tensors)
        if return_offsets:
            batch["text_replacement_offsets"] = offsets
        return batch

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Return a conversation, or each one in a list, as a prompt or as model inputs, as other processors do.

        Raises:
            ValueError: if there is no message, one is not a dictionary with a role, or a text in one is not a string.
        """
        is_batch = isinstance(conversation, (list, tuple)) and any(
            isinstance(one, (list, tuple)) for one in conversation
        )
        # A `Chat` of the pipelines has `messages`.
        found = [getattr(one, "messages", one) for one in (conversation if is_batch else [conversation])]
        for messages in found:
            _check_messages(messages)
        # Transformers 4.57 takes contents in parts alone if it tokenizes.
        found = [[dict(one) | {"content": _parts(one.get("content"))} for one in messages] for messages in found]
        return super().apply_chat_template(found if is_batch else found[0], *args, **kwargs)

    def _prompts(self, texts: list[str], image_counts: list[int] | None) -> list[str]:
        """Return the stripped texts, with `<image>` placeholders for those that have an image."""
        if image_counts is not None and len(image_counts) != len(texts):
            raise ValueError(f"{len(image_counts)} images and {len(texts)} texts: pass one text for each image")
        placeholder = self.image_token * self.image_seq_length
        prompts = []
        for index, one in enumerate(texts):
            one = one.replace(placeholder, self.image_token).strip()
            if one.startswith(self.image_token):
                one = self.image_token + one.removeprefix(self.image_token).strip()
            found = one.count(self.image_token)
            wanted = found if image_counts is None else image_counts[index]
            if wanted > 1 or found > wanted:
                raise ValueError(
                    f"{max(wanted, found)} {self.image_token} for {wanted} images in {one!r}: "
                    "this model takes one image for each text"
                )
            if found == 0 and wanted == 1:
                one = self.image_token + one
            prompts.append(one.replace(self.image_token, placeholder))
        return prompts

    def _replacement_offsets(self, text: str, prompt: str) -> list[dict[str, Any]]:
        """Return where image tokens replaced characters of a text: one entry, or none for a text without an image.

        Whitespace that was stripped next to the image counts as replaced.
        """
        start = prompt.find(self.image_token)
        if start < 0:
            return []
        replacement = self.image_token * self.image_seq_length
        end = start + len(replacement)
        first = start + len(text) - len(text.lstrip()) if start else 0
        last = max(first, len(text.rstrip()) - len(prompt) + end)
        return [
            {
                "type": "image",
                "span": (first, last),
                "new_span": (start, end),
                "text": text[first:last],
                "replacement": replacement,
            }
        ]

    def _check_truncation(self, prompts: list[str], input_ids: list[list[int]]) -> None:
        for prompt, ids in zip(prompts, input_ids, strict=True):
            if prompt.count(self.image_token) != sum(token == self.image_token_id for token in ids):
                raise ValueError(
                    f"max_length cuts into the {self.image_seq_length} {self.image_token} tokens: "
                    "raise it or drop truncation"
                )

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Call `batch_decode` of the tokenizer."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Call `decode` of the tokenizer."""
        return self.tokenizer.decode(*args, **kwargs)

    def post_process_image_text_to_text(self, generated_outputs: torch.Tensor, **kwargs: Any) -> list[str]:
        """Decode generated ids (B, T) without special tokens; called by the pipeline of Transformers."""
        return self.tokenizer.batch_decode(generated_outputs, **{"skip_special_tokens": True} | kwargs)

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> Any:
        """Return the number of tokens of each image, which does not depend on its size; called by serving engines."""
        if image_sizes is None:
            return MultiModalData()
        number = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * number, num_image_patches=[1] * number)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the outputs that are inputs of the model."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save the processor in a form that Transformers 4.57 and 5.x both load.

        With `push_to_hub` it is uploaded with its code, as `push_to_hub()` does.
        """
        with self._saved_with_code() if push_to_hub else nullcontext():
            saved = super().save_pretrained(str(save_directory), push_to_hub=push_to_hub, **kwargs)
        self._make_portable(save_directory)
        return saved

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the processor with the code that loads it by `trust_remote_code=True`."""
        with self._saved_with_code():
            return super().push_to_hub(*args, **kwargs)

    @contextmanager
    def _saved_with_code(self) -> Iterator[None]:
        try:
            with registered({type(self): "AutoProcessor", type(self.image_processor): "AutoImageProcessor"}):
                yield
        finally:
            for one in (self, self.image_processor):
                vars(one).pop("auto_map", None)  # set by the upload; local folders have none

    def _upload_modified_files(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        self._make_portable(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _make_portable(self, folder: str | Path) -> None:
        # Version 5 nests the image processor in processor_config.json, which AutoImageProcessor of 4.57 does not read.
        self.image_processor.save_pretrained(folder)
        make_tokenizer_portable(folder)


def _texts(text: Any) -> list[str]:
    """Return a string or strings as a list, with each lone surrogate, which the tokenizer refuses, as U+FFFD."""
    if isinstance(text, (Mapping, Set, bytes, bytearray)) or not isinstance(text, Iterable):
        raise ValueError(f"text must be a string or a list of strings, not {type(text).__name__}")
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("text is an empty list: give at least one string")
    for one in texts:
        if not isinstance(one, str):
            raise ValueError(f"text must be a string or a list of strings; this list has {type(one).__name__}")
    return [one.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for one in texts]


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("a conversation must be a list of messages, and have at least one")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError("a message of a conversation must be a dictionary with a role and a content")
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, (list, tuple)) or not all(
            isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in content
        ):
            raise ValueError("the content of a message must be a string or a list of dictionaries with a type")
        for part in content:
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise ValueError(f"a text of a message must be a string, not {type(part.get('text')).__name__}")


def _parts(content: Any) -> Any:
    """Return the content of a message as a list of parts."""
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


__all__ = ["NanoVLMProcessor"]
