"""Complete sentences with an exported folder under onnxruntime; the model itself needs no PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveInt

from ..completion_files import Completion, find_images, new_tokens, refuse_special_tokens
from ..errors import InputError, UsageError, completion_line, first_line
from ..files import validate
from ..images import open_image_file
from ..pillow_nanovlm import central_square, scale_and_shift
from ..untrusted_files import Deviations, Means, is_refusal, read_object, read_tokenizer
from .beam_search import BeamSearch

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}
DTYPES = ("fp16", "fp32", "int8")  # in the order in which a folder is searched
MAX_BEAMS = 256
T = TypeVar("T", bound=BaseModel)


Length = Annotated[int, Field(ge=1, le=4096)]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class _TextConfig(BaseModel):
    vocab_size: PositiveInt
    hidden_size: Length
    num_attention_heads: Length
    num_hidden_layers: Length


class _Config(BaseModel):
    image_token_index: NonNegativeInt
    image_seq_length: Length
    max_position_embeddings: Length
    text_config: _TextConfig


class _Decoding(BaseModel):
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    no_repeat_ngram_size: NonNegativeInt | None = None


class _BeamSearch(_Decoding):
    num_beams: Annotated[int, Field(ge=2, le=MAX_BEAMS)]
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    early_stopping: bool | Literal["never"] = False


class _Generation(_Decoding):
    """Greedy decoding, and the beam search of the checkpoint if that is its default."""

    eos_token_id: Token | Annotated[list[Token], Field(min_length=1)]
    suppress_tokens: list[Token] | None = None
    beam_search: _BeamSearch | None = None


class _Size(BaseModel):
    height: Length
    width: Length


class _Preprocessor(BaseModel):
    do_center_crop: bool
    do_resize: bool
    do_rescale: bool
    do_normalize: bool
    size: _Size
    resample: Annotated[int, Field(ge=0, le=5)]
    rescale_factor: Annotated[FiniteFloat, Field(gt=0, le=1)]
    image_mean: Means
    image_std: Deviations


class OnnxModel:
    """A checkpoint that `nanovlm export` wrote, ready to complete sentences by greedy or beam search.

    Args:
        folder: with `config.json`, `tokenizer.json` and the graphs in `onnx/`.
        dtype: `fp32`, `fp16` or `int8`; by default the first of fp16, fp32 and int8 that the folder holds.

    Raises:
        InputError: if a file is missing, damaged or of another architecture.
        UsageError: if onnxruntime is not installed.
    """

    def __init__(self, folder: Path, dtype: str | None = None):
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise UsageError("onnxruntime is not installed: pip install 'nanovlm-hf[onnx]'") from None
        from tokenizers import Tokenizer

        found = [one for one in DTYPES if graph_path(folder, "decoder_model_merged", one).is_file()]
        if not found or (dtype is not None and dtype not in found):
            wanted = f"{dtype} " if dtype else ""
            raise InputError(f"{folder}: there are no {wanted}graphs in onnx/: write them with `nanovlm export`")
        self.dtype = dtype or found[0]
        self.folder = folder
        config = _read(folder, "config.json", _Config)
        self.generation = _read(folder, "generation_config.json", _Generation)
        self.preprocessor = _read(folder, "preprocessor_config.json", _Preprocessor)
        eos, suppressed = self.generation.eos_token_id, self.generation.suppress_tokens or []
        self.eos_tokens = {eos} if isinstance(eos, int) else set(eos)
        if max([config.image_token_index, *suppressed]) >= config.text_config.vocab_size:
            limit = f"config.json's vocab_size of {config.text_config.vocab_size}"
            raise InputError(f"{folder}: image_token_index or suppress_tokens is not below {limit}: export it again")
        self.image_token_id, self.image_tokens = config.image_token_index, config.image_seq_length
        self.positions = config.max_position_embeddings
        self.layers, self.heads = config.text_config.num_hidden_layers, config.text_config.num_attention_heads
        self.head_size = config.text_config.hidden_size // self.heads
        content, _ = read_tokenizer(folder)
        try:
            self.tokenizer = Tokenizer.from_str(json.dumps(content))
        except BaseException as error:
            if not is_refusal(error):
                raise
            raise InputError(f"{folder / 'tokenizer.json'}: cannot be loaded ({first_line(error)})") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.vision, self.embed, self.decoder = (
                onnxruntime.InferenceSession(
                    str(graph_path(folder, name, self.dtype)), options, providers=["CPUExecutionProvider"]
                )
                for name in GRAPHS
            )
        except Exception as error:  # onnxruntime's own kinds, which it does not export
            raise InputError(f"{folder}: the graphs in onnx/ cannot be loaded ({first_line(error)})") from None

    def pixel_values(self, image: Image.Image) -> np.ndarray:
        """Return an RGB image as the vision encoder takes it, (1, 3, height, width)."""
        settings = self.preprocessor
        if settings.do_center_crop:
            left, top, side = central_square(*image.size)
            image = image.crop((left, top, left + side, top + side))
        if settings.do_resize:
            size = (settings.size.width, settings.size.height)
            image = image.resize(size, settings.resample, reducing_gap=3.0)
        scale, shift = scale_and_shift(settings.model_dump())
        pixels = np.asarray(image).astype(np.float32) * scale + shift
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])

    def blank_image(self) -> Image.Image:
        """Return an image in the mean colour, which the preprocessor normalises to zeros."""
        size, mean = self.preprocessor.size, self.preprocessor.image_mean
        return Image.new("RGB", (size.width, size.height), tuple(round(255 * value) for value in mean))

    def encode(self, image: Image.Image) -> np.ndarray:
        """Return the projected features of an RGB image, (1, image tokens, C)."""
        return self._run(self.vision, {"pixel_values": self.pixel_values(image)})[0]

    def complete(
        self,
        image: Image.Image,
        prefix: str = "",
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
    ) -> str:
        """Return the prefix with its completion, as one line.

        Args:
            image: RGB image of any size.
            prefix: beginning of the sentence; white space around it is dropped.
            max_new_tokens: limit after the prefix; None for as many as fit, up to 96.
            num_beams: 1 is greedy search, 256 is the maximum; None is the checkpoint's number.

        Raises:
            UsageError: if the prefix holds a special token, such as `<image>` or `<eos>`, or there are too many beams.
            InputError: if the tokens do not fit the positions.
        """
        tokens = self._prompt(prefix)
        tokens += self.generate(self.encode(image), tokens, max_new_tokens, num_beams)
        return self.text(tokens)

    def text(self, tokens: list[int]) -> str:
        """Return the text of a prompt and its completion, as one line."""
        return completion_line(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def check(self, prefix: str, max_new_tokens: int | None, num_beams: int | None) -> None:
        """Raise the errors of `complete` that do not depend on the image."""
        new_tokens(len(self._prompt(prefix)), self.positions, max_new_tokens)
        self._beams(num_beams)

    def _prompt(self, prefix: str) -> list[int]:
        added = self.tokenizer.get_added_tokens_decoder().values()
        refuse_special_tokens(prefix, [token.content for token in added if token.special])
        ids = self.tokenizer.encode(prefix.strip(), add_special_tokens=False).ids
        return [self.image_token_id] * self.image_tokens + ids

    def generate(
        self,
        features: np.ndarray,
        tokens: list[int],
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
    ) -> list[int]:
        """Return the tokens that decoding adds to a prompt, without the end token.

        Args:
            features: of the image, (1, image tokens, C).
            tokens: of the prompt.
            max_new_tokens: as in `complete`.
            num_beams: as in `complete`.

        Raises:
            UsageError, InputError: as `complete`.
        """
        limit = new_tokens(len(tokens), self.positions, max_new_tokens)
        beams = self._beams(num_beams)
        if beams is None:
            return list(self._greedy(features, tokens, limit))
        return self._search(features, tokens, limit, beams)

    def _beams(self, num_beams: int | None) -> _BeamSearch | None:
        """Return the settings of beam search, the checkpoint's own as far as it has some; None for greedy search."""
        own = self.generation.beam_search
        if num_beams is None or num_beams == 1:
            return own if num_beams is None else None
        if num_beams > MAX_BEAMS:
            raise UsageError(f"num_beams: {num_beams}: an exported model takes {MAX_BEAMS} at most")
        fields = (own or self.generation).model_dump(include=set(_BeamSearch.model_fields))
        return _BeamSearch(**fields | {"num_beams": num_beams})

    def logits(self, features: np.ndarray, tokens: list[int]) -> np.ndarray:
        """Return the logits (vocabulary,) of what follows a prompt."""
        return self.all_logits(features, tokens)[-1]

    def all_logits(self, features: np.ndarray, tokens: list[int]) -> np.ndarray:
        """Return the logits (T, vocabulary) of what follows each of T tokens."""
        return self._run(self.decoder, self._inputs(*self._begin(features, tokens)))[0][0]

    def _begin(self, features: np.ndarray, tokens: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the embeddings of a prompt, the image's features in their place, and an empty cache."""
        embeddings = self._embed([tokens])
        embeddings[:, : self.image_tokens] = features
        return embeddings, [np.zeros((1, self.heads, 0, self.head_size), np.float32)] * (2 * self.layers)

    def _greedy(self, features: np.ndarray, tokens: list[int], limit: int) -> Iterator[int]:
        embeddings, past = self._begin(features, tokens)
        seen = list(tokens)
        for _ in range(limit):
            logits, *past = self._run(self.decoder, self._inputs(embeddings, past))
            token = int(self._process(logits[0, -1], seen, self.generation).argmax())
            if token in self.eos_tokens:
                return
            yield token
            seen.append(token)
            embeddings = self._embed([[token]])

    def _search(self, features: np.ndarray, tokens: list[int], limit: int, settings: _BeamSearch) -> list[int]:
        logits, *past = self._run(self.decoder, self._inputs(*self._begin(features, tokens)))

        def advance(origins: list[int], last: list[int]) -> np.ndarray:
            nonlocal past
            past = [state[origins] for state in past]
            logits, *past = self._run(self.decoder, self._inputs(self._embed([[token] for token in last]), past))
            return logits[:, -1]

        search = BeamSearch(settings.num_beams, settings.length_penalty, settings.early_stopping)
        found = search.search(
            logits[:, -1],
            advance,
            lambda scores, new: self._process(scores, [*tokens, *new], settings),
            self.eos_tokens,
            limit,
        )
        return found[:-1] if found[-1] in self.eos_tokens else found

    def _embed(self, tokens: list[list[int]]) -> np.ndarray:
        return self._run(self.embed, {"input_ids": np.asarray(tokens, np.int64)})[0]

    def _run(self, session: InferenceSession, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return session.run(None, inputs)
        except Exception as error:  # onnxruntime's own kinds
            problem = f"the graphs in onnx/ do not fit config.json ({first_line(error)})"
            raise InputError(f"{self.folder}: {problem}") from None

    def _inputs(self, embeddings: np.ndarray, past: list[np.ndarray]) -> dict[str, Any]:
        before, (sequences, length) = past[0].shape[2], embeddings.shape[:2]
        positions = np.arange(before, before + length, dtype=np.int64)
        names = [f"past_key_values.{layer}.{kind}" for layer in range(self.layers) for kind in ("key", "value")]
        return {
            "inputs_embeds": embeddings,
            "attention_mask": np.ones((sequences, before + length), np.int64),
            "position_ids": np.tile(positions, (sequences, 1)),
            **dict(zip(names, past, strict=True)),
        }

    def _process(self, scores: np.ndarray, seen: list[int], settings: _Decoding) -> np.ndarray:
        """Change the scores (vocabulary,) of the next token, logits or log-probabilities, in place and return them.

        The repetition penalty divides positive scores of tokens that were seen and multiplies negative ones. Suppressed
        tokens are excluded, as are those that would repeat a sequence of `no_repeat_ngram_size` tokens.
        """
        if not np.isfinite(scores).all():
            raise InputError("the model's logits are NaN or infinite: its weights are damaged")
        penalty = settings.repetition_penalty or 1.0
        repeated = np.unique(seen)
        scores[repeated] = np.where(scores[repeated] < 0, scores[repeated] * penalty, scores[repeated] / penalty)
        if settings.no_repeat_ngram_size:
            scores[_repeating(seen, settings.no_repeat_ngram_size)] = -np.inf
        scores[self.generation.suppress_tokens or []] = -np.inf
        return scores


def _repeating(tokens: list[int], size: int) -> list[int]:
    """Return the tokens that would make the last `size` tokens a sequence that was there before."""
    last = tokens[len(tokens) - size + 1 :]
    starts = range(len(tokens) - size + 1)
    return [tokens[start + size - 1] for start in starts if tokens[start : start + size - 1] == last]


def is_exported(folder: Path) -> bool:
    """Return whether a folder has ONNX graphs and no weights of PyTorch."""
    return (folder / "onnx").is_dir() and not any(folder.glob("*.safetensors"))


def complete_files(
    model: OnnxModel,
    images: list[Path],
    prefix: str = "",
    max_new_tokens: int | None = None,
    blind: bool = False,
    num_beams: int | None = None,
) -> Iterator[Completion]:
    """Complete a sentence about each image file, as `nanovlm_hf.completion.complete` does with PyTorch.

    Args:
        images: files or folders.
        blind: also complete the prefix for a blank image.
        num_beams: 1 is greedy search; None is the checkpoint's number.

    Raises:
        UsageError, InputError: as `OnnxModel.complete`.
    """
    size = (model.preprocessor.size.width, model.preprocessor.size.height)
    model.check(prefix, max_new_tokens, num_beams)
    blank = [model.complete(model.blank_image(), prefix, max_new_tokens, num_beams)] if blind else None
    for one in find_images(images):
        if one.error is None:
            try:
                one.texts = [model.complete(open_image_file(one.path, size=size), prefix, max_new_tokens, num_beams)]
                one.blind = blank
            except InputError as error:
                one.error = str(error)
        yield one


def _read(folder: Path, name: str, kind: type[T]) -> T:
    return validate(read_object(folder, name), kind, folder / name)


def graph_path(folder: Path, name: str, dtype: str) -> Path:
    """Return the path of a graph, named as transformers.js names the files of a dtype."""
    return folder / "onnx" / f"{name}{SUFFIXES[dtype]}.onnx"
