"""`nanovlm evaluate`: completions, measures, report; what was done before is taken from the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..chat.client import Endpoint
from ..chat.replies import ReplyStore
from ..chat.terminal import asker
from ..data.sources import read_json
from ..data.splits import lowest_hashes
from ..errors import InputError
from ..files import written_whole
from .coherence import coherence
from .completions import Row, complete_items, write_json
from .generators import Generator, NanoVLM, load_generator, public_name, short_name
from .grounding import measure_grounding
from .items import Item, fingerprint, items_of_dataset, items_of_folder, load_rows, open_image
from .judge import Judge, JudgeSettings
from .likelihood import Likelihood
from .mentions import mentions
from .originality import TrainingTexts, originality, rouge_tokens


@dataclass
class EvaluationSettings:
    """What is evaluated, and how.

    Attributes:
        models: short names, folders or Hub ids.
        dataset: folder or Hub id of a dataset with photos.
        variant: short or long.
        out: folder of the report.
        split: of the items.
        prefix_words: that the models are given; 7 for short, 19 for long.
        ids: of a curated list, instead of the whole split.
        limit: items at most.
        images: folder of photos out of the domain, and `prefix`, how their texts begin.
        max_new_tokens: of a completion.
        grounding_photos: validation photos for grounding; 0 goes without.
        judge: None goes without.
        judge_sees_photo: beyond the paper.
    """

    models: list[str]
    dataset: str
    variant: str
    out: Path
    split: str = "test"
    prefix_words: int | None = None
    ids: list[int] | None = None
    limit: int | None = None
    images: Path | None = None
    prefix: str = ""
    max_new_tokens: int = 96
    grounding_photos: int = 1000
    judge: JudgeSettings | None = None
    endpoint: Endpoint | None = None
    judge_sees_photo: bool = False


@dataclass
class ItemSet:
    """Items with what the models made of them.

    Attributes:
        name: `in_domain` or `out_of_domain`.
        items: to complete.
        folder: of the completions.
        rows: by short name of the model.
        about: likewise: parameters, settings, speed.
    """

    name: str
    items: list[Item]
    folder: Path
    rows: dict[str, list[Row]] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)


def evaluate(settings: EvaluationSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and writes `results.json`, `index.html` and `report.md`.

    Returns:
        The results.

    Raises:
        InputError: for models, datasets and folders that cannot be used, and a judge that stopped.
    """
    from .report import write_report

    names = [short_name(model) for model in settings.models]
    if len(set(names)) < len(names):
        raise InputError(f"--model: two models are called {max(names, key=names.count)}: rename a folder")
    sets = _item_sets(settings)
    training = list(load_rows(settings.dataset, settings.variant, "train")["description"])
    grounding = {}
    for model, name in zip(settings.models, names, strict=True):
        generator = load_generator(model, settings.max_new_tokens)
        for one in sets:
            say(f"{name}: {len(one.items)} completions, {one.name.replace('_', ' ')}")
            one.rows[name], one.about[name] = complete_items(generator, name, one.items, one.folder)
        if settings.grounding_photos and isinstance(generator, NanoVLM):
            say(f"{name}: grounding")
            grounding[name] = _grounding(generator, name, settings, sets[0].about[name]["weights"])
    index, vocabulary = TrainingTexts(training), {word for text in training for word in rouge_tokens(text)}
    results: dict[str, Any] = {
        "settings": _described(settings),
        "models": {name: {"model": public_name(model)} for name, model in zip(names, settings.models, strict=True)},
        "grounding": grounding,
        "sets": {one.name: measure(one, index, vocabulary) for one in sets},
    }
    problem = None
    if settings.judge is not None:
        say("judge")
        try:
            problem = _judge(settings, sets, results)
        except InputError as error:  # an endpoint that is down takes nothing from the rest of the report
            problem = str(error)
    write_json(settings.out / "results.json", results)
    write_report(settings.out, results, sets)
    if problem is not None:
        raise InputError(problem)
    return results


def _item_sets(settings: EvaluationSettings) -> list[ItemSet]:
    items = items_of_dataset(
        settings.dataset, settings.variant, settings.split, settings.prefix_words, settings.ids, settings.limit
    )
    sets = [ItemSet("in_domain", items, settings.out / "completions")]
    if settings.images is not None:
        others = items_of_folder(settings.images, settings.prefix, settings.limit)
        sets.append(ItemSet("out_of_domain", others, settings.out / "completions" / "out_of_domain"))
    return sets


def _described(settings: EvaluationSettings) -> dict[str, Any]:
    """The settings as they may be published: names of folders, not where they are."""
    described = {
        name: value for name, value in asdict(settings).items() if name not in ("judge", "endpoint", "out", "models")
    }
    described["dataset"] = Path(settings.dataset).name if Path(settings.dataset).is_dir() else settings.dataset
    described["images"] = settings.images and settings.images.name
    return described


def measure(one: ItemSet, index: TrainingTexts, vocabulary: set[str]) -> dict[str, Any]:
    """What the words of completions tell, by model: coherence, originality, mentions, speed."""
    measured = {}
    for name, rows in one.rows.items():
        completions = [row.completion for row in rows]
        measured[name] = {
            **one.about[name],
            "coherence": coherence(completions, vocabulary),
            "originality": originality(completions, [row.text for row in rows], [row.reference for row in rows], index),
            "mentions": mentions(completions, [row.prefix for row in rows], [item.captions for item in one.items]),
        }
    return {"items": len(one.items), "fingerprint": fingerprint(one.items), "models": measured}


def _grounding(generator: Generator, name: str, settings: EvaluationSettings, weights: str) -> dict[str, Any]:
    """From the disk, or measured on validation photos, the lowest hashes first."""
    rows = load_rows(settings.dataset, settings.variant, "validation")
    rows = rows.select(lowest_hashes(rows["image_id"], settings.grounding_photos))
    if len(rows) < 2:
        raise InputError(f"--dataset {settings.dataset}: grounding needs two validation photos: --grounding-photos 0")
    identity = {"weights": weights, "photos": [int(image_id) for image_id in rows["image_id"]]}
    path = settings.out / "grounding" / f"{name}.json"
    if path.exists():
        before = read_json(path)
        if before["identity"] == identity:
            return before["measured"]
    path.parent.mkdir(parents=True, exist_ok=True)
    likelihood = Likelihood(generator.model, generator.processor)
    features = likelihood.encode(open_image(row) for row in rows)
    captions = list(rows["captions"]) if "captions" in rows.column_names else [[]] * len(rows)
    measured = measure_grounding(likelihood, features, list(rows["description"]), captions)
    with written_whole(path) as file:
        file.write(json.dumps({"identity": identity, "measured": measured}, indent=1) + "\n")
    return read_json(path)["measured"]


def _judge(settings: EvaluationSettings, sets: list[ItemSet], results: dict[str, Any]) -> str | None:
    """Adds the judge's grades to the results; why some are missing that could be had, or None."""
    problem = None
    with ReplyStore(settings.out / "judge") as store:
        for one in sets:
            rows = [row for own in one.rows.values() for row in own]
            images = {item.item_id: item.image for item in one.items} if settings.judge_sees_photo else None
            judge = Judge(rows, settings.judge, store, images)
            judge.run(asker(settings.endpoint, store))
            results["sets"][one.name]["judge"] = judge.summary() | {"lines": judge.lines()}
            problem = problem or judge.complaint()
    return problem
