"""`nanovlm evaluate`: completions, measures and the report; work that an earlier run left in the folder is reused."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, Interrupt
from ..files import locked, write_json
from .completions import complete_items
from .generators import NanoVLM, load_generator, public_name, short_name
from .graders import read_records
from .grounding_cache import cached_grounding
from .item_sets import ItemSet, load_item_sets, measure_texts
from .items import load_rows
from .judge_sets import judge_sets
from .originality import TrainingTexts, rouge_tokens
from .report import write_report
from .settings import EvaluationSettings, published_settings

CANNOT_WRITE = {getattr(errno, name) for name in ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EIO", "EFBIG")}
CANNOT_WRITE |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP}


def evaluate(settings: EvaluationSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure the models and write `results.json`, `index.html` and `report.md`.

    The report is written without the models that fail and without the grades that are missing. It includes the grades
    that `nanovlm evaluate judge --grades` has written to the folder.

    Args:
        say: called with a line of progress.

    Returns:
        The results.

    Raises:
        InputError: for models, datasets and folders that cannot be used, and for a judge that stopped; after the
            report is written if anything could be measured.
    """
    names = [short_name(model) for model in settings.models]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(f"--model: two models have the short name {name}: rename a folder")
    with _locked_folder(settings.out):
        return _evaluate(settings, names, say)


def _evaluate(settings: EvaluationSettings, names: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    sets = load_item_sets(settings)
    training = [text for text in load_rows(settings.dataset, settings.variant, "train")["description"] if text]
    if not training:
        raise InputError(f"--dataset {settings.dataset}: the train split has no descriptions")
    grounding: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for model, name in zip(settings.models, names, strict=True):
        try:
            _complete_and_ground(model, name, settings, sets, grounding, say)
        except InputError as error:
            problems[name] = str(error)
            for one in sets:
                one.drop(name)
    evaluated = {name: model for name, model in zip(names, settings.models, strict=True) if name not in problems}
    if not evaluated:
        raise InputError("; ".join(problems.values()))
    index, vocabulary = TrainingTexts(training), {word for text in training for word in rouge_tokens(text)}
    results: dict[str, Any] = {
        "settings": published_settings(settings),
        "models": {name: {"model": public_name(model)} for name, model in evaluated.items()},
        "failed": list(problems),
        "grounding": grounding,
        "sets": {one.name: measure_texts(one, index, vocabulary) for one in sets},
    }
    failure: BaseException | None = None
    if settings.judge is not None:
        say("judge")
        try:
            failure = judge_sets(settings, sets, results)
        except (Exception, *Interrupt) as error:  # whatever an endpoint does, the report is written first
            failure = error
    try:
        results["graders"] = [record.model_dump(mode="json") for record in read_records(settings.out / "grades")]
    except InputError as error:
        problems["graders"] = str(error)
    write_json(settings.out / "results.json", results)
    write_report(settings.out, results, sets)
    if isinstance(failure, InputError):
        problems["judge"] = str(failure)
    elif failure is not None:
        raise failure
    if problems:
        raise InputError("; ".join(problems.values()))
    return results


def _complete_and_ground(
    model: str,
    name: str,
    settings: EvaluationSettings,
    sets: list[ItemSet],
    grounding: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    generator = load_generator(model, settings.max_new_tokens)
    for one in sets:
        say(f"{name}: {len(one.items)} completions, {one.name.replace('_', ' ')}")
        one.rows[name], one.about[name] = complete_items(generator, name, one.items, one.folder)
    if settings.grounding_images and isinstance(generator, NanoVLM):
        say(f"{name}: grounding")
        grounding[name] = cached_grounding(generator, name, settings, sets[0].about[name])


@contextmanager
def _locked_folder(out: Path) -> Iterator[None]:
    """Make the folder, hold its lock, and report in one line if it cannot be written."""
    busy = f"--out {out}: another evaluation uses this folder: wait for it, or choose another folder"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / "evaluation.lock", busy):
            yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        where = f", {error.filename}" if error.filename else ""
        raise InputError(f"--out {out}: cannot be written ({error.strerror}{where})") from None
