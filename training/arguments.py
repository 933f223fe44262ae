"""The fields of a run: a YAML file, each of whose lines can be given anew on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, Optional

import yaml
from transformers import HfArgumentParser

from nanovlm_hf import InputError
from nanovlm_hf.errors import first_line

SOURCES = ("short", "long", "captions")


def _field(default: Any, help: str) -> Any:
    """A field with its help; a list is made anew for each run."""
    metadata = {"help": help}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# `Optional` and `Literal` rather than `|`: HfArgumentParser reads these annotations.
@dataclass
class TrainingArguments:
    """One run. The defaults are the paper's where it tells them: lr 1e-3, dropout 0.1, 224 x 224 (section 2.3)."""

    dataset: str = field(metadata={"help": "folder or Hub id of a dataset that `nanovlm data build` wrote"})
    output_dir: str = field(metadata={"help": "folder of this run"})
    variant: Literal["short", "long"] = _field("short", "ShortDesc or LongDesc")
    texts: list[str] = _field(
        [], "sources to learn to write (short, long, captions); the first, by default the variant, is judged"
    )
    text_weights: list[float] = _field(
        [], "how often, 0 to 1, a photo comes with a text of each source; unset means always"
    )
    train_samples: Optional[int] = _field(None, "photos to train on, the lowest hashes first; unset means all")

    preset: Literal["mini", "base", "large"] = _field("mini", "size of Table 1")
    n_blks: Optional[int] = _field(None, "blocks of the encoder, instead of the preset's")
    n_layer: Optional[int] = _field(None, "blocks of the decoder, likewise")
    n_head: Optional[int] = _field(None, "attention heads, likewise")
    head_size: Optional[int] = _field(None, "size of a head of the decoder, likewise")
    img_embd_dim: Optional[int] = _field(None, "width of the encoder, likewise")
    vision_feature_select_strategy: Literal["cls", "patch", "full"] = _field(
        "cls", "what the decoder sees of the picture; cls is the paper's"
    )
    vision_initializer_range: Optional[float] = _field(
        None, "first weights of the encoder and projector; unset means fan_in ** -0.5"
    )
    dropout: float = _field(0.1, "on embeddings, residual branches and the projector")
    patch_dropout: float = _field(
        0.0, "share of the patches that the encoder's blocks do not see while training (beyond the paper; cls alone)"
    )
    tokenizer: Optional[str] = _field(None, "folder of a tokenizer; unset means the one that the package ships")
    init_from: Optional[str] = _field(None, "checkpoint to begin from instead of random weights")
    grow_from: Optional[str] = _field(
        None,
        "checkpoint to begin from that may be smaller, or whose decoder may be another; with init_from as well, that "
        "one gives the decoder and this one the eyes",
    )

    visual_words_weight: float = _field(
        0.0, "weight of naming the captions' words from the visual token (beyond the paper)"
    )
    augment: bool = _field(False, "random crops in other light, mirror images where no text says left or right")
    ema_decay: float = _field(
        0.0, "of the moving average of the weights that is judged and saved; 0 means the weights themselves"
    )
    num_train_epochs: float = _field(30.0, "passes over the photos")
    max_steps: Optional[int] = _field(None, "optimizer steps, instead of num_train_epochs")
    streaming: bool = _field(
        False, "read and decode the train split as it comes, nothing downloaded first; needs max_steps"
    )
    early_stopping_patience: int = _field(
        0, "evaluations without a better loss after which the run ends; 0 means never"
    )
    per_device_train_batch_size: int = _field(32, "photos a process takes in a forward pass")
    gradient_accumulation_steps: int = _field(1, "forward passes an optimizer step")
    learning_rate: float = _field(1e-3, "highest learning rate, of AdamW")
    muon_learning_rate: float = _field(
        0.0, "Muon's, for the matrices between embedding and head (beyond the paper); 0 leaves all to AdamW"
    )
    weight_decay: float = _field(0.1, "on matrices alone")
    warmup_steps: int = _field(200, "steps of linear warm-up before the cosine")
    max_grad_norm: float = _field(1.0, "gradients are clipped to this norm")
    mixed_precision: Literal["no", "bf16"] = _field("bf16", "autocast")
    compile: bool = _field(False, "torch.compile encoder and decoder; worth its minute on a GPU")
    activation_checkpointing: bool = _field(False, "compute activations twice rather than keep them")

    eval_steps: int = _field(250, "steps between evaluations")
    eval_samples: int = _field(1000, "validation photos an evaluation takes")
    logging_steps: int = _field(25, "steps between lines of metrics.jsonl")
    save_steps: int = _field(250, "steps between states to resume from")
    save_total_limit: int = _field(1, "states that are kept")
    trackers: list[str] = _field([], "Accelerate's trackers to log to as well: tensorboard, wandb")
    resume: Optional[str] = _field(
        None, "auto: go on from the last state in output_dir, if there is one; or the folder of a state"
    )
    overwrite: bool = _field(False, "remove a run that is in output_dir")
    seed: int = _field(0, "of weights, order, augmentation and dropout")

    def __post_init__(self) -> None:
        self.texts = self.texts or [self.variant]
        self.text_weights = self.text_weights or [1.0] * len(self.texts)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps", "eval_samples"):
            _refuse_unless(getattr(self, name) >= 1, name, getattr(self, name), "is less than 1")
        for name in ("logging_steps", "save_steps", "save_total_limit"):
            _refuse_unless(getattr(self, name) >= 1, name, getattr(self, name), "is less than 1")
        for name in ("learning_rate", "num_train_epochs", "max_grad_norm"):
            _refuse_unless(getattr(self, name) > 0, name, getattr(self, name), "is not above 0")
        for name in ("dropout", "patch_dropout", "ema_decay", "muon_learning_rate"):
            _refuse_unless(0 <= getattr(self, name) < 1, name, getattr(self, name), "is not from 0 to below 1")
        for text in self.texts:
            near = _did_you_mean(text, SOURCES)
            _refuse_unless(text in SOURCES, "texts", repr(text), f"is neither short, long nor captions{near}")
        _refuse_unless(
            self.texts[0] == self.variant, "texts", self.texts[0], "comes first, but variant is judged: begin with it"
        )
        _refuse_unless(len(set(self.texts)) == len(self.texts), "texts", self.texts, "has a source twice")
        for name in ("max_steps", "train_samples"):
            value = getattr(self, name)
            _refuse_unless(value is None or value >= 1, name, value, "is less than 1")
        _refuse_unless(
            not self.patch_dropout or self.vision_feature_select_strategy == "cls",
            "patch_dropout",
            self.patch_dropout,
            f"but the decoder sees the patches of {self.vision_feature_select_strategy}: it goes with cls",
        )
        if self.streaming:
            _refuse_unless(self.max_steps is not None, "max_steps", None, "but a stream has no length: say how many")
            _refuse_unless(
                self.train_samples is None, "train_samples", self.train_samples, "are not to be found in a stream"
            )
            others = set(self.texts) - {self.variant, "captions"}
            _refuse_unless(not others, "texts", self.texts, f"but a stream holds {self.variant} and captions alone")
        same = len(self.text_weights) == len(self.texts) and all(0 <= weight <= 1 for weight in self.text_weights)
        _refuse_unless(same, "text_weights", self.text_weights, f"is not {len(self.texts)} numbers of 0 to 1")


