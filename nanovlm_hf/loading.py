"""Load an untrusted checkpoint by name: every file is checked before Transformers reads it.

`from_pretrained` trusts a folder. The commands do not, since anybody may have written it: a file that is damaged,
hostile or of another model gives an error of one line, executes no code and needs little memory.
"""

from __future__ import annotations

import inspect
import math
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from pydantic import Field
from safetensors import safe_open

from .checkpoint_files import load_decoding, load_processor
from .checkpoints import NAMES, SHIPPED
from .compat_nanovlm import mismatched_weights
from .configuration_nanovlm import NanoVLMConfig, NanoVLMTextConfig, NanoVLMVisionConfig, refuse_other_project
from .devices import default_device
from .errors import InputError, first_line, scrub
from .files import validate
from .modeling_nanovlm import NanoVLMForConditionalGeneration
from .processing_nanovlm import NanoVLMProcessor
from .untrusted_files import MAX_SETTINGS, Strict, read_object

MAX_HEADER = 2**24  # bytes of the header of a safetensors file
# Far above models of this kind: large has 26 million parameters and reads 224 x 224 pixels in 196 patches.
MAX_PARAMETERS = 1_000_000_000
MAX_DOWNLOAD = 5 * MAX_PARAMETERS  # bytes: the weights in float32, and the other files
MAX_SIDE = 1024
MAX_PATCHES = 4096
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-[0-9]*-of-[0-9]*.safetensors"  # not those of other formats, such as model-quantized.safetensors
# Files to download from the Hub: no code and no pickles.
FILES = [
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "adapter_config.json", WEIGHTS, SHARDS, INDEX),
]


def load_config(name: str) -> NanoVLMConfig:
    """Return the config of a released checkpoint (`mini-short`), a folder or a Hub id.

    Raises:
        InputError: if there is none, it belongs to another model type, or a field has an invalid value.
    """
    fields = read_config(name)
    if fields.get("model_type") != NanoVLMConfig.model_type:
        try:
            refuse_other_project(fields)
        except ValueError as error:
            raise InputError(f"{name}: {error}") from None
        found = scrub(repr(fields.get("model_type")), max_length=60)
        raise InputError(f"{name}: this is a model of type {found}, not {NanoVLMConfig.model_type!r}")
    if fields.get("quantization_config") is not None:
        raise InputError(f"{name}: quantized weights are not supported by this command: load them with Transformers")
    # Fields that all configs share can change the behaviour of Transformers, so only our own are used.
    chosen = _known(fields, NanoVLMConfig, ("pad_token_id", "bos_token_id", "eos_token_id"))
    for part in (NanoVLMVisionConfig, NanoVLMTextConfig):
        if isinstance(chosen.get(part.base_config_key), dict):
            chosen[part.base_config_key] = _known(chosen[part.base_config_key], part)
    try:
        return NanoVLMConfig(**chosen)
    except ValueError as error:
        raise InputError(f"{name}: config.json: {first_line(error)}") from None


def load_model(name: str) -> tuple[NanoVLMForConditionalGeneration, NanoVLMProcessor]:
    """Return the model and processor of a released checkpoint, a folder or a Hub id.

    The model is in evaluation mode, in float32, on the default device.

    Raises:
        InputError: naming the file that is missing, damaged or does not match the others.
    """
    config = load_config(name)
    folder = _fetched(name)
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{name}: this folder holds an adapter: merge it into its model and save the model")
    if config.vision_config.num_channels != 3:
        raise InputError(f"{name}: the model takes {config.vision_config.num_channels} channels, an image has 3")
    side, patches = config.vision_config.image_size, config.vision_config.num_patches
    if side > MAX_SIDE or patches > MAX_PATCHES:
        raise InputError(
            f"{name}: config.json asks for images of {side} x {side} pixels in {patches:,} patches, the limit is "
            f"{MAX_SIDE} x {MAX_SIDE} in {MAX_PATCHES:,}"
        )
    processor = load_processor(folder, config)
    decoding = load_decoding(folder, config)
    weights = _read_weights(folder, config)
    try:
        model, report = NanoVLMForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # Transformers raises many types
        raise InputError(f"{name}: cannot be loaded: {first_line(error)}") from None
    _check_weights(name, model, report)
    if decoding is not None:
        model.generation_config = decoding
    return model.to(default_device()).eval(), processor


def read_config(name: str) -> dict[str, Any]:
    """Return the fields of config.json of a released checkpoint, a folder or a Hub id, for any model type.

    Raises:
        InputError: if there is none, or it is not a JSON object.
    """
    return read_object(locate(name), "config.json")


def locate(name: str) -> Path:
    """Return the folder of a released checkpoint, a folder or a Hub id, from which config.json alone is downloaded.

    Raises:
        InputError: if there is none.
    """
    if name in SHIPPED:
        return SHIPPED[name]
    folder = local_folder(name)
    if folder is not None:
        if not (folder / "config.json").exists():
            raise InputError(f"{name}: there is no config.json in this folder: name one that save_pretrained wrote")
        return folder
    if name in NAMES:
        raise InputError(f"{name}: it is not in the package, but in checkpoints/ of its repository: name that folder")
    try:
        validate_repo_id(name)
    except HFValidationError:
        pass
    else:
        if name.count("/") == 1:
            _check_size(name, ["config.json"], MAX_SETTINGS)
            return Path(_from_hub(name, hf_hub_download, filename="config.json")).parent
    raise InputError(f"{name}: not a local folder, a Hub id (org/name) or a released checkpoint ({', '.join(SHIPPED)})")


