"""Captions from their beginning, for lmms-eval: prompts, and scores against human captions by pycocoevalcap.

The prompt is the beginning of one human caption of an image, since a NanoVLM follows no instructions. The whole
sentence is scored against the image's other captions, so the given words count only where others use them too.
"""

from __future__ import annotations

import re
from typing import Any

from PIL import Image

PREFIX_WORDS = 3
CAPTION_FIELDS = ("answer", "caption", "annotations_captions", "captions")  # COCO, Flickr30k, NoCaps, this project
METRICS = ("CIDEr", "BLEU_4", "ROUGE_L")


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """Return the image of a row."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """Return the first words of a row's first caption."""
    return " ".join(captions(doc)[0].split()[:PREFIX_WORDS])


def doc_to_no_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """Return an empty prompt: the model begins the sentence itself, as in image captioning."""
    return ""


def doc_to_target(doc: dict[str, Any]) -> str:
    """Return the caption whose beginning is given."""
    return captions(doc)[0]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Score the completion of a caption's beginning against the image's other captions."""
    return _scored(doc_to_text(doc), results, captions(doc)[1:])


def process_captioning_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Score a sentence that the model began itself against all captions of the image."""
    return _scored("", results, captions(doc))


def _scored(prefix: str, results: list[str], references: list[str]) -> dict[str, Any]:
    pair = {"prediction": f"{prefix} {first_sentence(results[0])}".strip(), "references": references}
    return dict.fromkeys(METRICS, pair)


def captions(doc: dict[str, Any]) -> list[str]:
    """Return the human captions of a row.

    Raises:
        ValueError: if it has fewer than two.
    """
    for field in CAPTION_FIELDS:
        if isinstance(doc.get(field), list) and len(doc[field]) > 1:
            return doc[field]
    raise ValueError(f"a row has no list of two or more captions in {', '.join(CAPTION_FIELDS)}")


def first_sentence(text: str) -> str:
    """Return a text up to the end of its first sentence: human captions have one, and descriptions several."""
    return re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]


def _tokenized(results: list[dict[str, Any]]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    references = {index: [{"caption": text} for text in one["references"]] for index, one in enumerate(results)}
    predictions = {index: [{"caption": one["prediction"]}] for index, one in enumerate(results)}
    return tokenizer.tokenize(references), tokenizer.tokenize(predictions)


def cider(results: list[dict[str, Any]]) -> float:
    """Return CIDEr (Vedantam et al. 2015) of a split; document frequencies are those of its references."""
    from pycocoevalcap.cider.cider import Cider

    return float(Cider().compute_score(*_tokenized(results))[0])


def bleu_4(results: list[dict[str, Any]]) -> float:
    """Return BLEU-4 of a split."""
    from pycocoevalcap.bleu.bleu import Bleu

    return float(Bleu(4).compute_score(*_tokenized(results), verbose=0)[0][3])


def rouge_l(results: list[dict[str, Any]]) -> float:
    """Return the mean ROUGE-L of a split."""
    from pycocoevalcap.rouge.rouge import Rouge

    return float(Rouge().compute_score(*_tokenized(results))[0])
