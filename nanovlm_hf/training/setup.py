"""Load and check what a run needs before its first step: images, texts, model and processor."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, Image
from transformers import AutoTokenizer, GenerationConfig

from ..checkpoints import SHIPPED
from ..configuration_nanovlm import PRESETS, NanoVLMConfig
from ..data.rows import load
from ..data.splits import lowest_hashes
from ..errors import InputError, first_line
from ..image_processing_nanovlm import SETTINGS as IMAGE_SETTINGS
from ..image_processing_nanovlm import NanoVLMImageProcessor
from ..loading import load_config, load_model
from ..modeling_nanovlm import NanoVLMForConditionalGeneration
from ..processing_nanovlm import NanoVLMProcessor
from ..variants import VARIANTS
from .arguments import TEXT_FILES, RunArguments
from .distillation import teacher_features
from .growth import grow, grow_vision_encoder
from .image_store import decode_once
from .streaming import StreamedSplit, open_stream, stored_rows
from .text_files import TextFile
from .texts import TokenizedTexts

# Graded best of the settings that were compared (EXPERIMENTS.md).
GENERATION = {
    **{"max_new_tokens": 96, "do_sample": False, "num_beams": 4, "no_repeat_ngram_size": 3},
    "repetition_penalty": 1.2,
}
MOST_PARAMETERS = 1_000_000_000  # 40 times large: more is a typing error
# Fields of a config that change neither the weights nor what the model computes from them.
NO_MEANING = {"self", "kwargs", "vision_config", "text_config", "hidden_dropout", "attention_dropout", "patch_dropout"}
NO_MEANING |= {"initializer_range", "use_cache"}
SIZES = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vision_feature_select_strategy"}
PAPERS_NAMES = ("n_blks", "n_layer", "n_head", "head_size", "img_embd_dim")


@dataclass
class Split:
    """One split, ready for training.

    Attributes:
        images: uint8 (rows, height, width, 3), memory-mapped.
        texts: the texts of the same rows.
        image_ids: the ids of the same rows.
        files: texts without images.
        teacher_features: (rows, F), what the encoder learns to predict, or None.
    """

    images: np.ndarray
    texts: TokenizedTexts
    image_ids: list[int]
    files: list[TextFile] = field(default_factory=list)
    teacher_features: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, Any]:
        """Return the number of images, and a hash of their ids and of every text to learn, in their order."""
        digest = hashlib.sha256(np.asarray(self.image_ids, dtype=np.int64).tobytes())
        for name, texts_of_images in self.texts.ids.items():
            digest.update(name.encode())
            for texts in texts_of_images:
                for ids in texts:
                    digest.update(ids.tobytes())
        files = {"files": {file.path.name: file.sha256() for file in self.files}} if self.files else {}
        return {"photos": len(self), "sha256": digest.hexdigest()[:16], **files}


class Splits(TypedDict):
    """The data of a run. The training split may be a stream."""

    train: Split | StreamedSplit
    validation: Split


def load_splits(arguments: RunArguments, processor: NanoVLMProcessor, device: torch.device | str = "cpu") -> Splits:
    """Load the train and validation splits; validation has the first source only, and is never streamed.

    Args:
        device: where teachers compute their features.

    Raises:
        InputError: for a dataset that cannot be loaded or lacks a split or column, for images that do not decode, and
            for a text file or teacher that cannot be used.
    """
    if arguments.streaming:
        return _open_streams(arguments, processor)
    paths = [name for name in arguments.texts if name.endswith(TEXT_FILES)]
    image_tokens = [processor.image_token_id] * processor.image_seq_length
    files = [TextFile(path, processor.tokenizer, image_tokens) for path in paths]
    datasets = {name: load_checked(arguments.dataset, name) for name in dict.fromkeys(_configs(arguments))}
    loaded: dict[str, Split] = {}
    for split in ("train", "validation"):
        rows = datasets[arguments.variant][split]
        sources = [name for name in arguments.texts if name not in paths] if split == "train" else arguments.texts[:1]
        if split == "train" and arguments.train_samples is not None:
            rows = _lowest_hashes(rows, arguments.train_samples)
        if split == "validation":  # in random order, so that the first ones represent all
            rows = _lowest_hashes(rows, min(arguments.eval_samples, len(rows)))
        images, rows = decode_once(rows, processor.image_processor)
        texts = {name: _texts_of(name, arguments.variant, rows, datasets, split) for name in sources}
        loaded[split] = _split(images, texts, rows, processor)
    train = loaded["train"]
    train.files = files
    if arguments.teacher:
        train.teacher_features = teacher_features(arguments.teacher, train.images, device)
    return {"train": train, "validation": loaded["validation"]}


def _open_streams(arguments: RunArguments, processor: NanoVLMProcessor) -> Splits:
    try:
        train, validation = (open_stream(arguments.dataset, arguments.variant, s) for s in ("train", "validation"))
        rows = stored_rows(validation, arguments.eval_samples)
    except Exception as error:  # as in `load_checked`
        raise InputError(
            f"dataset: {arguments.dataset} ({arguments.variant}) cannot be read as a stream: {first_line(error)}"
        ) from None
    _refuse_columns(arguments.dataset, train.rows.column_names, train.rows.features)
    images, rows = decode_once(rows, processor.image_processor)
    texts = {arguments.variant: [[description] for description in rows["description"]]}
    return {"train": train, "validation": _split(images, texts, rows, processor)}


def _split(images: np.ndarray, texts: dict[str, list[list[str]]], rows: Dataset, processor: NanoVLMProcessor) -> Split:
    image_ids = list(rows["image_id"])
    if not all(isinstance(one, int) and abs(one) < 2**63 for one in image_ids):
        raise InputError("dataset: the column image_id has an empty or too large number: number the images")
    tokenized = TokenizedTexts(texts, list(rows["captions"]), processor, image_ids)
    tokenized.report_truncated()
    return Split(images, tokenized, image_ids)


def _configs(arguments: RunArguments) -> list[str]:
    return [arguments.variant, *(name for name in arguments.texts if name in VARIANTS)]


def load_checked(name: str, variant: str) -> DatasetDict:
    """Load a dataset that `nanovlm data build` wrote.

    Raises:
        InputError: if it cannot be loaded, or lacks a split, a column or images.
    """
    dataset = load(name, variant, where=f"dataset: {name} ({variant})")
    for split in ("train", "validation"):
        if split not in dataset or len(dataset[split]) < 2:
            raise InputError(f"dataset: {name} ({variant}) has no {split} split of two images or more")
        _refuse_columns(name, dataset[split].column_names, dataset[split].features)
    return dataset


def _refuse_columns(name: str, columns: list[str], features: Features | None) -> None:
    missing = [one for one in ("image", "image_id", "captions", "description") if one not in columns]
    if missing:
        remedy = ": add the images with `nanovlm data join`" if missing[0] == "image" else ""
        raise InputError(f"dataset: {name} has no column {missing[0]!r}, but {', '.join(columns)}{remedy}")
    features = features or {}  # a stream may not know them
    if not isinstance(features.get("image", Image()), Image):
        raise InputError(f"dataset: {name}: the column image does not hold images: build it with `nanovlm data build`")
    if "image_id" in features and not getattr(features["image_id"], "dtype", "").startswith(("int", "uint")):
        raise InputError(f"dataset: {name}: the column image_id does not hold integers: number the images")


def _lowest_hashes(rows: Dataset, count: int) -> Dataset:
    """Return the images with the lowest hashes: a larger number of them includes every smaller one."""
    if count > len(rows):
        raise InputError(f"train_samples: {count} images, but the train split has {len(rows)}")
    return rows.select(lowest_hashes(rows["image_id"], count))


def _texts_of(name: str, variant: str, rows: Dataset, datasets: dict[str, Any], split: str) -> list[list[str]]:
    """Return the texts of a source for each image; none for an image that the source does not have."""
    if name == "captions":
        return list(rows["captions"])
    if name == variant:
        return [[description] for description in rows["description"]]
    others = datasets[name][split]
    known = dict(zip(others["image_id"], others["description"], strict=True))
    return [[known[image_id]] if image_id in known else [] for image_id in rows["image_id"]]


def model_and_processor(arguments: RunArguments) -> tuple[NanoVLMForConditionalGeneration, NanoVLMProcessor]:
    """Return the model to train and its processor: random weights, those of `init_from`, `grow_from`, or of both.

    Raises:
        InputError: for a checkpoint or tokenizer that is missing or does not fit, and for invalid sizes.
    """
    init_folder, grow_folder = (_checkpoint(name, getattr(arguments, name)) for name in ("init_from", "grow_from"))
    folder = init_folder or grow_folder
    tokenizer = tokenizer_in(arguments.tokenizer or folder or SHIPPED["mini-short"])
    if folder and arguments.tokenizer and tokenizer.get_vocab() != tokenizer_in(folder).get_vocab():
        raise InputError(f"tokenizer: {arguments.tokenizer} is not the tokenizer of {folder}: leave it out")
    try:
        config = model_config(arguments, len(tokenizer))
    except ValueError as error:
        raise InputError(f"n_head, head_size, img_embd_dim: {error}") from None
    parameters = config.parameter_counts()["total"]
    if parameters > MOST_PARAMETERS:
        raise InputError(f"n_blks, n_layer, n_head, head_size, img_embd_dim: {parameters:,} parameters are too many")
    model = NanoVLMForConditionalGeneration(config)
    image_processor = NanoVLMImageProcessor()
    if folder is not None:
        _refuse_other_vocabulary(folder, load_config(str(folder)), len(tokenizer))
        initial, image_processor = _load_checkpoint("init_from" if init_folder else "grow_from", folder, config)
        if init_folder is None:
            grow(model, initial)
        else:
            _refuse_other_model(folder, initial.config, config)
            if grow_folder is None:
                model.load_state_dict(initial.state_dict())
            else:
                encoder, others = _load_checkpoint("grow_from", grow_folder, config)
                if image_settings(others) != image_settings(image_processor):
                    raise InputError(f"grow_from: {grow_folder} prepares images differently from {init_folder}")
                model.model.language_model.load_state_dict(initial.model.language_model.state_dict())
                grow_vision_encoder(model, encoder)
    model.generation_config = generation_config(config)
    return model, NanoVLMProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)


def _load_checkpoint(
    field: str, folder: str | Path, config: NanoVLMConfig
) -> tuple[NanoVLMForConditionalGeneration, NanoVLMImageProcessor]:
    """Load a checkpoint in float32 and its image processor, which has to make images for the model of the run."""
    try:
        model, processor = load_model(str(folder))
    except InputError as error:
        raise InputError(f"{field}: {error}") from None
    images = processor.image_processor
    side = config.vision_config.image_size
    if images.size != {"height": side, "width": side}:
        raise InputError(
            f"{field}: {folder} makes images of {dict(images.size)}, this run's model takes {side} x {side}"
        )
    if not (images.do_resize and images.do_rescale and images.do_normalize):
        raise InputError(f"{field}: {folder} does not resize, rescale and normalise its images, as training does")
    return model.to("cpu", torch.float32), images


def image_settings(image_processor: NanoVLMImageProcessor) -> dict[str, Any]:
    """Return the settings that determine `pixel_values`."""
    return {name: getattr(image_processor, name) for name in IMAGE_SETTINGS}


def generation_config(config: NanoVLMConfig) -> GenerationConfig:
    """Return the default generation settings of a trained model."""
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**special, **GENERATION, suppress_tokens=[config.image_token_id])


def model_config(arguments: RunArguments, vocab_size: int) -> NanoVLMConfig:
    """Return the config of the preset, with the sizes that the run sets itself."""
    own = {name: value for name in PAPERS_NAMES if (value := getattr(arguments, name)) is not None}
    sizes = PRESETS[arguments.preset] | own
    return NanoVLMConfig.from_paper(
        **sizes | {"n_embd": sizes["n_head"] * sizes["head_size"]},
        dropout=arguments.dropout,
        vocab_size=vocab_size,
        vision_feature_select_strategy=arguments.vision_feature_select_strategy,
        vision_config={
            "initializer_range": arguments.vision_initializer_range,
            "patch_dropout": arguments.patch_dropout,
        },
    )


def tokenizer_in(folder: str | Path) -> Any:
    """Load a tokenizer that `nanovlm data tokenizer` trained.

    Raises:
        InputError: if there is none, or the ids of its special tokens differ.
    """
    if not (Path(folder) / "tokenizer.json").exists():
        raise InputError(f"tokenizer: there is no tokenizer.json in {folder}: make one with `nanovlm data tokenizer`")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Transformers and tokenizers raise errors of many kinds
        raise InputError(f"tokenizer: {folder} cannot be loaded: {first_line(error)}") from None
    ids = tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>", "<image>"])
    if ids != [0, 1, 2, 3] or (tokenizer.pad_token_id, tokenizer.eos_token_id) != (0, 2):
        raise InputError(
            f"tokenizer: {folder} has <pad>, <bos>, <eos> and <image> at {ids}, not 0 to 3: make one with "
            "`nanovlm data tokenizer`"
        )
    return tokenizer


def _checkpoint(field: str, name: str | None) -> str | Path | None:
    """Return the folder of a checkpoint to initialise from, which may be the short name of a released one."""
    folder = SHIPPED.get(name, name)
    if folder is not None and not (Path(folder) / "config.json").exists():
        raise InputError(f"{field}: there is no checkpoint in {folder}")
    return folder


def _refuse_other_vocabulary(folder: str | Path, config: NanoVLMConfig, tokens: int) -> None:
    if config.text_config.vocab_size != tokens:
        raise InputError(
            f"{folder} has {config.text_config.vocab_size} tokens in its model and {tokens} in its tokenizer"
        )


def _refuse_other_model(folder: str | Path, found: NanoVLMConfig, wanted: NanoVLMConfig) -> None:
    different = differences(found, wanted)
    if not different:
        return
    name, found_value, wanted_value = different[0]
    if {one.rsplit(".")[-1] for one, _, _ in different} & SIZES:
        raise InputError(
            f"init_from: {folder} has other sizes than this run: set the same sizes, or use grow_from "
            f"({name} is {found_value!r}, this run's is {wanted_value!r})"
        )
    raise InputError(
        f"init_from: {folder} is of another kind than this run trains: its {name} is {found_value!r}, this run's is "
        f"{wanted_value!r}"
    )


def differences(one: NanoVLMConfig, other: NanoVLMConfig) -> list[tuple[str, Any, Any]]:
    """Return name and both values of each field that differs and changes what a model computes from its weights."""
    pairs = [("", one, other)]
    pairs += [(f"{part}.", getattr(one, part), getattr(other, part)) for part in ("vision_config", "text_config")]
    found = []
    for part, first, second in pairs:
        for name in inspect.signature(type(first).__init__).parameters:
            if name in NO_MEANING or not hasattr(first, name):
                continue
            values = getattr(first, name), getattr(second, name)
            if values[0] != values[1]:
                found.append((f"{part}{name}", *values))
    return found
