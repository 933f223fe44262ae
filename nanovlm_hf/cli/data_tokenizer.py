"""`nanovlm data tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError, first_line
from . import options


def tokenizer(
    dataset: Annotated[str, typer.Option(help="Dataset written by `nanovlm data build`, as a local folder or Hub id.")],
    out: Annotated[Path, typer.Option(callback=options.output_folder, help="Output folder.")],
    vocab_size: Annotated[
        int, typer.Option(min=261, max=1_000_000, help="Number of entries, including special tokens.")
    ] = 5120,
) -> None:
    """Train a byte-level BPE tokenizer on the descriptions of the train split."""
    from ..compat_nanovlm import make_tokenizer_portable
    from ..data.tokenizer import train_tokenizer_on

    trained = train_tokenizer_on(dataset, vocab_size)
    try:
        trained.save_pretrained(out)
        make_tokenizer_portable(out)
    except Exception as error:  # `tokenizers` raises plain exceptions, for instance for a full disk
        raise InputError(f"{out}: cannot be written ({first_line(error)})") from None
    print(f"{out}: {len(trained)} entries")
