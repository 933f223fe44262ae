"""The fields of a run: a YAML file, each of whose lines can be given anew on the command line."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NoReturn, Optional

import yaml
from transformers import HfArgumentParser

from nanovlm_hf import InputError


# `Optional` and `Literal` rather than `|`: HfArgumentParser reads these annotations.
@dataclass
class TrainingArguments:
    """One run. What the paper fixes is fixed in the paper's configs: lr 1e-3, dropout 0.1, 224 x 224 (section 2.3)."""

    dataset: str = field(metadata={"help": "folder or Hub id of a dataset that `nanovlm data build` wrote"})
    output_dir: str = field(metadata={"help": "folder of this run"})
    variant: Literal["short", "long"] = field(default="short", metadata={"help": "ShortDesc or LongDesc"})
    texts: list[str] = field(
        default_factory=lambda: ["description"],
        metadata={"help": "columns to learn to write, a text of each for every photo; the first is the one judged"},
    )
    preset: Literal["mini", "base", "large"] = field(default="mini", metadata={"help": "size of Table 1"})
    vision_feature_select_strategy: Literal["cls", "patch", "full"] = field(
        default="cls", metadata={"help": "what the decoder sees of the picture; cls is the paper's"}
    )
    vision_initializer_range: Optional[float] = field(  # noqa: UP045
        default=None, metadata={"help": "first weights of the encoder and projector; unset means fan_in ** -0.5"}
    )
    dropout: float = field(default=0.1, metadata={"help": "on embeddings, residual branches and the projector"})
    tokenizer: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "folder of a tokenizer; unset means the one that the package ships"}
    )
    init_from: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"help": "checkpoint to begin from instead of random weights"}
    )
    visual_words_weight: float = field(
        default=0.0, metadata={"help": "weight of naming the captions' words from the visual token (beyond the paper)"}
    )
    augment: bool = field(default=False, metadata={"help": "random crops and mirror images"})
    num_train_epochs: float = field(default=30.0, metadata={"help": "passes over the photos"})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "photos a process takes in a forward pass"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "forward passes an optimizer step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "highest learning rate"})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW's, on matrices alone"})
    warmup_steps: int = field(default=200, metadata={"help": "steps of linear warm-up before the cosine"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    mixed_precision: Literal["no", "bf16"] = field(default="bf16", metadata={"help": "autocast"})
    eval_steps: int = field(default=250, metadata={"help": "steps between evaluations"})
    eval_samples: int = field(default=1000, metadata={"help": "validation photos an evaluation takes"})
    logging_steps: int = field(default=25, metadata={"help": "steps between lines of metrics.jsonl"})
    save_steps: int = field(default=250, metadata={"help": "steps between states to resume from"})
    resume: bool = field(default=False, metadata={"help": "go on from the last state in output_dir"})
    seed: int = field(default=0, metadata={"help": "of weights, order, augmentation and dropout"})

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps", "eval_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is less than 1")
        for name in ("learning_rate", "num_train_epochs", "logging_steps", "save_steps", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}: {getattr(self, name)} is not above 0")
        unknown = set(self.texts) - {"description", "captions"}
        if unknown or not self.texts:
            raise InputError(f"texts: {sorted(unknown)} is neither 'description' nor 'captions'")


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
        raise InputError(f"there is no field {unknown[0].lstrip('-')!r}{_did_you_mean(unknown[0].lstrip('-'))}")
    return arguments


def _refuse(message: str) -> NoReturn:
    raise InputError(message)


def _did_you_mean(name: str) -> str:
    near = difflib.get_close_matches(name, [one.name for one in fields(TrainingArguments)], n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def _yaml_as_argv(path: Path) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: this is no list of 'field: value' lines")
    names = [one.name for one in fields(TrainingArguments)]
    argv = []
    for key, value in content.items():
        if key not in names:
            raise InputError(f"{path}: there is no field {key!r}{_did_you_mean(str(key))}")
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        argv += [f"--{key}", *map(str, values)]
    return argv
