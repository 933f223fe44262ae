"""What a run is worth believing for: what it ran on, how fast, and what the model says as it learns."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import io
import json
import os
import platform
import resource
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import TrainingArguments
from evaluation import evaluate
from machines import gpu_of
from objective import CompletionObjective
from PIL import Image
from run_folder import RunFolder
from setup_run import Split, generation_config
from streaming import StreamedSplit
from torch.utils.flop_counter import FlopCounterMode

from nanovlm_hf import NanoVLMForConditionalGeneration, NanoVLMProcessor
from nanovlm_hf.evaluation.coherence import coherence
from nanovlm_hf.evaluation.originality import rouge_tokens
from nanovlm_hf.files import written_whole

PACKAGES = ("nanovlm-hf", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")
SAMPLES = 8  # that are written down, of
COMPLETIONS = 32  # from which the signs of coherence come
PREFIX_WORDS = 4


def describe_run(
    arguments: TrainingArguments, splits: dict[str, Split | StreamedSplit], accelerator: Any
) -> dict[str, Any]:
    """The run's fields, the versions it ran with, the data it saw and the machine: `training_args.yaml`."""
    return {
        "arguments": asdict(arguments),
        "data": {name: split.identity() for name, split in splits.items()},
        "processes": accelerator.num_processes,
        "distributed_type": str(accelerator.distributed_type.value),
        "device": device_name(accelerator.device),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
    }


def device_name(device: torch.device) -> str:
    """The machine in words: the GPU's name, or cores and the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in _read("/proc/cpuinfo").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    cores = len(os.sched_getaffinity(0))
    return f"{cores} {'core' if cores == 1 else 'cores'} of {cpu}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _git_commit() -> str | None:
    """The commit of the code, with a plus if files were changed since."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    return (commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")) if commit else None