def local_folder(name: str) -> Path | None:
    """Return the folder of a path (`~` is the home folder), or None if the name is not an existing path.

    Raises:
        InputError: for a file, and for a path that cannot be accessed.
    """
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        problem = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{scrub(name, 100)}: cannot be opened ({problem})") from None
    if exists:
        raise InputError(f"{name}: this is a file: name the folder of a checkpoint")
    return None


def _fetched(name: str) -> Path:
    """Return the folder of a checkpoint with all of its files, downloaded at the commit of its config.json."""
    folder = locate(name)
    if name in SHIPPED or local_folder(name) is not None:
        return folder
    _check_size(name, FILES, MAX_DOWNLOAD, folder.name)
    return Path(_from_hub(name, snapshot_download, revision=folder.name, allow_patterns=FILES))


def _check_size(name: str, patterns: list[str], limit: int, revision: str | None = None) -> None:
    """Raise InputError if files to download have more bytes than the limit, before they fill the disk."""
    try:
        found = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
    except Exception:  # offline, where the cache may hold the files, or an error that the download reports
        return
    size = sum(one.size or 0 for one in found if any(fnmatch(one.rfilename, pattern) for pattern in patterns))
    if size > limit:
        shown = patterns[0] if len(patterns) == 1 else "its files"
        raise InputError(f"{name}: {shown}: {size:,} bytes, the limit is {limit:,}")


def _from_hub(name: str, fetch: Any, **arguments: Any) -> str:
    try:
        return fetch(name, **arguments)
    except Exception as error:  # of huggingface_hub and the HTTP libraries of its versions
        problem = f"cannot be downloaded from the Hub ({first_line(error)})"
        raise InputError(f"{name}: not a local folder, and {problem}") from None


def _known(fields: dict[str, Any], kind: type, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields that are arguments of a config class."""
    names = {*inspect.signature(kind.__init__).parameters, *more} - {"self", "kwargs"}
    return {name: value for name, value in fields.items() if name in names}


def _read_weights(folder: Path, config: NanoVLMConfig) -> dict[str, torch.Tensor]:
    """Return the tensors of the safetensors files of a checkpoint after a check of their number and size."""
    expected = config.parameter_counts()["total"]
    if expected > MAX_PARAMETERS:
        raise InputError(f"{folder}: config.json asks for {expected:,} parameters, the limit is {MAX_PARAMETERS:,}")
    files = [WEIGHTS]
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        index = validate(read_object(folder, INDEX, MAX_HEADER), _Index, folder / INDEX)
        files = sorted(set(index.weight_map.values()))
    opened = [(folder / file, _open_weights(folder, file)) for file in files]
    tensors = sum(len(one.keys()) for _, one in opened)
    layers = config.vision_config.num_hidden_layers + config.text_config.num_hidden_layers
    if tensors > 32 * (layers + 4):  # a layer has 16, the rest 24
        raise InputError(f"{folder}: the weights are {tensors:,} tensors, config.json asks for {layers} layers of 16")
    found = sum(math.prod(one.get_slice(key).get_shape()) for _, one in opened for key in one.keys())  # noqa: SIM118
    if not expected / 2 <= found <= expected * 2:
        raise InputError(
            f"{folder}: the weights have {found:,} parameters, config.json asks for {expected:,}: "
            "take both from one model"
        )
    weights = {}
    for path, one in opened:
        for key in one.keys():  # noqa: SIM118
            dtype = one.get_slice(key).get_dtype()
            if dtype not in ("F64", "F32", "F16", "BF16"):
                raise InputError(f"{path}: weight {scrub(key, 80)} is {dtype}, not a floating point number")
            weights[key] = one.get_tensor(key)
    head, embedding = weights.get("lm_head.weight"), weights.get("model.language_model.embed_tokens.weight")
    if config.tie_word_embeddings and head is not None and embedding is not None and not head.equal(embedding):
        raise InputError(f"{folder}: lm_head.weight is not the embedding, config.json ties them: save the model again")
    return weights


def _open_weights(folder: Path, file: str) -> Any:
    path = folder / file
    if Path(file).name != file:
        raise InputError(f"{folder / INDEX}: {scrub(file, 80)} is not a file of this folder")
    if not path.exists():
        raise InputError(f"{folder}: cannot be loaded: there is no {file} in this folder")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    try:
        with path.open("rb") as start:
            header = int.from_bytes(start.read(8), "little")
        if header > MAX_HEADER:
            raise ValueError(f"a header of {header:,} bytes")
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises errors of its own
        raise InputError(f"{path}: cannot be loaded: not a safetensors file ({first_line(error)})") from None


def _check_weights(name: str, model: NanoVLMForConditionalGeneration, report: dict[str, Any]) -> None:
    """Raise an InputError for weights that do not match the config or are not finite."""
    mismatched = mismatched_weights(report)
    if mismatched:
        raise InputError(
            f"{name}: weight {mismatched[0]} has another shape than config.json asks for: take both from one model"
        )
    if report["missing_keys"]:
        raise InputError(f"{name}: the weights lack {sorted(report['missing_keys'])[0]}: save the model again")
    if report["unexpected_keys"]:
        extra = scrub(sorted(report["unexpected_keys"])[0], 80)
        raise InputError(f"{name}: config.json does not ask for weight {extra}: take both from one model")
    for key, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise InputError(f"{name}: weight {key} holds NaN or infinity: training diverged, or the file is damaged")


class _Index(Strict):
    weight_map: dict[str, str] = Field(min_length=1)