def _refuse_unless(fine: bool, name: str, value: object, problem: str) -> None:
    if not fine:
        raise InputError(f"{name}: {value} {problem}")


NAMES = [one.name for one in fields(TrainingArguments)]


def read_arguments(argv: list[str]) -> TrainingArguments:
    """Reads `--config FILE.yaml` and the fields after it, which win over the file's.

    Raises:
        InputError: for a file that is missing or no YAML, a key that is no field, and an impossible value.
    """
    argv = list(argv)
    from_file: list[str] = []
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise InputError("--config: name a YAML file after it")
        from_file = _yaml_as_argv(Path(argv[at + 1]))
        del argv[at : at + 2]
    parser = HfArgumentParser(TrainingArguments, prog="train.py", allow_abbrev=False)
    parser.error = _refuse
    # The file's values pass through the same parser as the command line's, and so through the same checks.
    arguments, unknown = parser.parse_args_into_dataclasses(from_file + argv, return_remaining_strings=True)
    if unknown:
        raise InputError(f"there is no field {unknown[0].lstrip('-')!r}{_did_you_mean(unknown[0].lstrip('-'), NAMES)}")
    return arguments


def _refuse(message: str) -> NoReturn:
    raise InputError(message)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def _yaml_as_argv(path: Path) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: this is no list of 'field: value' lines")
    argv = []
    for key, value in content.items():
        if key not in NAMES:
            raise InputError(f"{path}: there is no field {key!r}{_did_you_mean(str(key), NAMES)}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        argv += [f"--{key}", *map(str, values)]
    return argv
