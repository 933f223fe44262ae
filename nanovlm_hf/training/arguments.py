"""The fields of a run: a YAML file, each line of which the command line can override."""

from __future__ import annotations

import argparse
import datetime
import difflib
import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, Optional

from transformers import HfArgumentParser

from ..configuration_nanovlm import PRESETS, VISION_FEATURE_SELECT_STRATEGIES
from ..errors import InputError, first_line, scrub
from ..files import read_yaml, validate
from ..variants import VARIANTS

PROGRAM = "nanovlm_hf.training"  # as usage and errors name it: `python -m` of it
SOURCES = (*VARIANTS, "captions")
OPTIMIZERS = ("adamw", "muon")
TEXT_FILES = (".txt", ".jsonl")
MUON_LEARNING_RATE = 3e-3
CONFIGS = Path(__file__).parent / "configs"  # `--config` finds these by name
MOST_CONFIG_BYTES = 2**16
MOST = 2**31 - 1  # a larger number is a typo, and would overflow somewhere


@dataclass(frozen=True)
class Bounds:
    """The range of a number; NaN is never in it.

    Attributes:
        low, high: the smallest and the largest value.
        above_low, below_high: exclude that value itself.
    """

    low: float
    high: float = MOST
    above_low: bool = False
    below_high: bool = False

    def problem(self, value: float) -> str | None:
        """Return what is wrong with a value, or None."""
        if value != value:
            return "is not a number"
        if self.below_high:
            return None if self.low <= value < self.high else f"is not from {self.low:g} to below {self.high:g}"
        if value < self.low:
            return f"is not above {self.low:g}" if self.above_low else f"is less than {self.low:g}"
        if value == self.low and self.above_low:
            return f"is not above {self.low:g}"
        return f"is more than {self.high:g}" if value > self.high else None


COUNT, NOT_NEGATIVE = Bounds(1), Bounds(0)
POSITIVE = Bounds(0, 1e6, above_low=True)
SHARE = Bounds(0, 1, below_high=True)


BOUNDS = {
    **dict.fromkeys(("n_blks", "n_layer", "n_head", "head_size", "img_embd_dim", "train_samples", "max_steps"), COUNT),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "eval_steps"), COUNT),
    **dict.fromkeys(("logging_steps", "save_steps", "save_total_limit"), COUNT),
    **dict.fromkeys(("warmup_steps", "early_stopping_patience"), NOT_NEGATIVE),
    **dict.fromkeys(("learning_rate", "num_train_epochs", "max_grad_norm", "vision_initializer_range"), POSITIVE),
    **dict.fromkeys(("dropout", "patch_dropout", "ema_decay", "muon_learning_rate"), SHARE),
    **dict.fromkeys(("visual_words_weight", "distillation_weight", "weight_decay"), Bounds(0, 1e6)),
    "image_dropout": Bounds(0, 1),
    "eval_samples": Bounds(2),  # each image is compared with another one
    "seed": Bounds(0, 2**32 - 1),
}


