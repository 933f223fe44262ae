"""Export a checkpoint to ONNX, in the layout that transformers.js and `nanovlm_hf.export.runtime` load.

An exported folder holds `onnx/{vision_encoder,embed_tokens,decoder_model_merged}[_fp16|_quantized].onnx`, a
`config.json` that transformers.js understands, and the tokenizer, preprocessor and generation configuration of the
checkpoint. The decoder takes and returns its KV cache, which may be empty: one graph serves the prompt and each token.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..errors import InputError
from ..files import atomic_write, read_json, read_text
from ..generation_nanovlm import greedy_settings
from ..loading import load_model
from ..untrusted_files import read_object
from .runtime import DTYPES, GRAPHS, graph_path

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

    from ..modeling_nanovlm import NanoVLMForConditionalGeneration
    from ..processing_nanovlm import NanoVLMProcessor

EXPORTER = "nanovlm_hf"
UNSUPPORTED_DECODING = ("bad_words_ids", "begin_suppress_tokens", "min_new_tokens", "min_length")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SMALLEST_HALF = 1024  # elements from which a weight is stored in half precision
QUANTISED_OPERATORS = ["MatMul", "Gemm", "Gather"]
_DIMENSIONS = {
    "pixel_values": ("batch_size", None, None, None),
    "image_features": ("batch_size", "image_tokens", None),
    "input_ids": ("batch_size", "sequence_length"),
    "inputs_embeds": ("batch_size", "sequence_length", None),
    "attention_mask": ("batch_size", "total_sequence_length"),
    "position_ids": ("batch_size", "sequence_length"),
    "logits": ("batch_size", "sequence_length", None),
    "past_key_values": ("batch_size", None, "past_sequence_length", None),
    "present": ("batch_size", None, "total_sequence_length", None),
}


class VisionEncoder(nn.Module):
    """Vision encoder and projector: `pixel_values` (B, 3, H, W) to `image_features` (B, image tokens, C)."""

    def __init__(self, model: NanoVLMForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values).pooler_output


class Decoder(nn.Module):
    """One step of decoder and head: embeddings (B, T, C) and a KV cache to logits and the longer cache."""

    def __init__(self, model: NanoVLMForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [state for layer in outputs.past_key_values.layers for state in (layer.keys, layer.values)]
        return (outputs.logits, *present)


def export_onnx(checkpoint: str, out: Path, dtype: str = "fp16") -> dict[str, Any]:
    """Export a checkpoint and compare the exported graphs with PyTorch.

    Args:
        checkpoint: released checkpoint, folder or Hub id.
        out: folder to write; it is created, and must be empty or hold an earlier export.
        dtype: `fp32`; `fp16`, which stores weights in half precision and computes in single; or `int8`, which also
            quantises the weights of linear layers and embeddings, and changes texts.

    Returns:
        The report that is also written as `onnx/export_DTYPE.json`: sizes in bytes, the largest difference of the
        logits, and how many completions equal PyTorch's.

    Raises:
        InputError: if the checkpoint cannot be loaded or decodes with a setting that an export cannot apply, or the
            folder holds something else.
    """
    from .check import compare_with_pytorch

    model, processor, sizes = write_onnx(checkpoint, out, dtype)
    report = {"dtype": dtype, "bytes": sizes, **compare_with_pytorch(model, processor, out, dtype)}
    with atomic_write(_report_path(out, dtype)) as file:
        file.write(json.dumps(report, indent=2) + "\n")
    return report


def write_onnx(
    checkpoint: str, out: Path, dtype: str
) -> tuple[NanoVLMForConditionalGeneration, NanoVLMProcessor, dict[str, int]]:
    """Write the graphs and the configuration of `export_onnx`, without the comparison.

    Returns:
        The model and the processor that were exported, and the sizes of the graphs in bytes.

    Raises:
        InputError: as `export_onnx`.
    """
    refuse_other_contents(out)
    model, processor = load_model(checkpoint)
    for name in UNSUPPORTED_DECODING:
        if getattr(model.generation_config, name, None):
            raise InputError(f"{checkpoint}: generation_config.json: {name}: an export cannot apply it: remove it")
    model = model.to("cpu", torch.float32).eval()
    model.set_attn_implementation("eager")
    (out / "onnx").mkdir(parents=True, exist_ok=True)
    digest = weights_digest(model)
    if _is_export(out) and read_object(out, "config.json").get("weights_sha256") != digest:
        _remove_graphs(out)
    write_configuration(model, processor, out, digest)
    sizes = {}
    for name, graph in export_graphs(model):
        path = graph_path(out, name, dtype)
        _write_graph(path, as_dtype(graph, dtype).SerializeToString())
        sizes[path.name] = path.stat().st_size
    return model, processor, sizes


def weights_digest(model: NanoVLMForConditionalGeneration) -> str:
    """Return a SHA-256 of the weights' names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _remove_graphs(out: Path) -> None:
    """Remove the graphs of other weights, before a configuration is written that does not belong to them."""
    for dtype in DTYPES:
        for path in (*(graph_path(out, name, dtype) for name in GRAPHS), _report_path(out, dtype)):
            path.unlink(missing_ok=True)


