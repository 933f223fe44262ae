"""Train the tokenizer: byte-level BPE on descriptions, which encodes any text without loss."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..configuration_nanovlm import TEXT_POSITIONS
from ..errors import InputError
from .rows import check_columns, configs_of, load, readable

VOCAB_SIZE = 5120
# Their ids 0 to 3 follow from this order; the model configurations refer to them.
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<image>")


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (its size is beyond the paper).

    The tokenizer pads on the left for generation; `NanoVLMProcessor` pads training batches on the right.

    Args:
        texts: texts to train on.
        vocab_size: number of entries, special tokens included.

    Raises:
        InputError: if there are too few texts for `vocab_size` entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise InputError(
            f"the texts give {tokenizer.get_vocab_size()} entries, vocab_size is {vocab_size}: "
            "give more texts or a smaller vocab_size"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=TEXT_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    )


def train_tokenizer_on(dataset: str, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a tokenizer as `train_tokenizer` does, on the descriptions of every config's train split.

    Args:
        dataset: folder or Hub id of a dataset written by `nanovlm data build`.
        vocab_size: number of entries, special tokens included.

    Raises:
        InputError: if the dataset cannot be loaded or has too few texts.
    """
    splits = [load(dataset, name, split="train") for name in configs_of(dataset)]
    for split in splits:
        check_columns(split, dataset, ["description"])
    with readable(dataset):
        return train_tokenizer((text for split in splits for text in split["description"]), vocab_size)