def _field(default: Any, help: str, choices: Iterable[str] | None = None) -> Any:
    """Return a field with its help; each run gets a list of its own."""
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:  # `HfArgumentParser` passes them on to argparse
        metadata = {"help": f"{help}: {', '.join(choices)}", "choices": list(choices)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# `Optional` and `Literal` rather than `|`: HfArgumentParser reads these annotations.
@dataclass
class RunArguments:
    """The fields of a run. Defaults follow the paper where it states them: lr 1e-3, dropout 0.1 (section 2.3)."""

    dataset: str = field(metadata={"help": "folder or Hub id of a dataset that `nanovlm data build` wrote"})
    output_dir: str = field(metadata={"help": "folder of the run"})
    variant: str = _field("short", "variant of the dataset", VARIANTS)
    texts: list[str] = _field(
        [],
        f"sources of the texts to learn: {', '.join(SOURCES)}, and files of texts without images (.txt, one a line; "
        ".jsonl with text or captions); the first is evaluated and must be the variant; default: the variant",
    )
    text_weights: list[float] = _field(
        [],
        "probability, 0 to 1, that an image comes with a text of each source, and number of texts of a file for each "
        "image; 1 by default; an image that would have no text gets one of the first source",
    )
    image_dropout: float = _field(
        0.0,
        "probability that the texts of an image are learned without it, after the embedding of <image>; 1 trains the "
        "decoder alone (beyond the paper)",
    )
    train_samples: Optional[int] = _field(None, "number of training images, those with the lowest hashes; default: all")

    preset: str = _field("mini", "model size (Table 1)", PRESETS)
    n_blks: Optional[int] = _field(None, "number of encoder blocks, instead of the preset's")
    n_layer: Optional[int] = _field(None, "number of decoder blocks, instead of the preset's")
    n_head: Optional[int] = _field(None, "number of attention heads, instead of the preset's")
    head_size: Optional[int] = _field(None, "size of a decoder head, instead of the preset's")
    img_embd_dim: Optional[int] = _field(None, "width of the encoder, instead of the preset's")
    vision_feature_select_strategy: str = _field(
        "cls", "which encoder outputs become image tokens; the paper uses cls", VISION_FEATURE_SELECT_STRATEGIES
    )
    vision_initializer_range: Optional[float] = _field(
        None, "standard deviation of the initial weights of encoder and projector; default: fan_in ** -0.5"
    )
    dropout: float = _field(0.1, "dropout on embeddings, residual branches and in the projector")
    patch_dropout: float = _field(
        0.0, "share of the patches that the encoder does not see in training (beyond the paper; needs cls)"
    )
    tokenizer: Optional[str] = _field(None, "folder of a tokenizer; default: the one of the package")
    init_from: Optional[str] = _field(None, "checkpoint with the initial weights")
    grow_from: Optional[str] = _field(
        None,
        "smaller checkpoint to initialise from (Net2Net); with init_from, the decoder comes from init_from and the "
        "vision encoder from grow_from",
    )

    visual_words_weight: float = _field(
        0.0,
        "weight of the bag-of-words loss: the image token predicts the captions' words (beyond the paper)",
    )
    teacher: list[str] = _field(
        [],
        "pretrained vision encoders whose features the encoder learns to predict (distillation, beyond the paper): "
        "efficientnet-lite0 to -lite2, a checkpoint, or a vision model of Transformers or timm",
    )
    distillation_weight: float = _field(1.0, "weight of the distillation loss")
    augment: bool = _field(False, "random crops and colours; mirrored unless a text says left or right")
    ema_decay: float = _field(0.0, "decay of the EMA of the weights; above 0, the EMA weights are evaluated and saved")
    num_train_epochs: float = _field(30.0, "passes over the images")
    max_steps: Optional[int] = _field(None, "optimizer steps, instead of num_train_epochs")
    streaming: bool = _field(
        False, "read and decode the train split during training, without a download first; needs max_steps"
    )
    early_stopping_patience: int = _field(
        0, "number of evaluations without a lower loss after which the run ends; 0: never"
    )
    per_device_train_batch_size: int = _field(32, "images of a micro-batch on each device")
    gradient_accumulation_steps: int = _field(1, "micro-batches of an optimizer step")
    optimizer: str = _field(
        "adamw", "optimizer; muon trains the hidden matrices with Muon, the rest with AdamW", OPTIMIZERS
    )
    learning_rate: float = _field(1e-3, "peak learning rate of AdamW")
    muon_learning_rate: Optional[float] = _field(
        None, f"peak learning rate of Muon; default with optimizer muon: {MUON_LEARNING_RATE:g}"
    )
    weight_decay: float = _field(0.1, "weight decay of matrices")
    warmup_steps: int = _field(200, "steps of linear warm-up before the cosine decay")
    max_grad_norm: float = _field(1.0, "norm to which gradients are clipped")
    mixed_precision: Literal["auto", "no", "bf16"] = _field(
        "auto", "autocast to bf16, or float32 (no); auto: bf16 where the device multiplies it in hardware"
    )
    compile: bool = _field(False, "compile encoder and decoder with torch.compile, which takes about a minute")
    activation_checkpointing: bool = _field(False, "recompute activations in the backward pass to save memory")

    eval_steps: int = _field(250, "steps between evaluations")
    eval_samples: int = _field(1000, "number of validation images")
    logging_steps: int = _field(25, "steps between lines of metrics.jsonl")
    save_steps: int = _field(250, "steps between states to resume from")
    save_total_limit: int = _field(1, "number of states to keep")
    trackers: list[str] = _field([], "Accelerate's trackers to log to as well, such as tensorboard or wandb")
    resume: Optional[str] = _field(
        None, "auto: resume from the last state in output_dir, if there is one; or the folder of a state"
    )
    overwrite: bool = _field(False, "remove the run in output_dir")
    seed: int = _field(0, "seed of weights, order, augmentation and dropout")

    def __post_init__(self) -> None:
        self.texts = self.texts or [self.variant]
        self.text_weights = self.text_weights or [1.0] * len(self.texts)
        for one in fields(self):
            value, choices = getattr(self, one.name), one.metadata.get("choices")
            if isinstance(value, str):
                _check_name(one.name, value)
                if choices is not None:
                    _check_choice(one.name, value, choices)
            elif value is not None and one.name in BOUNDS:
                problem = BOUNDS[one.name].problem(value)
                _check(problem is None, one.name, value, problem)
        for text in self.texts:
            if not text.endswith(TEXT_FILES):
                _check_choice("texts", text, SOURCES)
        _check(
            self.texts[0] == self.variant,
            "texts",
            self.texts[0],
            f"comes first, but the first source is evaluated and must be the variant: put {self.variant} first",
        )
        _check(len(set(self.texts)) == len(self.texts), "texts", self.texts, "names a source twice")
        _check(
            not self.patch_dropout or self.vision_feature_select_strategy == "cls",
            "patch_dropout",
            self.patch_dropout,
            f"needs vision_feature_select_strategy cls, not {self.vision_feature_select_strategy}",
        )
        _check(
            not (self.overwrite and self.resume),
            "overwrite",
            "true",
            f"removes the run of output_dir, so it cannot be used with resume {self.resume}: leave one of them out",
        )
        self._resolve_optimizer()
        if self.streaming:
            self._check_streaming()
        valid = len(self.text_weights) == len(self.texts) and all(0 <= weight <= 1 for weight in self.text_weights)
        _check(valid, "text_weights", self.text_weights, f"is not a list of {len(self.texts)} numbers from 0 to 1")
        learns = any(self.text_weights) or self.teacher or self.visual_words_weight
        _check(bool(learns), "text_weights", self.text_weights, "leaves nothing to learn: add a text or a teacher")

    @property
    def trains_encoder(self) -> bool:
        """Whether a loss depends on the images."""
        sees_texts = self.image_dropout < 1 and any(self.weights_of_images)
        return bool(sees_texts or self.teacher or self.visual_words_weight)

    @property
    def weights_of_images(self) -> list[float]:
        """`text_weights` of the sources with images."""
        return [weight for name, weight in zip(self.texts, self.text_weights, strict=True) if name in SOURCES]

    @property
    def weights_of_files(self) -> list[float]:
        """`text_weights` of the files of texts without images."""
        return [weight for name, weight in zip(self.texts, self.text_weights, strict=True) if name not in SOURCES]

    def _resolve_optimizer(self) -> None:
        """Give `muon_learning_rate` its value: 0 without Muon."""
        rate, with_muon = self.muon_learning_rate, self.optimizer == "muon"
        if rate is None:
            rate = MUON_LEARNING_RATE if with_muon else 0.0
        self.muon_learning_rate = rate
        _check(
            not with_muon or rate > 0, "muon_learning_rate", rate, "is not above 0: raise it, or set optimizer adamw"
        )
        _check(
            with_muon or not rate,
            "muon_learning_rate",
            rate,
            f"has no effect with optimizer {self.optimizer}: add --optimizer muon, or set it to 0",
        )

    def _check_streaming(self) -> None:
        if self.max_steps is None:
            raise InputError("max_steps: is required when streaming")
        if self.train_samples is not None:
            raise InputError("train_samples: cannot be combined with streaming")
        if self.teacher:
            raise InputError("teacher: cannot be combined with streaming: its features are computed before training")
        others = set(self.texts) - {self.variant, "captions"}
        _check(not others, "texts", self.texts, f"cannot be streamed: only {self.variant} and captions can")


def _check_name(name: str, value: str) -> None:
    try:
        possible = "\0" not in value and os.fsencode(value).strip()
    except UnicodeEncodeError:
        possible = False
    _check(bool(possible), name, repr(value), "is not a valid name")


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    known = list(choices)
    _check(value in known, name, repr(value), f"is not one of {', '.join(known)}{_did_you_mean(value, known)}")


def _check(valid: bool, name: str, value: object, problem: str | None) -> None:
    if not valid:
        raise InputError(f"{name}: {scrub(str(value), 80)} {problem}")


NAMES = [one.name for one in fields(RunArguments)]


def read_arguments(argv: list[str]) -> RunArguments:
    """Read `--config` (a YAML file or the name of a packaged one) and the fields after it, which override it.

    Raises:
        InputError: for a file that is missing or not YAML, an unknown field, and a value out of range.
    """
    config, argv = _split_config(list(argv))
    from_file = {} if config is None else _read_config(config)
    # Values of the file pass through the parser of the command line, and so through the same checks.
    options = [option for values in from_file.values() for option in values]
    try:
        arguments, unknown = _parser().parse_args_into_dataclasses(
            options + argv, return_remaining_strings=True, look_for_args_file=False
        )
    except InputError as error:
        name = str(error).split(":")[0]
        given = any(option.split("=")[0].replace("-", "_") == f"__{name}" for option in argv)
        raise InputError(f"{config}: {error}" if name in from_file and not given else str(error)) from None
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0]
        raise InputError(f"there is no field {scrub(name, 80)!r}{_did_you_mean(name, NAMES)}")
    return arguments


