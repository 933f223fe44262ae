"""How often a model says a thing twice under each way of decoding: `python training/decoding.py MODEL --dataset data`.

Prints, for validation photos, the share of texts in which three words in a row come again, the mean number of words,
and the share of texts that end.
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset

from nanovlm_hf import NanoVLMForConditionalGeneration, NanoVLMProcessor
from nanovlm_hf.evaluation.coherence import repeats

BATCH_SIZE = 32
WAYS = {
    "greedy": {},
    "greedy, no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "greedy, repetition_penalty 1.2": {"repetition_penalty": 1.2},
    "4 beams": {"num_beams": 4},
    "4 beams, no_repeat_ngram_size 3": {"num_beams": 4, "no_repeat_ngram_size": 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways of decoding on validation photos.")
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--variant", default="short")
    parser.add_argument("--photos", type=int, default=256)
    arguments = parser.parse_args()

    model = NanoVLMForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32).eval()
    processor = NanoVLMProcessor.from_pretrained(arguments.model)
    images = load_dataset(arguments.dataset, arguments.variant, split="validation")[: arguments.photos]["image"]
    print(f"{'decoding':<34} {'repeats':>8} {'words':>6} {'ends':>6}")
    for name, settings in WAYS.items():
        texts, ended = [], 0
        for start in range(0, len(images), BATCH_SIZE):
            inputs = processor(images=images[start : start + BATCH_SIZE], return_tensors="pt")
            plain = {"do_sample": False, "no_repeat_ngram_size": 0, "max_new_tokens": 64}
            tokens = model.generate(**inputs, **(plain | settings))
            texts += processor.batch_decode(tokens, skip_special_tokens=True)
            ended += int((tokens == processor.tokenizer.eos_token_id).any(1).sum())
        share = sum(map(repeats, texts)) / len(texts)
        words = sum(len(text.split()) for text in texts) / len(texts)
        print(f"{name:<34} {share:>8.1%} {words:>6.1f} {ended / len(texts):>6.1%}", flush=True)


if __name__ == "__main__":
    main()
