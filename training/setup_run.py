"""What a run needs before its first step: photos, texts, model and processor, each checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import TrainingArguments
from datasets import Dataset, load_dataset
from growing import grow, grow_eyes
from photo_store import decode_once
from streaming import StreamedSplit, open_stream, stored_rows
from texts import TokenizedTexts
from transformers import AutoTokenizer, GenerationConfig

from nanovlm_hf import (
    InputError,
    NanoVLMConfig,
    NanoVLMForConditionalGeneration,
    NanoVLMImageProcessor,
    NanoVLMProcessor,
)
from nanovlm_hf.checkpoints import SHIPPED
from nanovlm_hf.configuration_nanovlm import PRESETS
from nanovlm_hf.data.splits import lowest_hashes
from nanovlm_hf.errors import first_line

# Of ways of decoding on validation photos (training/decoding.py, EXPERIMENTS.md) it ends the loops at the least cost.
GENERATION = {"max_new_tokens": 96, "do_sample": False, "repetition_penalty": 1.2}
PAPERS_NAMES = ("n_blks", "n_layer", "n_head", "head_size", "img_embd_dim")


@dataclass
class Split:
    """One split, ready for training.

    Attributes:
        photos: uint8 (rows, height, width, 3), mapped from disk.
        texts: of the same rows.
        image_ids: of the same rows.
    """

    photos: np.ndarray
    texts: TokenizedTexts
    image_ids: list[int]

    def __len__(self) -> int:
        return len(self.photos)

    def identity(self) -> dict[str, Any]:
        """The number of photos, and a hash of their ids and of every text that is learned, in their order."""
        digest = hashlib.sha256(np.asarray(self.image_ids, dtype=np.int64).tobytes())
        for name, photos in self.texts.ids.items():
            digest.update(name.encode())
            for texts in photos:
                for ids in texts:
                    digest.update(ids.tobytes())
        return {"photos": len(self), "sha256": digest.hexdigest()[:16]}


def load_splits(arguments: TrainingArguments, processor: NanoVLMProcessor) -> dict[str, Split | StreamedSplit]:
    """The train and validation splits; of validation, the judged source alone, and always at hand.

    Raises:
        InputError: for a dataset that cannot be loaded or lacks a split or column, and for photos that do not decode.
    """
    if arguments.streaming:
        return _open_streams(arguments, processor)
    datasets = {name: _load(arguments.dataset, name) for name in dict.fromkeys(_configs(arguments))}
    splits: dict[str, Split | StreamedSplit] = {}
    for split in ("train", "validation"):
        rows = datasets[arguments.variant][split]
        sources = arguments.texts if split == "train" else arguments.texts[:1]
        if split == "train" and arguments.train_samples is not None:
            rows = _lowest_hashes(rows, arguments.train_samples)
        if split == "validation":  # in an order that is by chance, so that the first ones stand for all
            rows = _lowest_hashes(rows, min(arguments.eval_samples, len(rows)))
        photos, rows = decode_once(rows, processor.image_processor)
        texts = {name: _texts_of(name, arguments.variant, rows, datasets, split) for name in sources}
        splits[split] = Split(photos, TokenizedTexts(texts, rows["captions"], processor), rows["image_id"])
    return splits


def _open_streams(arguments: TrainingArguments, processor: NanoVLMProcessor) -> dict[str, Split | StreamedSplit]:
    try:
        train, validation = (open_stream(arguments.dataset, arguments.variant, s) for s in ("train", "validation"))
        rows = stored_rows(validation, arguments.eval_samples)
    except Exception as error:  # as in `_load`
        raise InputError(
            f"dataset: {arguments.dataset} ({arguments.variant}) cannot be read as a stream: {first_line(error)}"
        ) from None
    _refuse_columns(arguments.dataset, train.rows.column_names)
    photos, rows = decode_once(rows, processor.image_processor)
    texts = {arguments.variant: [[description] for description in rows["description"]]}
    return {
        "train": train,
        "validation": Split(photos, TokenizedTexts(texts, rows["captions"], processor), rows["image_id"]),
    }


def _configs(arguments: TrainingArguments) -> list[str]:
    return [arguments.variant, *(name for name in arguments.texts if name != "captions")]


def _load(name: str, variant: str) -> Any:
    try:
        dataset = load_dataset(name, variant)
    except Exception as error:  # `datasets` raises many kinds for the one mistake of naming no dataset
        raise InputError(f"dataset: {name} ({variant}) cannot be loaded: {first_line(error)}") from None
    for split in ("train", "validation"):
        if split not in dataset or len(dataset[split]) < 2:
            raise InputError(f"dataset: {name} ({variant}) has no {split} split of two photos or more")
    _refuse_columns(name, dataset["train"].column_names)
    return dataset


def _refuse_columns(name: str, columns: list[str]) -> None:
    missing = [one for one in ("image", "image_id", "captions", "description") if one not in columns]
    if missing:
        mend = ": put the photos back with `nanovlm data join`" if missing[0] == "image" else ""
        raise InputError(f"dataset: {name} has no column {missing[0]!r}, but {', '.join(columns)}{mend}")


def _lowest_hashes(rows: Dataset, count: int) -> Dataset:
    """The photos of the lowest hashes: the same whatever else is there, and more of them hold those of fewer."""
    if count > len(rows):
        raise InputError(f"train_samples: {count} photos, but the train split has {len(rows)}")
    return rows.select(lowest_hashes(rows["image_id"], count))


def _texts_of(name: str, variant: str, rows: Dataset, datasets: dict[str, Any], split: str) -> list[list[str]]:
    """The texts of a source for each photo; none for a photo that this source does not have."""
    if name == "captions":
        return [list(captions) for captions in rows["captions"]]
    if name == variant:
        return [[description] for description in rows["description"]]
    others = datasets[name][split]
    known = dict(zip(others["image_id"], others["description"], strict=True))
    return [[known[image_id]] if image_id in known else [] for image_id in rows["image_id"]]


def model_and_processor(arguments: TrainingArguments) -> tuple[NanoVLMForConditionalGeneration, NanoVLMProcessor]:
    """The model to train: of the preset, of a checkpoint, grown from one, or the decoder of one with another's eyes.

    Raises:
        InputError: for a checkpoint or tokenizer that is not there or does not fit, and for impossible sizes.
    """
    begun_from, grown_from = (_checkpoint(name, getattr(arguments, name)) for name in ("init_from", "grow_from"))
    folder = begun_from or grown_from
    tokenizer = _tokenizer(arguments.tokenizer or folder or SHIPPED["mini-short"])
    image_processor = NanoVLMImageProcessor() if folder is None else NanoVLMImageProcessor.from_pretrained(folder)
    if folder and arguments.tokenizer and tokenizer.get_vocab() != _tokenizer(folder).get_vocab():
        raise InputError(
            f"tokenizer: {arguments.tokenizer} is not the one that {folder} was trained with: leave it out"
        )
    try:
        config = model_config(arguments, len(tokenizer))
        model = NanoVLMForConditionalGeneration(config)
    except ValueError as error:
        raise InputError(f"n_head, head_size, img_embd_dim: {error}") from None
    if folder is not None:
        begun = NanoVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        _refuse_other_vocabulary(folder, begun.config, len(tokenizer))
        if begun_from is None:
            grow(model, begun)
        elif sizes(begun) != sizes(model):
            raise InputError(f"init_from: {folder} is of other sizes than this run's: give those, or see grow_from")
        elif grown_from is None:
            model.load_state_dict(begun.state_dict())
        else:
            model.model.language_model.load_state_dict(begun.model.language_model.state_dict())
            grow_eyes(model, NanoVLMForConditionalGeneration.from_pretrained(grown_from, dtype=torch.float32))
    model.generation_config = generation_config(config)
    return model, NanoVLMProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)


def generation_config(config: NanoVLMConfig) -> GenerationConfig:
    """How a trained model generates if nobody says otherwise."""
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**special, **GENERATION, suppress_tokens=[config.image_token_id])


def model_config(arguments: TrainingArguments, vocab_size: int) -> NanoVLMConfig:
    """The config of a preset with the sizes that were given instead of its own."""
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


def _tokenizer(folder: str | Path) -> Any:
    if not (Path(folder) / "tokenizer.json").exists():
        raise InputError(f"tokenizer: there is no tokenizer.json in {folder}: make one with `nanovlm data tokenizer`")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>", "<image>"])
    if ids != [0, 1, 2, 3]:
        raise InputError(
            f"tokenizer: {folder} has <pad>, <bos>, <eos> and <image> at {ids}, not 0 to 3: make one with "
            "`nanovlm data tokenizer`"
        )
    return tokenizer


def _checkpoint(field: str, name: str | None) -> str | Path | None:
    """The folder of a checkpoint that a run begins from: of one that ships by its short name."""
    folder = SHIPPED.get(name, name)
    if folder is not None and not (Path(folder) / "config.json").exists():
        raise InputError(f"{field}: there is no checkpoint in {folder}")
    return folder


def _refuse_other_vocabulary(folder: str | Path, config: NanoVLMConfig, tokens: int) -> None:
    if config.text_config.vocab_size != tokens:
        raise InputError(f"{folder} has a model of {config.text_config.vocab_size} entries and a tokenizer of {tokens}")


def sizes(model: NanoVLMForConditionalGeneration) -> tuple[Any, ...]:
    """All that two models share if one can take every weight of the other and means the same by it."""
    config = model.config
    heads = [one.num_attention_heads for one in (config.vision_config, config.text_config)]
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    return config.vision_feature_select_strategy, heads, shapes
