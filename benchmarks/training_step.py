"""How fast is a training step of this project, data path included, against a plain PyTorch loop of the same model?

`python benchmarks/training_step.py --preset mini` prints images/s of eight loops, taken in turns in one process: the
project's (uint8 photos augmented and normalised for every batch, its objective, AdamW as in the others), the same with
Muon, the same with half of the patches hidden, with both descriptions and a caption of each photo, with these through
PyTorch's fused attention, the same model's step on one fixed batch in memory, a hand-written PyTorch model of the same
shapes on that batch, and that model as a tutorial would train it. The process keeps the memory that it frees, as the
training script does, which helps each of them.
"""

import argparse
import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from plain_model import LoopedBlock, PlainNanoVLM
from timing import median_seconds

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

from arguments import TrainingArguments
from batches import TrainingBatches
from loop import to_device
from objective import CompletionObjective
from on_cpu import keep_freed_memory, write_out_attention
from optimizers import optimizers_of
from texts import TokenizedTexts
from transformers import AutoTokenizer

from nanovlm_hf import NanoVLMConfig, NanoVLMForConditionalGeneration, NanoVLMImageProcessor, NanoVLMProcessor
from nanovlm_hf.checkpoints import SHIPPED

DESCRIPTION = "A brown dog runs over the green grass with a red ball. He looks so happy. I want to play with him too."


def optimizer_step(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], loss: torch.Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()


def project_loop(
    config: NanoVLMConfig,
    batches: TrainingBatches,
    fixed: bool = False,
    fused_attention: bool = False,
    muon_learning_rate: float = 0.0,
) -> Callable[[int], None]:
    model = NanoVLMForConditionalGeneration(copy.deepcopy(config))  # it holds how attention is computed
    if not fused_attention:
        write_out_attention(model)
    objective = CompletionObjective(model).train()
    fields = TrainingArguments(dataset="data", output_dir="runs", muon_learning_rate=muon_learning_rate)
    optimizers = optimizers_of(model, fields)
    image_processor = NanoVLMImageProcessor()
    in_memory = to_device(batches[0], image_processor, torch.device("cpu"))

    def step(number: int) -> None:
        batch = in_memory if fixed else to_device(batches[number], image_processor, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            text_loss, words_loss = objective(batch["pixel_values"], batch["texts"], batch["word_targets"])
        loss = text_loss / batch["tokens"] + 0.5 * words_loss / len(batch["pixel_values"])
        optimizer_step(objective, optimizers, loss)

    return step


def labels_of(text: dict[str, torch.Tensor]) -> torch.Tensor:
    """(texts, T), -100 where there is no loss."""
    labels = torch.full_like(text["input_ids"], -100)
    labels.view(-1)[text["places"] + 1] = text["targets"]
    return labels


def plain_loop(config: NanoVLMConfig, batches: TrainingBatches) -> Callable[[int], None]:
    """SDPA and bf16 autocast on one batch in memory."""
    model = PlainNanoVLM(config).train()
    assert sum(p.numel() for p in model.parameters()) == config.parameter_counts()["total"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = to_device(batches[0], NanoVLMImageProcessor(), torch.device("cpu"))
    (text,) = batch["texts"]
    labels = labels_of(text)

    def step(number: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch["pixel_values"], text["input_ids"], labels)
        optimizer_step(model, [optimizer], loss)

    return step


def tutorial_loop(config: NanoVLMConfig, batches: TrainingBatches, batch_size: int) -> Callable[[int], None]:
    """Heads in a Python loop, float32, a JPEG decoded, resized and normalised for every photo of every batch."""
    model = PlainNanoVLM(config, LoopedBlock).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    (text,) = batches[0]["texts"]
    labels = labels_of(text)
    rng = np.random.default_rng(0)
    files = []
    for _ in range(batch_size):
        shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        buffer = io.BytesIO()
        shapes.save(buffer, "JPEG", quality=85)
        files.append(buffer.getvalue())
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def photo(content: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(content)).convert("RGB").resize((224, 224), Image.BILINEAR)
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - mean) / std

    def step(number: int) -> None:
        pixel_values = torch.stack([photo(content) for content in files])
        optimizer_step(model, [optimizer], model(pixel_values, text["input_ids"], labels))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["mini-short"])
    config, half = (
        NanoVLMConfig.from_preset(arguments.preset, vocab_size=len(tokenizer), vision_config={"patch_dropout": share})
        for share in (0.0, 0.5)
    )
    processor = NanoVLMProcessor(NanoVLMImageProcessor(), tokenizer)
    photos = np.random.default_rng(0).integers(0, 256, (256, 224, 224, 3), dtype=np.uint8)
    short, long = ([[text]] * len(photos) for text in (DESCRIPTION, " ".join([DESCRIPTION] * 3)))
    batches, all_texts = (
        TrainingBatches(
            photos,
            TokenizedTexts(texts, short, processor),
            list(range(len(photos))),
            vocab_size=len(tokenizer),
            batch_size=arguments.batch_size,
            steps=1000,
            augment=True,
        )
        for texts in ({"short": short}, {"short": short, "long": long, "captions": short})
    )
    loops = {
        "project, data path included": project_loop(config, batches),
        "project, Muon": project_loop(config, batches, muon_learning_rate=3e-3),
        "project, patch_dropout 0.5": project_loop(half, batches),
        "project, three texts a photo": project_loop(config, all_texts),
        "project, three texts, fused attention": project_loop(config, all_texts, fused_attention=True),
        "project, one batch in memory": project_loop(config, batches, fixed=True),
        "plain PyTorch, one batch in memory": plain_loop(config, batches),
        "tutorial: looped heads, float32, JPEGs": tutorial_loop(config, batches, arguments.batch_size),
    }
    median = median_seconds(loops, arguments.rounds, warm_up=3)
    whole = median["project, data path included"]
    print(
        f"{arguments.preset}, batch {arguments.batch_size}, bf16 autocast but for the last, {arguments.threads} threads"
    )
    print(f"{'loop':<40} {'images/s':>8} {'project is':>11}")
    for name, value in median.items():
        print(f"{name:<40} {arguments.batch_size / value:>8.1f} {value / whole:>10.2f}x")


if __name__ == "__main__":
    main()
