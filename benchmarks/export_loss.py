"""Compare the validation loss of a released checkpoint with that of its exports.

`python benchmarks/export_loss.py mini-short --dataset data` exports the checkpoint as each dtype and prints the size,
the mean loss in nats per token over validation images (those with the lowest hashes of their ids, as in training), and
its difference from PyTorch's on the same images. It needs the extra `onnx`, and a dataset of `nanovlm data build`.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import numpy as np
import torch

from nanovlm_hf.checkpoints import SHIPPED
from nanovlm_hf.data.splits import lowest_hashes
from nanovlm_hf.evaluation.items import load_rows, open_image
from nanovlm_hf.export.onnx import as_dtype, export_graphs, weights_digest, write_configuration
from nanovlm_hf.export.runtime import OnnxModel, graph_path
from nanovlm_hf.loading import load_model

DTYPES = ("fp32", "fp16", "int8")


def token_losses(logits, ids):
    """Return the loss of each token in nats.

    Args:
        logits: (T, vocabulary), of which row t is what follows token t.
        ids: (T,) tokens; the first one is not predicted.
    """
    logits = logits[:-1].astype(np.float64)
    normaliser = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    return normaliser - logits[np.arange(len(logits)), ids[1:]]


def write_exports(model, processor, out):
    """Write an export with the graphs of every dtype, and return their sizes in bytes."""
    (out / "onnx").mkdir()
    write_configuration(model, processor, out, weights_digest(model))
    sizes = dict.fromkeys(DTYPES, 0)
    for part, graph in export_graphs(model):
        for dtype in DTYPES:
            path = graph_path(out, part, dtype)
            path.write_bytes(as_dtype(copy.deepcopy(graph), dtype).SerializeToString())
            sizes[dtype] += path.stat().st_size
    return sizes


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="mini-short", choices=SHIPPED)
    parser.add_argument("--dataset", default="data", help="folder or Hub id")
    parser.add_argument("--images", type=int, default=200, help="number of validation images")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, processor = load_model(arguments.checkpoint)
    model = model.to("cpu", torch.float32).eval()
    model.set_attn_implementation("eager")
    rows = load_rows(arguments.dataset, arguments.checkpoint.split("-")[1], "validation")
    rows = rows.select(lowest_hashes(rows["image_id"], arguments.images))
    first = processor.image_seq_length - 1  # the last image token, which predicts the first word
    with tempfile.TemporaryDirectory() as folder:
        sizes = write_exports(model, processor, Path(folder))
        exports = {dtype: OnnxModel(Path(folder), dtype) for dtype in DTYPES}
    losses = {name: [] for name in ("PyTorch", *DTYPES)}
    for row in rows:
        image = open_image(row)
        inputs = processor(images=image, text=row["description"], return_tensors="pt")
        ids = [*inputs["input_ids"][0].tolist(), model.config.eos_token_id]
        inputs = {"pixel_values": inputs["pixel_values"], "input_ids": torch.tensor([ids])}
        losses["PyTorch"].append(token_losses(model(**inputs).logits[0, first:].numpy(), ids[first:]))
        for dtype, exported in exports.items():
            features = exported.encode(image)
            losses[dtype].append(token_losses(exported.all_logits(features, ids)[first:], ids[first:]))
    means = {name: np.concatenate(values).mean() for name, values in losses.items()}
    print(f"{arguments.checkpoint}, {len(rows)} validation images, {sum(map(len, losses['PyTorch'])):,} tokens")
    print(f"{'weights':<8} {'size':>9} {'loss':>7} {'minus PyTorch':>14}")
    for name, mean in means.items():
        size = f"{sizes[name] / 1e6:.1f} MB" if name in sizes else ""
        print(f"{name:<8} {size:>9} {mean:>7.4f} {mean - means['PyTorch']:>+14.5f}")


if __name__ == "__main__":
    main()
