"""How fast is a training step of this project, data path included, against a plain PyTorch loop of the same model?

`python benchmarks/training_step.py --preset mini` prints images/s of three loops, taken in turns in one process:
the project's (uint8 photos augmented and normalised for every batch, its objective, its optimizer settings), the same
model's step on one fixed batch in memory, and a hand-written PyTorch model of the same shapes on that batch.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from plain_model import PlainNanoVLM
from timing import median_seconds

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

from batches import TokenizedTexts, TrainingBatches
from datasets import Dataset
from objective import CompletionObjective
from run_folder import parameter_groups
from transformers import AutoTokenizer

from nanovlm_hf import NanoVLMConfig, NanoVLMForConditionalGeneration, NanoVLMImageProcessor, NanoVLMProcessor
from nanovlm_hf.checkpoints import PACKAGED

DESCRIPTION = "A brown dog runs over the green grass with a red ball. He looks so happy. I want to play with him too."


def optimizer_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def project_loop(config: NanoVLMConfig, batches: TrainingBatches, fixed: bool) -> Callable[[int], None]:
    objective = CompletionObjective(NanoVLMForConditionalGeneration(config)).train()
    optimizer = torch.optim.AdamW(parameter_groups(objective, 0.1), lr=1e-3, fused=True)
    in_memory = batches[0]

    def step(number: int) -> None:
        batch = in_memory if fixed else batches[number]
        with torch.autocast("cpu", torch.bfloat16):
            text_loss, words_loss = objective(**batch)
        tokens = (batch["labels"] != -100).sum()
        optimizer_step(objective, optimizer, text_loss / tokens + 0.5 * words_loss / len(batch["pixel_values"]))

    return step


def plain_loop(config: NanoVLMConfig, batch: dict[str, torch.Tensor]) -> Callable[[int], None]:
    model = PlainNanoVLM(config).train()
    assert sum(p.numel() for p in model.parameters()) == config.parameter_counts()["total"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(number: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch["pixel_values"].contiguous(), batch["input_ids"], batch["labels"])
        optimizer_step(model, optimizer, loss)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    tokenizer = AutoTokenizer.from_pretrained(PACKAGED["mini-short"])
    config = NanoVLMConfig.from_preset(arguments.preset, vocab_size=len(tokenizer))
    processor = NanoVLMProcessor(NanoVLMImageProcessor(), tokenizer)
    photos = np.random.default_rng(0).integers(0, 256, (256, 224, 224, 3), dtype=np.uint8)
    rows = Dataset.from_list([{"description": DESCRIPTION, "captions": [DESCRIPTION]}] * len(photos))
    texts = TokenizedTexts(rows, ["description"], processor)
    batches = TrainingBatches(
        photos,
        texts,
        processor.image_processor,
        vocab_size=len(tokenizer),
        batch_size=arguments.batch_size,
        number_of_batches=1000,
        augment=True,
        seed=0,
    )
    loops = {
        "project, data path included": project_loop(config, batches, fixed=False),
        "project, one batch in memory": project_loop(config, batches, fixed=True),
        "plain PyTorch, one batch in memory": plain_loop(config, batches[0]),
    }
    median = median_seconds(loops, arguments.rounds, warm_up=3)
    whole = median["project, data path included"]
    print(f"{arguments.preset}, batch {arguments.batch_size}, bf16 autocast, {arguments.threads} threads")
    print(f"{'loop':<36} {'images/s':>8} {'project is':>11}")
    for name, value in median.items():
        print(f"{name:<36} {arguments.batch_size / value:>8.1f} {value / whole:>10.2f}x")


if __name__ == "__main__":
    main()
