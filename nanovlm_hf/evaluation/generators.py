"""Models that complete a text about an image: NanoVLM and the baselines (section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from ..checkpoints import NAMES
from ..completion import finite_logits
from ..completion_files import DEFAULT_NEW_TOKENS
from ..configuration_nanovlm import NanoVLMConfig
from ..devices import default_device
from ..errors import InputError, first_line
from ..loading import load_model, local_folder, locate, read_config
from ..processing_nanovlm import NanoVLMProcessor
from ..untrusted_files import is_refusal

# The paper's three models (Table 3; its GIT has 350M parameters, as git-large) and a recent small one.
BASELINES = (
    "Salesforce/blip-image-captioning-base",
    "microsoft/git-base",
    "microsoft/git-large-coco",
    "microsoft/kosmos-2-patch14-224",
    "HuggingFaceTB/SmolVLM-256M-Instruct",
)
INSTRUCTION = "Describe the picture in the simple words of a small child."  # for chat models


@dataclass
class Generated:
    """The completion of one item.

    Attributes:
        text: prefix and completion, as the model spells them.
        completion: the words that the model added.
        new_tokens: number of generated tokens, including the end token.
    """

    text: str
    completion: str
    new_tokens: int


class Generator:
    """A model and its processor, which complete one prefix about one image at a time.

    Args:
        name: short name, folder or Hub id.
        model: as loaded.
        processor: as loaded.
        max_new_tokens: maximum length of a completion.

    Attributes:
        settings: generation settings: a baseline's are greedy, and otherwise those of its generation config.
        parameters: number of parameters.
    """

    def __init__(self, name: str, model: Any, processor: Any, max_new_tokens: int = DEFAULT_NEW_TOKENS):
        self.name, self.model, self.processor = name, model.eval(), processor
        self.settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        self.parameters = sum(parameter.numel() for parameter in model.parameters())

    @torch.no_grad()
    def complete(self, image: Image.Image, prefix: str) -> Generated:
        """Return the completion of a prefix about an RGB image; whitespace around the prefix is ignored."""
        prefix = prefix.strip()
        inputs = self.inputs(image, prefix).to(self.model.device)
        tokens = self.model.generate(**inputs, **self.settings, logits_processor=finite_logits())[0]
        length = self.prompt_length(inputs)
        # Some tokenizers decode the first token of a text differently, so both texts are decoded from the beginning.
        decoded, before = self.decode(tokens), self.decode(tokens[:length])
        completion = decoded[len(before) :] if decoded.startswith(before) else self.decode(tokens[length:])
        text = self.full_text(prefix, decoded, completion)
        return Generated(text, " ".join(completion.split()), len(tokens) - length)

    def inputs(self, image: Image.Image, prefix: str) -> Any:
        """Return the inputs of `generate`."""
        return self.processor(images=image, text=prefix, return_tensors="pt")

    def prompt_length(self, inputs: Any) -> int:
        """Return how many of the tokens that `generate` returns belong to the prompt."""
        return inputs["input_ids"].shape[1]

    def decode(self, tokens: torch.Tensor) -> str:
        """Return the text of tokens, without special tokens."""
        return self.processor.decode(tokens, skip_special_tokens=True)

    def full_text(self, prefix: str, decoded: str, completion: str) -> str:
        """Return prefix and completion."""
        return " ".join(decoded.split())


class NanoVLM(Generator):
    """NanoVLM, the model of this package."""

    def __init__(self, name: str, model: Any, processor: NanoVLMProcessor, max_new_tokens: int = DEFAULT_NEW_TOKENS):
        super().__init__(name, model, processor, max_new_tokens)
        del self.settings["num_beams"]  # use the checkpoint's own
        self.settings["suppress_tokens"] = [model.config.image_token_id]

    def complete(self, image: Image.Image, prefix: str) -> Generated:
        used = self.processor.image_seq_length + len(self.processor(text=prefix.strip())["input_ids"][0])
        room = self.model.config.text_config.max_position_embeddings - used
        if room < 1:
            raise InputError(f"{self.name}: a prefix of {used} tokens leaves no room for a completion: use fewer words")
        full = self.settings["max_new_tokens"]
        self.settings["max_new_tokens"] = min(full, room)
        try:
            return super().complete(image, prefix)
        finally:
            self.settings["max_new_tokens"] = full


class Blip(Generator):
    """BLIP, which reads `[CLS] prefix [SEP]`; `generate` drops the [SEP] itself."""

    def prompt_length(self, inputs: Any) -> int:
        return inputs["input_ids"].shape[1] - 1


class Git(Generator):
    """GIT, which reads `[CLS] prefix`; the processor's [SEP] would end the text."""

    def inputs(self, image: Image.Image, prefix: str) -> Any:
        inputs = super().inputs(image, prefix)
        shorter = {name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}
        return BatchFeature({"pixel_values": inputs["pixel_values"]} | shorter)


