"""Training the tokenizer: byte-level BPE on descriptions, so that any text comes back exactly."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..configuration_nanovlm import TEXT_POSITIONS
from ..errors import InputError, first_line

VOCAB_SIZE = 5120
# Their order gives the ids 0 to 3 that the configs name.
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<image>")


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of `vocab_size` entries, special tokens included (its size is beyond the paper).

    It pads on the left, as generation needs it; `NanoVLMProcessor` pads training batches on the right.

    Raises:
        InputError: if the texts are too few for so many entries.
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
    """As `train_tokenizer`, on the descriptions of every config's train split.

    Args:
        dataset: folder or Hub id of a dataset that `nanovlm data build` wrote.

    Raises:
        InputError: if it cannot be loaded or has too few texts.
    """
    from datasets import get_dataset_config_names, load_dataset

    try:
        splits = [load_dataset(dataset, name, split="train") for name in get_dataset_config_names(dataset)]
    except Exception as error:  # `datasets` raises many kinds for the one mistake of naming no dataset
        raise InputError(f"{dataset}: cannot be loaded as a dataset: {first_line(error)}") from None
    return train_tokenizer((text for split in splits for text in split["description"]), vocab_size)
