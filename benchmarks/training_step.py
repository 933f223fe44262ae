"""Compare a training step of this project, data path included, with plain PyTorch loops of the same model.

`python benchmarks/training_step.py --preset mini` prints the images/s of eight loops that take turns in one process:

- the project's: uint8 images augmented and normalised for every batch, its objective, AdamW;
- the same with Muon; with patch dropout; with both descriptions and a caption of each image; with these and PyTorch's
  fused attention (which a run uses in float32 anyway); on one batch in memory;
- a hand-written PyTorch model of the same shapes on that batch;
- that model as a tutorial would train it.

All but the last use the mixed precision that a run would choose on this machine. The process keeps freed memory, as
training does, which makes every loop faster. Set `ONEDNN_MAX_CPU_ISA=AVX2` to emulate an older processor.
"""

import argparse
import copy
import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from plain_model import LoopedBlock, PlainNanoVLM
from timing import median_seconds
from transformers import AutoTokenizer

from nanovlm_hf import NanoVLMConfig, NanoVLMForConditionalGeneration, NanoVLMImageProcessor, NanoVLMProcessor
from nanovlm_hf.checkpoints import SHIPPED
from nanovlm_hf.devices import choose_precision, cpu_has_bf16
from nanovlm_hf.training.arguments import RunArguments
from nanovlm_hf.training.batches import TrainingBatches
from nanovlm_hf.training.cpu import keep_freed_memory, use_eager_attention
from nanovlm_hf.training.loss import CompletionObjective
from nanovlm_hf.training.optimizers import optimizers_of
from nanovlm_hf.training.step import to_device
from nanovlm_hf.training.texts import TokenizedTexts

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
    in_bf16: bool,
    fixed: bool = False,
    fused_attention: bool = False,
    optimizer: str = "adamw",
) -> Callable[[int], None]:
    model = NanoVLMForConditionalGeneration(copy.deepcopy(config))  # a model sets the attention in its config
    if in_bf16 and not fused_attention:
        use_eager_attention(model)
    objective = CompletionObjective(model).train()
    fields = RunArguments(dataset="data", output_dir="runs", optimizer=optimizer)
    optimizers = optimizers_of(model, fields, muon_in_bf16=in_bf16 and cpu_has_bf16())
    image_processor = NanoVLMImageProcessor()
    in_memory = to_device(batches[0], image_processor, torch.device("cpu"))

    def step(number: int) -> None:
        batch = in_memory if fixed else to_device(batches[number], image_processor, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            text_loss, words_loss, _ = objective(batch["pixel_values"], batch["texts"], batch["word_targets"])
        loss = text_loss / batch["tokens"] + 0.5 * words_loss / len(batch["pixel_values"])
        optimizer_step(objective, optimizers, loss)

    return step


def labels_of(text: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return labels (texts, T), -100 where there is no loss."""
    labels = torch.full_like(text["input_ids"], -100)
    labels.view(-1)[text["positions"] + 1] = text["targets"]
    return labels


def plain_loop(config: NanoVLMConfig, batches: TrainingBatches, in_bf16: bool) -> Callable[[int], None]:
    """Return a step with SDPA and autocast on one batch in memory."""
    model = PlainNanoVLM(config).train()
    assert sum(p.numel() for p in model.parameters()) == config.parameter_counts()["total"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = to_device(batches[0], NanoVLMImageProcessor(), torch.device("cpu"))
    (text,) = batch["texts"]
    labels = labels_of(text)

    def step(number: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            loss = model(batch["pixel_values"], text["input_ids"], labels)
        optimizer_step(model, [optimizer], loss)

    return step


def tutorial_loop(config: NanoVLMConfig, batches: TrainingBatches, batch_size: int) -> Callable[[int], None]:
    """Return a step with a Python loop over heads, in float32, that decodes and resizes a JPEG for every image."""
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

    def pixels_of(content: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(content)).convert("RGB").resize((224, 224), Image.BILINEAR)
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - mean) / std

    def step(number: int) -> None:
        pixel_values = torch.stack([pixels_of(content) for content in files])
        optimizer_step(model, [optimizer], model(pixel_values, text["input_ids"], labels))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mixed-precision", choices=("auto", "no", "bf16"), default="auto")
    arguments = parser.parse_args()
    precision = choose_precision(arguments.mixed_precision, torch.device("cpu"))
    in_bf16 = precision.value == "bf16"
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["mini-short"], trust_remote_code=False)
    config, half = (
        NanoVLMConfig.from_preset(arguments.preset, vocab_size=len(tokenizer), vision_config={"patch_dropout": share})
        for share in (0.0, 0.5)
    )
    processor = NanoVLMProcessor(NanoVLMImageProcessor(), tokenizer)
    images = np.random.default_rng(0).integers(0, 256, (256, 224, 224, 3), dtype=np.uint8)
    short, long = ([[text]] * len(images) for text in (DESCRIPTION, " ".join([DESCRIPTION] * 3)))
    batches, all_texts = (
        TrainingBatches(
            images,
            TokenizedTexts(texts, short, processor),
            list(range(len(images))),
            vocab_size=len(tokenizer),
            batch_size=arguments.batch_size,
            steps=1000,
            augment=True,
        )
        for texts in ({"short": short}, {"short": short, "long": long, "captions": short})
    )
    loops = {
        "project, data path included": project_loop(config, batches, in_bf16),
        "project, Muon": project_loop(config, batches, in_bf16, optimizer="muon"),
        "project, patch_dropout 0.5": project_loop(half, batches, in_bf16),
        "project, three texts an image": project_loop(config, all_texts, in_bf16),
        "project, three texts, fused attention": project_loop(config, all_texts, in_bf16, fused_attention=True),
        "project, one batch in memory": project_loop(config, batches, in_bf16, fixed=True),
        "plain PyTorch, one batch in memory": plain_loop(config, batches, in_bf16),
        "tutorial: looped heads, float32, JPEGs": tutorial_loop(config, batches, arguments.batch_size),
    }
    median = median_seconds(loops, arguments.rounds, warm_up=3)
    whole = median["project, data path included"]
    print(precision.message)
    print(f"{arguments.preset}, batch {arguments.batch_size}, {arguments.threads} threads; the last loop in float32")
    print(f"{'loop':<40} {'images/s':>8} {'project is':>11}")
    for name, value in median.items():
        print(f"{name:<40} {arguments.batch_size / value:>8.1f} {value / whole:>10.2f}x")


if __name__ == "__main__":
    main()
