"""Compare decoding methods: `python -m nanovlm_hf.evaluation.decoding mini-short --dataset data`.

For each method, print the share of texts that repeat a sequence of three words, the mean number of words, the share of
texts that end, and object precision and recall, on validation images. The last line is of the dataset's descriptions.
"""

from __future__ import annotations

import argparse

from ..data.splits import lowest_hashes
from ..errors import InputError, one_line_errors
from ..loading import load_model
from ..variants import VARIANTS
from .coherence import repeats
from .items import load_rows, open_image
from .object_hallucination import object_precision_recall

BATCH_SIZE = 32
PLAIN = {
    "do_sample": False,
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "max_new_tokens": 128,
}
METHODS: dict[str, dict[str, float]] = {
    "greedy": {},
    "greedy, no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "greedy, repetition_penalty 1.1": {"repetition_penalty": 1.1},
    "greedy, repetition_penalty 1.2": {"repetition_penalty": 1.2},
    "greedy, repetition_penalty 1.3": {"repetition_penalty": 1.3},
    "4 beams": {"num_beams": 4},
    "4 beams, no_repeat_ngram_size 3": {"num_beams": 4, "no_repeat_ngram_size": 3},
    "4 beams, no_repeat_ngram_size 4": {"num_beams": 4, "no_repeat_ngram_size": 4},
    "4 beams, repetition_penalty 1.2": {"num_beams": 4, "repetition_penalty": 1.2},
    "4 beams, both": {"num_beams": 4, "no_repeat_ngram_size": 3, "repetition_penalty": 1.2},
}


def positive(text: str) -> int:
    """Parse a positive integer for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def compare(name: str, dataset: str, variant: str, count: int) -> None:
    """Print the table of a model.

    Raises:
        InputError: if the model or dataset cannot be used.
    """
    model, processor = load_model(name)
    rows = load_rows(dataset, variant, "validation")
    if "captions" not in rows.column_names:
        raise InputError(f"--dataset {dataset}: there is no column 'captions', which object precision needs")
    rows = rows.select(lowest_hashes(rows["image_id"], count))
    images, captions = [open_image(row) for row in rows], [list(one or ()) for one in rows["captions"]]
    print(f"{'decoding':<34} {'repeats':>8} {'words':>6} {'ends':>6} {'precision':>10} {'recall':>7}")

    def show(name: str, texts: list[str], ended: int) -> None:
        objects = object_precision_recall(texts, [""] * len(texts), captions)
        words = sum(len(text.split()) for text in texts) / len(texts)
        shares = (sum(map(repeats, texts)) / len(texts), ended / len(texts))
        precision, recall = (_percent(objects[kind]["mean"]) for kind in ("precision", "recall"))
        print(
            f"{name:<34} {shares[0]:>8.1%} {words:>6.1f} {shares[1]:>6.1%} {precision:>10} {recall:>7}",
            flush=True,
        )

    for name, settings in METHODS.items():
        texts, ended = [], 0
        for start in range(0, len(images), BATCH_SIZE):
            inputs = processor(images=images[start : start + BATCH_SIZE], return_tensors="pt").to(model.device)
            tokens = model.generate(**inputs, **(PLAIN | settings))
            texts += processor.batch_decode(tokens, skip_special_tokens=True)
            ended += int((tokens == processor.tokenizer.eos_token_id).any(1).sum())
        show(name, texts, ended)
    show("the descriptions", list(rows["description"]), len(rows))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare decoding methods on validation images.")
    parser.add_argument("model", help="short name or directory of a checkpoint")
    parser.add_argument("--dataset", required=True, help="directory or Hub id of a dataset")
    parser.add_argument("--variant", choices=VARIANTS, default="short")
    parser.add_argument("--images", "--photos", type=positive, default=256, help="number of images")
    arguments = parser.parse_args()
    with one_line_errors("decoding"):
        compare(arguments.model, arguments.dataset, arguments.variant, arguments.images)


if __name__ == "__main__":
    main()
