"""Measure the throughput of `generate()` with and without cache.

`python benchmarks/generation.py` generates 32 tokens for one image, alternating between both.
"""

import argparse

import torch
from timing import median_seconds

from nanovlm_hf import NanoVLMConfig, NanoVLMForConditionalGeneration

NEW_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    model = NanoVLMForConditionalGeneration(NanoVLMConfig.from_preset(arguments.preset)).eval()
    input_ids = torch.randint(4, 5120, (arguments.batch_size, 5))
    input_ids[:, 0] = model.config.image_token_id
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(arguments.batch_size, 3, 224, 224),
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "suppress_tokens": [model.config.image_token_id],
        "do_sample": False,
    }
    calls = {
        "with cache": lambda number: model.generate(**inputs, use_cache=True),
        "without": lambda number: model.generate(**inputs, use_cache=False),
    }
    with_cache, without = median_seconds(calls, arguments.rounds, warm_up=2).values()
    tokens = NEW_TOKENS * arguments.batch_size
    print(
        f"{arguments.preset}, batch {arguments.batch_size}, {NEW_TOKENS} tokens, float32, {arguments.threads} threads"
    )
    print(f"with cache    {tokens / with_cache:>8.1f} tokens/s")
    print(f"without cache {tokens / without:>8.1f} tokens/s")
    print(f"speed-up by the cache: {without / with_cache:.2f}x")


if __name__ == "__main__":
    main()
