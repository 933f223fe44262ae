"""What each way of decoding does to texts: `python training/decoding.py mini-short --dataset data`, or a folder.

Prints, for validation photos, the share of texts in which three words in a row come again, the mean number of words,
the share of texts that end, and of the things that they name how many people named too (precision) and how many of
those that two people named they name (recall). The last line is of the descriptions themselves.
"""

from __future__ import annotations

import argparse

from messages import one_line_errors

from nanovlm_hf.completion import load_model
from nanovlm_hf.data.splits import lowest_hashes
from nanovlm_hf.evaluation.coherence import repeats
from nanovlm_hf.evaluation.items import load_rows, open_image
from nanovlm_hf.evaluation.mentions import mentions

BATCH_SIZE = 32
WAYS = {
    "greedy": {},
    "greedy, no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "greedy, repetition_penalty 1.1": {"repetition_penalty": 1.1},
    "greedy, repetition_penalty 1.2": {"repetition_penalty": 1.2},
    "greedy, repetition_penalty 1.3": {"repetition_penalty": 1.3},
    "4 beams": {"num_beams": 4},
    "4 beams, no_repeat_ngram_size 3": {"num_beams": 4, "no_repeat_ngram_size": 3},
    "4 beams, repetition_penalty 1.2": {"num_beams": 4, "repetition_penalty": 1.2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways of decoding on validation photos.")
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--variant", default="short")
    parser.add_argument("--photos", type=int, default=256)
    arguments = parser.parse_args()

    with one_line_errors("decoding.py"):
        model, processor = load_model(arguments.model)
        rows = load_rows(arguments.dataset, arguments.variant, "validation")
    rows = rows.select(lowest_hashes(rows["image_id"], arguments.photos))
    images, captions = [open_image(row) for row in rows], list(rows["captions"])
    print(f"{'decoding':<34} {'repeats':>8} {'words':>6} {'ends':>6} {'precision':>10} {'recall':>7}")

    def show(name: str, texts: list[str], ended: int) -> None:
        named = mentions(texts, [""] * len(texts), captions)
        words = sum(len(text.split()) for text in texts) / len(texts)
        shares = (sum(map(repeats, texts)) / len(texts), ended / len(texts))
        found = (named["precision"]["mean"], named["recall"]["mean"])
        print(
            f"{name:<34} {shares[0]:>8.1%} {words:>6.1f} {shares[1]:>6.1%} {found[0]:>10.1%} {found[1]:>7.1%}",
            flush=True,
        )

    for name, settings in WAYS.items():
        texts, ended = [], 0
        for start in range(0, len(images), BATCH_SIZE):
            inputs = processor(images=images[start : start + BATCH_SIZE], return_tensors="pt").to(model.device)
            plain = {"do_sample": False, "no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "max_new_tokens": 128}
            tokens = model.generate(**inputs, **(plain | settings))
            texts += processor.batch_decode(tokens, skip_special_tokens=True)
            ended += int((tokens == processor.tokenizer.eos_token_id).any(1).sum())
        show(name, texts, ended)
    show("the descriptions", list(rows["description"]), len(rows))


if __name__ == "__main__":
    main()
