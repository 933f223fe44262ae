"""Models that complete a text about a photo: ours, and those that the paper compares with (section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from ..checkpoints import NAMES, SHIPPED
from ..completion import DEFAULT_NEW_TOKENS, load_model
from ..configuration_nanovlm import NanoVLMConfig
from ..errors import InputError, first_line
from ..processing_nanovlm import NanoVLMProcessor

# The paper's three (Table 3; GIT's 350M are the large one's) and a small one of today.
BASELINES = (
    "Salesforce/blip-image-captioning-base",
    "microsoft/git-base",
    "microsoft/git-large-coco",
    "microsoft/kosmos-2-patch14-224",
    "HuggingFaceTB/SmolVLM-256M-Instruct",
)
INSTRUCTION = "Describe the picture in the simple words of a small child."  # for models that are made to chat


@dataclass
class Generated:
    """What a model made of an item.

    Attributes:
        text: prefix and completion, as the model spells them.
        completion: what it added.
        new_tokens: how many tokens that were, the end token included.
    """

    text: str
    completion: str
    new_tokens: int


class Generator:
    """A model with its processor, completing one prefix about one photo at a time.

    Args:
        name: short name, folder or Hub id.
        model, processor: as loaded.

    Attributes:
        settings: of decoding: greedy, as the model's own generation config has it otherwise.
    """

    def __init__(self, name: str, model: Any, processor: Any, max_new_tokens: int = DEFAULT_NEW_TOKENS):
        self.name, self.model, self.processor = name, model.eval(), processor
        self.settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        self.parameters = sum(parameter.numel() for parameter in model.parameters())

    @torch.no_grad()
    def complete(self, image: Image.Image, prefix: str) -> Generated:
        """The completion of a prefix about an RGB photo."""
        inputs = self.inputs(image, prefix).to(self.model.device)
        tokens = self.model.generate(**inputs, **self.settings)[0]
        length = self.prompt_length(inputs)
        # What stands first in a text may be decoded otherwise than within one, so both are decoded from the beginning.
        said, before = self.decode(tokens), self.decode(tokens[:length])
        completion = said[len(before) :] if said.startswith(before) else self.decode(tokens[length:])
        return Generated(self.whole(prefix, said, completion), " ".join(completion.split()), len(tokens) - length)

    def inputs(self, image: Image.Image, prefix: str) -> Any:
        """What `generate` takes."""
        return self.processor(images=image, text=prefix, return_tensors="pt")

    def prompt_length(self, inputs: Any) -> int:
        """How many of the tokens that `generate` returns were there before."""
        return inputs["input_ids"].shape[1]

    def decode(self, tokens: torch.Tensor) -> str:
        """Text of tokens, without special ones."""
        return self.processor.decode(tokens, skip_special_tokens=True)

    def whole(self, prefix: str, said: str, completion: str) -> str:
        """Prefix and completion, of all that was decoded."""
        return " ".join(said.split())


class NanoVLM(Generator):
    """Models of this package."""

    def __init__(self, name: str, model: Any, processor: NanoVLMProcessor, max_new_tokens: int = DEFAULT_NEW_TOKENS):
        super().__init__(name, model, processor, max_new_tokens)
        self.settings["suppress_tokens"] = [model.config.image_token_id]

    def complete(self, image: Image.Image, prefix: str) -> Generated:
        used = self.inputs(image, prefix)["input_ids"].shape[1]
        room = self.model.config.text_config.max_position_embeddings - used
        if room < 1:
            raise InputError(f"{self.name}: a prefix of {used} tokens leaves no room: ask for fewer words")
        full = self.settings["max_new_tokens"]
        self.settings["max_new_tokens"] = min(full, room)
        try:
            return super().complete(image, prefix)
        finally:
            self.settings["max_new_tokens"] = full


class Blip(Generator):
    """BLIP reads [CLS] prefix, and `generate` drops the [SEP] at its end itself."""

    def prompt_length(self, inputs: Any) -> int:
        return inputs["input_ids"].shape[1] - 1


class Git(Generator):
    """GIT reads [CLS] prefix; [SEP] would end the text."""

    def inputs(self, image: Image.Image, prefix: str) -> Any:
        inputs = super().inputs(image, prefix)
        shorter = {name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}
        return BatchFeature({"pixel_values": inputs["pixel_values"]} | shorter)


class Kosmos2(Generator):
    """Kosmos-2 puts places of the picture before the text; they are no part of what it says."""

    def inputs(self, image: Image.Image, prefix: str) -> Any:
        inputs = super().inputs(image, prefix)
        names = ("pixel_values", "input_ids", "attention_mask", "image_embeds_position_mask")
        return BatchFeature({name: inputs[name] for name in names})

    def decode(self, tokens: torch.Tensor) -> str:
        text = super().decode(tokens)
        return self.processor.post_process_generation(text, cleanup_and_extract=True)[0]

    def whole(self, prefix: str, said: str, completion: str) -> str:
        return join(prefix, completion)


class Chat(Generator):
    """Any image-text-to-text model: asked to describe, with the prefix as the beginning of its own answer."""

    def inputs(self, image: Image.Image, prefix: str) -> Any:
        content = [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]
        if getattr(self.processor, "chat_template", None):
            messages = [{"role": "user", "content": content}]
            asked = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            text = f"{asked.rstrip()} {prefix}"
        else:
            text = f"{getattr(self.processor, 'image_token', '')}{prefix}"
        return self.processor(images=image, text=text, return_tensors="pt")

    def whole(self, prefix: str, said: str, completion: str) -> str:
        return join(prefix, completion)


def join(prefix: str, completion: str) -> str:
    """Both in one text; a completion that begins with a sign of punctuation stands close."""
    completion = " ".join(completion.split())
    close = completion[:1] in set(".,!?;:") or completion.startswith("'")
    return f"{prefix}{'' if close or not completion else ' '}{completion}"


KINDS = {"blip": ("BlipForConditionalGeneration", Blip), "git": ("GitForCausalLM", Git)}
KINDS |= {"kosmos-2": ("Kosmos2ForConditionalGeneration", Kosmos2)}


def load_generator(name: str, max_new_tokens: int = DEFAULT_NEW_TOKENS) -> Generator:
    """A model by short name, folder or Hub id.

    Raises:
        InputError: if there is none, or it is none that completes texts about pictures.
    """
    if name in NAMES or _model_type(name) == NanoVLMConfig.model_type:
        return NanoVLM(name, *load_model(name), max_new_tokens=max_new_tokens)
    import transformers

    class_name, kind = KINDS.get(_model_type(name), (None, Chat))
    loader = getattr(transformers, class_name) if class_name else AutoModelForImageTextToText
    try:
        model = loader.from_pretrained(name, use_safetensors=True)
        processor = AutoProcessor.from_pretrained(name)
    except Exception as error:  # Transformers, safetensors and huggingface_hub each have errors of their own
        raise InputError(f"--model {name}: cannot be loaded: {first_line(error)}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return kind(name, model.to(device), processor, max_new_tokens)


def _model_type(name: str) -> str | None:
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise InputError(f"--model {name}: this is no folder, no Hub id (org/name), and none of {', '.join(SHIPPED)}")
    try:
        return NanoVLMConfig.get_config_dict(name)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise InputError(f"--model {name}: {first_line(error)}") from None


def public_name(name: str) -> str:
    """A short name or Hub id as it is; of a folder its name, not where it is."""
    return short_name(name) if Path(name).is_dir() else name


def short_name(name: str) -> str:
    """The last part of a name, for tables and files: of a run's `best` or `last` the run's with it."""
    parts = Path(name).parts
    return "-".join(parts[-2:]) if parts[-1] in ("best", "last") and len(parts) > 1 else parts[-1]
