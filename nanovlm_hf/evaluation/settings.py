"""Settings of `nanovlm evaluate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..chat.endpoint import Endpoint
from .judge import JudgeSettings

_NOT_PUBLISHED = frozenset(("judge", "endpoint", "out", "models"))
# Settings that were renamed; reports keep the old names, which their readers know.
_NAMES_IN_REPORTS = {"grounding_images": "grounding_photos", "judge_sees_image": "judge_sees_photo"}


@dataclass
class EvaluationSettings:
    """What is evaluated, and how.

    Attributes:
        models: short names, folders or Hub ids.
        dataset: folder or Hub id of a dataset with images.
        variant: name of a variant of `nanovlm_hf.variants`.
        out: folder of the report.
        split: split that the items are taken from.
        prefix_words: words that the models are given; the variant's own number by default.
        ids: image ids of a curated list, instead of the whole split.
        limit: maximum number of items.
        written_from: evaluate only descriptions that were written from `captions` or from the `image`; None for all.
        images: folder of out-of-domain images.
        prefix: first words of the texts about `images`.
        max_new_tokens: maximum length of a completion.
        grounding_images: number of validation images to measure grounding on; 0 skips it.
        judge: settings of the LLM judge; None skips it.
        endpoint: where the judge is reached.
        judge_sees_image: whether the judge is shown the images (beyond the paper).
    """

    models: list[str]
    dataset: str
    variant: str
    out: Path
    split: str = "test"
    prefix_words: int | None = None
    ids: list[int] | None = None
    limit: int | None = None
    written_from: str | None = None
    images: Path | None = None
    prefix: str = ""
    max_new_tokens: int = 96
    grounding_images: int = 1000
    judge: JudgeSettings | None = None
    endpoint: Endpoint | None = None
    judge_sees_image: bool = False


def published_settings(settings: EvaluationSettings) -> dict[str, Any]:
    """Return the settings that a report states: names of folders, without their paths."""
    published = {name: value for name, value in asdict(settings).items() if name not in _NOT_PUBLISHED}
    published["dataset"] = _folder_name(settings.dataset)
    for name, old in _NAMES_IN_REPORTS.items():
        published[old] = published.pop(name)
    published["images"] = settings.images and _folder_name(settings.images)
    return published


def _folder_name(path: str | Path) -> str:
    return Path(path).resolve().name if Path(path).is_dir() else str(path)