class Meter:
    """Means and speed since the last line of metrics; the loss is read from the device only when asked for."""

    def __init__(self, device: torch.device):
        self.device = device
        self.losses: list[torch.Tensor] = []
        self.loss_sum = 0.0
        self.steps = self.tokens = self.images = 0
        self.restart()

    def restart(self) -> None:
        """Begins anew; called after an evaluation, whose time is not the step's."""
        self.losses, self.loss_sum = [], 0.0
        self.steps = self.tokens = self.images = 0
        self.start = time.perf_counter()

    def add(self, loss: torch.Tensor, tokens: int, images: int) -> None:
        """Counts a step."""
        self.losses.append(loss)
        self.steps += 1
        self.tokens += tokens
        self.images += images

    def first_bad(self) -> int | None:
        """How many steps ago the first loss since the last look was that is no number, or None."""
        values = torch.stack(self.losses).tolist() if self.losses else []
        bad = next((place for place, value in enumerate(values) if not np.isfinite(value)), None)
        if bad is None:
            self.loss_sum += sum(values)
            self.losses = []
            return None
        return len(values) - 1 - bad

    def state(self) -> dict[str, Any]:
        """What a resumed run needs for its next line to be the same; after `first_bad`."""
        return {"loss_sum": self.loss_sum, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self.loss_sum, self.steps = state["loss_sum"], state["steps"]

    def read(self, flops_per_image: float | None) -> dict[str, float | None]:
        """`train_loss` in nats per token; images and tokens a second over all processes; MFU; memory in MiB."""
        seconds = time.perf_counter() - self.start
        images_per_second = self.images / seconds
        gpu = gpu_of(device_name(self.device)) if self.device.type == "cuda" else None
        flops = flops_per_image * images_per_second if flops_per_image else None
        return {
            "train_loss": self.loss_sum / self.steps,
            "images_per_second": round(images_per_second, 1),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "teraflops": round(flops / 1e12, 4) if flops else None,
            "mfu": round(flops / gpu.flops, 4) if flops and gpu else None,
            "memory_mib": self._memory(),
        }

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 2**20)
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def count_flops(step: Any) -> float:
    """Floating-point operations of a call, matrix products and convolutions, by PyTorch's own counter."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def known_words(splits: dict[str, Split | StreamedSplit]) -> set[str]:
    """The words that are learned, of the first source; of a stream, those that are judged."""
    split = splits["validation" if isinstance(splits["train"], StreamedSplit) else "train"]
    tokenizer = split.texts.tokenizer
    texts = tokenizer.batch_decode([texts[0][:-1] for texts in split.texts.ids[split.texts.names[0]] if texts])
    return {word for text in texts for word in rouge_tokens(text)}


def judge(
    run: RunFolder,
    step: int,
    model: NanoVLMForConditionalGeneration,
    processor: NanoVLMProcessor,
    split: Split,
    vocabulary: set[str],
    accelerator: Any,
) -> dict[str, float]:
    """Judges a model on a split's photos; logs what came of it, and writes down what the model says of some.

    Args:
        step: after which the model is as it is.
        vocabulary: of `known_words`.

    Returns:
        The metrics of `evaluate`, and the signs of coherence of `write_samples`.
    """
    objective = CompletionObjective(model)
    with accelerator.autocast():
        metrics = evaluate(objective, split.photos, split.texts, processor.image_processor, accelerator.device)
    metrics |= write_samples(run, step, model, processor, split, vocabulary)
    run.log({"step": step, **metrics})
    return metrics


@torch.no_grad()
def write_samples(
    run: RunFolder,
    step: int,
    model: NanoVLMForConditionalGeneration,
    processor: NanoVLMProcessor,
    split: Split,
    vocabulary: set[str],
) -> dict[str, float]:
    """Appends what the model says of the first validation photos to `samples.jsonl`.

    Returns:
        Signs of coherence of some more completions, as `nanovlm_hf.evaluation.coherence` has them.
    """
    rows = list(range(min(COMPLETIONS, len(split))))
    tokenizer = processor.tokenizer
    references = [tokenizer.decode(split.texts.ids[split.texts.names[0]][row][0][:-1]) for row in rows]
    prefixes = [" ".join(reference.split()[:PREFIX_WORDS]) for reference in references]
    images = [Image.fromarray(np.array(split.photos[row])) for row in rows]
    inputs = processor(images=images, text=prefixes, return_tensors="pt").to(model.device)
    training = model.training
    model.eval()
    tokens = model.generate(**inputs, generation_config=generation_config(model.config))
    model.train(training)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    with (run.path / "samples.jsonl").open("a", encoding="utf-8") as file:
        for row, prefix, reference, text in list(zip(rows, prefixes, references, texts, strict=True))[:SAMPLES]:
            line = {
                "step": step,
                "image_id": split.image_ids[row],
                "prefix": prefix,
                "text": text,
                "reference": reference,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    added = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return coherence(added, vocabulary)


def write_strip(run: RunFolder, split: Split) -> None:
    """Draws `samples.jsonl` as `samples.html`: the photos, and below each what was said of it over time.

    The page holds the photos, so it stays in the run's folder, which git ignores.
    """
    path = run.path / "samples.jsonl"
    if not path.exists():
        return
    said: dict[int, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        said.setdefault(row["image_id"], []).append(row)
    columns = []
    for image_id, rows in said.items():
        buffer = io.BytesIO()
        Image.fromarray(np.array(split.photos[split.image_ids.index(image_id)])).save(buffer, "WEBP", quality=60)
        picture = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        lines = "".join(
            f"<p><small>step {row['step']}</small><br><b>{html.escape(row['prefix'])}</b>"
            f"{html.escape(row['text'][len(row['prefix']) :])}</p>"
            for row in rows
        )
        columns.append(
            f'<section><img src="{picture}" alt="photo {image_id}"><p><i>{html.escape(rows[0]["reference"])}</i></p>'
            f"{lines}</section>"
        )
    with written_whole(run.path / "samples.html") as file:
        file.write(_PAGE.replace("TITLE", html.escape(run.path.name)).replace("COLUMNS", "".join(columns)))


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>TITLE: what the model says as it learns</title>
<style>
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif }
main { display: flex; gap: 1.5em; overflow-x: auto; align-items: flex-start }
section { flex: 0 0 224px }
img { width: 224px; height: 224px; border-radius: 6px }
small { opacity: .6 }
</style>
<h1>TITLE</h1><p>Above: the description that a person would read. Below: the completion at each evaluation.</p>
<main>COLUMNS</main>
</html>
"""