def arguments_of(recorded: dict[str, Any], where: Path, **changes: Any) -> RunArguments:
    """Return the fields of a recorded run, without those of other versions, and with some changed.

    Args:
        recorded: `arguments` of a record. In one from before the field `optimizer`, `muon_learning_rate` selects Muon
            if it is above 0.
        where: file that errors name.

    Raises:
        InputError: for a value out of range.
    """
    recorded = {"optimizer": "muon" if recorded.get("muon_learning_rate") else "adamw"} | recorded
    given = {name: value for name, value in (recorded | changes).items() if name in NAMES}
    # HfArgumentParser strips `Optional` from the types of the fields; None means unset anyway.
    return validate({name: value for name, value in given.items() if value is not None}, RunArguments, where)


def _split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _refuse
    parser.add_argument("--config", action="append", default=[])
    found, rest = parser.parse_known_args(argv)
    if len(found.config) > 1:
        raise InputError("--config: given twice: name one YAML file")
    return (_config_file(found.config[0]) if found.config else None), rest


def _config_file(name: str) -> str:
    """Return the path of a configuration, which is a file or the name of a packaged one; the file takes precedence."""
    packaged = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    if os.path.exists(name) or os.path.splitext(name)[1] or os.path.basename(name) != name:
        return name
    if name not in packaged:
        near = _did_you_mean(name, packaged)
        raise InputError(f"--config: {scrub(name, 80)} is neither a file nor a packaged configuration{near}")
    return str(CONFIGS / f"{name}.yaml")