def _report_path(out: Path, dtype: str) -> Path:
    return out / "onnx" / f"export_{dtype}.json"


def _write_graph(path: Path, content: bytes) -> None:
    """Write a graph under another name that then replaces `path`, so that links to other files are never followed."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(content)
    partial.replace(path)


def refuse_other_contents(out: Path) -> None:
    """Refuse a folder that holds anything but an earlier export, or links in place of its files.

    Raises:
        InputError: naming the folder and what is in the way.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: it is a file: name a folder")
    for path in (*out.glob("*"), *out.glob("onnx/*")):
        if path.is_symlink():
            raise InputError(f"--out {out}: {path.relative_to(out)} is a link, which is not followed: remove it")
    if (out / "onnx").exists() and not (out / "onnx").is_dir():
        raise InputError(f"--out {out}: onnx is a file: name an empty folder")
    others = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if others and not _is_export(out):
        raise InputError(f"--out {out}: it holds {others[0]} and no earlier export: name an empty folder")


def _is_export(folder: Path) -> bool:
    """Return whether a folder has the configuration of `write_configuration`, and so no checkpoint's."""
    path = folder / "config.json"
    return path.is_file() and read_object(folder, path.name).get("exported_by") == EXPORTER


def export_graphs(model: NanoVLMForConditionalGeneration) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Yield the name and the graph of each part, in single precision with named dynamic dimensions."""
    config = model.config
    text, side, auto = config.text_config, config.vision_config.image_size, torch.export.Dim.AUTO
    layers = range(text.num_hidden_layers)
    past_names = [f"past_key_values.{layer}.{kind}" for layer in layers for kind in ("key", "value")]
    head_size = text.hidden_size // text.num_attention_heads
    batch, length, before = 2, 5, 3
    pixels = torch.randn(batch, config.vision_config.num_channels, side, side)
    yield (
        "vision_encoder",
        _exported(VisionEncoder(model), (pixels,), ["pixel_values"], ["image_features"], ({0: auto},)),
    )
    ids = torch.zeros(batch, length, dtype=torch.long)
    embeddings = model.get_input_embeddings()
    yield "embed_tokens", _exported(embeddings, (ids,), ["input_ids"], ["inputs_embeds"], ({0: auto, 1: auto},))
    past = [torch.randn(batch, text.num_attention_heads, before, head_size) for _ in past_names]
    inputs = (
        torch.randn(batch, length, text.hidden_size),
        torch.ones(batch, before + length, dtype=torch.long),
        torch.arange(before, before + length).expand(batch, -1),
        *past,
    )
    names = ["inputs_embeds", "attention_mask", "position_ids", *past_names]
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in past_names)]
    dynamic = ({0: auto, 1: auto},) * 3 + (tuple({0: auto, 2: auto} for _ in past),)
    yield "decoder_model_merged", _exported(Decoder(model), inputs, names, outputs, dynamic)


def _exported(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], names: list[str], outputs: list[str], dynamic: tuple[Any, ...]
) -> onnx.ModelProto:
    import onnx

    with tempfile.TemporaryDirectory() as folder, _quiet_exporter(), torch.no_grad():
        path = Path(folder) / "graph.onnx"
        torch.onnx.export(
            module.eval(),
            inputs,
            path,
            input_names=names,
            output_names=outputs,
            dynamo=True,
            dynamic_shapes=dynamic,
            external_data=False,
            verbose=False,
        )
        graph = onnx.load(path)
    for value in (*graph.graph.input, *graph.graph.output):
        kind = value.name.split(".")[0]
        for dimension, label in zip(value.type.tensor_type.shape.dim, _DIMENSIONS[kind], strict=True):
            if label is not None and not dimension.HasField("dim_value"):
                dimension.dim_param = label
    del graph.graph.value_info[:]  # shapes in the exporter's own names
    _remove_notes(graph)
    return graph


def _remove_notes(message: Message) -> None:
    """Remove the exporter's notes from a graph and all its parts: they name source files by their paths."""
    for name in ("metadata_props", "doc_string"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:
                _remove_notes(part)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hide the advice of the exporter and of onnxruntime's quantisation, which logs to the root logger."""
    root = logging.getLogger()
    loggers = [root, *(logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir"))]
    levels, handlers = [one.level for one in loggers], root.handlers[:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in loggers:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)
            root.handlers[:] = handlers  # `logging.warning` adds one if there is none


def as_dtype(graph: onnx.ModelProto, dtype: str) -> onnx.ModelProto:
    """Return a graph that stores its weights as `dtype`; inputs, outputs and arithmetic stay in single precision."""
    if dtype == "fp16":
        return _with_half_weights(graph)
    if dtype == "int8":
        return _with_half_weights(_quantised(graph))  # convolutions stay floats
    return graph


def _with_half_weights(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Store large weights as float16 with a Cast to float32, which onnxruntime folds when it loads the graph."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    casts = []
    for tensor in graph.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.size >= SMALLEST_HALF:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), f"{name}_fp16"))
            casts.append(onnx.helper.make_node("Cast", [f"{name}_fp16"], [name], to=onnx.TensorProto.FLOAT))
    nodes = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend(casts + nodes)
    return graph


def _quantised(graph: onnx.ModelProto) -> onnx.ModelProto:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _quiet_exporter():
        source, target = Path(folder) / "source.onnx", Path(folder) / "target.onnx"
        onnx.save(graph, source)
        quantize_dynamic(
            source,
            target,
            per_channel=True,
            weight_type=QuantType.QUInt8,  # products of signed weights overflow on CPUs that have AVX2 but not VNNI
            op_types_to_quantize=QUANTISED_OPERATORS,
        )
        return onnx.load(target)


def write_configuration(
    model: NanoVLMForConditionalGeneration, processor: NanoVLMProcessor, out: Path, digest: str
) -> None:
    """Write the configuration files of an exported folder.

    transformers.js knows architectures by `model_type` and cannot be given another one, so the folder calls itself a
    Llava: an image token whose embeddings are replaced by image features in front of a decoder with a KV cache.

    Args:
        digest: of the weights, which `config.json` names.
    """
    text = model.config.text_config
    config = {
        "exported_by": EXPORTER,
        "weights_sha256": digest,
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": model.config.image_token_id,
        "image_seq_length": model.config.image_seq_length,
        "max_position_embeddings": text.max_position_embeddings,
        "bos_token_id": model.config.bos_token_id,
        "eos_token_id": model.config.eos_token_id,
        "pad_token_id": model.config.pad_token_id,
        "text_config": {
            "model_type": "stablelm",  # any with these fields
            "hidden_size": text.hidden_size,
            "num_attention_heads": text.num_attention_heads,
            "num_hidden_layers": text.num_hidden_layers,
            "vocab_size": text.vocab_size,
        },
    }
    with tempfile.TemporaryDirectory() as name:
        saved = Path(name)
        processor.save_pretrained(saved)
        greedy = greedy_settings(model.generation_config)  # transformers.js has no beam search
        decoding = copy.deepcopy(model.generation_config)
        decoding.update(**greedy)
        decoding.save_pretrained(saved)
        for file in TOKENIZER_FILES:
            with atomic_write(out / file) as target:  # a copy would be written through a link
                target.write(read_text(saved / file))
        # Defaults are not saved, but would not replace the checkpoint's values where a tool merges both files.
        generation = read_json(saved / "generation_config.json") | greedy
        if greedy:  # what replaces the values above in `nanovlm_hf.export.runtime`
            before = model.generation_config.to_dict()
            generation["beam_search"] = {name: before[name] for name in greedy if before.get(name) is not None}
    preprocessor = json.loads(processor.image_processor.to_json_string())
    preprocessor["image_processor_type"] = "ViTImageProcessor"
    preprocessor.pop("processor_class", None)
    contents = {
        "config.json": config,
        "generation_config.json": generation,
        "preprocessor_config.json": preprocessor,
    }
    for file, content in contents.items():
        with atomic_write(out / file) as target:
            target.write(json.dumps(content, indent=2) + "\n")