class Kosmos2(Generator):
    """Kosmos-2, whose text begins with image positions, which are not part of the completion."""

    def inputs(self, image: Image.Image, prefix: str) -> Any:
        inputs = super().inputs(image, prefix)
        names = ("pixel_values", "input_ids", "attention_mask", "image_embeds_position_mask")
        return BatchFeature({name: inputs[name] for name in names})

    def decode(self, tokens: torch.Tensor) -> str:
        text = super().decode(tokens)
        return self.processor.post_process_generation(text, cleanup_and_extract=True)[0]

    def full_text(self, prefix: str, decoded: str, completion: str) -> str:
        return join(prefix, completion)


class Chat(Generator):
    """Any other image-text-to-text model: asked for a description, with the prefix as the start of its answer."""

    def inputs(self, image: Image.Image, prefix: str) -> Any:
        content = [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]
        if getattr(self.processor, "chat_template", None):
            messages = [{"role": "user", "content": content}]
            question = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            text = f"{question.rstrip()} {prefix}"
        else:
            text = f"{getattr(self.processor, 'image_token', '')}{prefix}"
        return self.processor(images=image, text=text, return_tensors="pt")

    def full_text(self, prefix: str, decoded: str, completion: str) -> str:
        return join(prefix, completion)


def join(prefix: str, completion: str) -> str:
    """Return prefix and completion as one text, without a space before punctuation."""
    completion = " ".join(completion.split())
    no_space = completion[:1] in set(".,!?;:") or completion.startswith("'")
    return f"{prefix}{'' if no_space or not completion else ' '}{completion}"


KINDS = {"blip": ("BlipForConditionalGeneration", Blip), "git": ("GitForCausalLM", Git)}
KINDS |= {"kosmos-2": ("Kosmos2ForConditionalGeneration", Kosmos2)}


def load_generator(name: str, max_new_tokens: int = DEFAULT_NEW_TOKENS) -> Generator:
    """Return a model by short name, folder or Hub id, without running code of its checkpoint.

    Raises:
        InputError: if it is missing, or is not an image-text-to-text model.
    """
    try:
        if name in NAMES or (model_type := read_config(name).get("model_type")) == NanoVLMConfig.model_type:
            return NanoVLM(name, *load_model(name), max_new_tokens=max_new_tokens)
    except InputError as error:
        raise InputError(f"--model {error}") from None
    import transformers

    class_name, kind = KINDS.get(str(model_type), (None, Chat))
    loader = getattr(transformers, class_name) if class_name else AutoModelForImageTextToText
    folder = local_folder(name)
    # The revision whose config.json was read. Without `trust_remote_code`, Transformers asks on the terminal.
    settings = {"trust_remote_code": False} | ({"revision": locate(name).name} if folder is None else {})
    try:
        model = loader.from_pretrained(folder or name, use_safetensors=True, **settings)
        processor = AutoProcessor.from_pretrained(folder or name, **settings)
    except BaseException as error:  # Transformers, safetensors and huggingface_hub raise errors of many types
        if not is_refusal(error):
            raise
        raise InputError(f"--model {name}: cannot be loaded: {first_line(error)}") from None
    return kind(name, model.to(default_device()), processor, max_new_tokens)


def public_name(name: str) -> str:
    """Return a short name or Hub id unchanged, and the short name of a folder, without its path."""
    return short_name(name) if Path(name).expanduser().is_dir() else name


def short_name(name: str) -> str:
    """Return the last part of a name, for tables and files; for `best` or `last` of a run also the run's name.

    A folder has its name on disk, even if it is given as `.` or `~`.
    """
    path = Path(name).expanduser()
    parts = [part for part in (path.resolve() if path.is_dir() else path).parts if part not in ("/", ".", "..")]
    if not parts:
        return "model"
    return "-".join(parts[-2:]) if parts[-1] in ("best", "last") else parts[-1]