@functools.cache
def _parser() -> HfArgumentParser:
    parser = HfArgumentParser(RunArguments, prog=PROGRAM, allow_abbrev=False)
    parser.error = _refuse
    return parser


def _refuse(message: str) -> NoReturn:
    # The parser names both spellings of a field: "argument --eval_steps/--eval-steps: ...".
    raise InputError(scrub(re.sub(r"^argument --(\w+)(/--[\w-]+)?", r"\1", message)))


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name[:80], list(known), n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def _read_config(path: str) -> dict[str, list[str]]:
    """Return the command-line options of each field in a YAML file."""
    content = read_yaml(path, MOST_CONFIG_BYTES, as_text=True)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of field names to values")
    options = {}
    for key, value in content.items():
        if key not in NAMES:
            raise InputError(f"{path}: there is no field {scrub(str(key), 80)!r}{_did_you_mean(str(key), NAMES)}")
        if isinstance(value, list):
            values = [_plain(path, key, one) for one in value]
            if key not in ("texts", "text_weights", "teacher", "trackers"):
                raise InputError(f"{path}: {key}: takes one value, not a list")
            if any(one.startswith("-") for one in values):  # which the parser would read as an option
                raise InputError(f"{path}: {key}: values must not begin with '-': {scrub(', '.join(values), 80)}")
            options[key] = [f"--{key}", *values] if values else []
        elif value is not None:
            options[key] = [f"--{key}={_plain(path, key, value)}"]
    return options


def _plain(path: str, key: str, value: Any) -> str:
    """Return a value as it is written in the file; the parser of the field's type reads it."""
    if not isinstance(value, (str, int, float, datetime.date)):  # others than texts have an explicit tag
        raise InputError(f"{path}: {key}: expected a number or a text")
    try:
        text = str(value)
    except ValueError as error:  # an integer with thousands of digits
        raise InputError(f"{path}: {key}: {first_line(error)}") from None
    if key in (*BOUNDS, "text_weights") and re.fullmatch(r"[-+]?\.(inf|nan)", text.lower()):
        return text.replace(".", "")  # as Python spells it
    switches = {"on": "true", "off": "false"} if isinstance(getattr(RunArguments, key, None), bool) else {}
    return switches.get(text.lower(), text)  # YAML's other names of booleans
