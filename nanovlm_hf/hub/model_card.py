"""The model card of a checkpoint, filled from the files stored with its weights.

`python -m nanovlm_hf.hub.model_card CHECKPOINT` rewrites it; `--report FOLDER` adds the results of `nanovlm evaluate`.
"""

from __future__ import annotations

import argparse
import functools
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from pydantic import BaseModel

from ..checkpoints import NAMES
from ..configuration_nanovlm import NanoVLMConfig
from ..errors import InputError, one_line_errors
from ..evaluation.completions import read_rows
from ..evaluation.generators import short_name
from ..evaluation.graders import GraderRecord, read_records
from ..evaluation.items import PREFIX_WORDS
from ..evaluation.report import interval
from ..evaluation.report_graders import graders_tables
from ..evaluation.templates import markdown
from ..files import atomic_write, read_json, validate, write_json
from ..loading import load_config
from ..paper_nanovlm import PAPERS_NAMES, TABLE_1
from ..training.compute import compute_statement, emissions, stages
from ..training.lineage import command, lineage
from ..training.run_record import RECORD, Evaluation, VariantName, checkpoint_record, images_per_step
from ..variants import VARIANTS
from .model_metadata import DESCRIBED, METRICS, REQUIRED, eval_results
from .origins import base_model_of, datasets_of

PAPERS_LEARNING_RATE = 1e-3  # section 2.3
EXAMPLES, FAILURES = 4, 4  # completions that a card shows


def write_card(folder: Path) -> None:
    """Write the `README.md` of a checkpoint."""
    text = card(folder)
    with atomic_write(folder / "README.md") as file:
        file.write(text)


def card(folder: Path) -> str:
    """Return the model card of a checkpoint: `hub_cards/model_card.md`, filled from the files of the checkpoint.

    Raises:
        InputError: if a file or a metric is missing.
    """
    if not (folder / RECORD).exists() or not (folder / "metrics.json").exists():
        raise InputError(f"{folder}: there is no {RECORD} or metrics.json: training writes both with its best model")
    record = checkpoint_record(folder)
    evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").exists() else None
    metadata = _metadata(folder, record)
    metrics = read_json(folder / "metrics.json")
    validate(metrics, Evaluation, folder / "metrics.json")
    arguments, name = record["arguments"], record["name"]
    filled = ModelCard.from_template(
        metadata,
        template_str=files("nanovlm_hf.hub_cards").joinpath("model_card.md").read_text(encoding="utf-8"),
        name=name,
        load_from=f'nanovlm_hf.SHIPPED["{name}"]' if name in NAMES else f'"runs/{name}/best"',
        dataset=VARIANTS[arguments["variant"]].title,
        **_architecture(load_config(str(folder)), arguments),
        data=_data(record),
        deviations=deviations_from_paper(record),
        batch_size=images_per_step(record),
        dropout=arguments["dropout"],
        optimizer="AdamW" if arguments.get("optimizer", "adamw") in ("adamw", "muon") else arguments["optimizer"],
        # Records that are older than `auto` hold the precision only as an argument.
        in_bf16=(record.get("mixed_precision") or arguments["mixed_precision"]) == "bf16",
        command="\n".join(line for run in lineage(record) for line in command(run)),
        compute=compute_statement(stages(record)),
        validation_images=record["data"]["validation"]["photos"],
        metrics=metrics,
        more_metrics={
            title: metrics[name] for name, title in METRICS.items() if name not in REQUIRED and name in metrics
        },
        evaluation=evaluation,
        described=DESCRIBED.get((evaluation or {}).get("written_from")),
        grades=grade_tables(evaluation, folder / "evaluation.json"),
        interval=functools.partial(interval, percent=True),
    )
    return f"{str(filled).rstrip()}\n"


def _metadata(folder: Path, record: dict[str, Any]) -> ModelCardData:
    estimate = emissions(stages(record))
    return ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["nanovlm_hf", "image-captioning"],
        datasets=datasets_of(folder, record),
        base_model=base_model_of(record),
        model_name=record["name"],
        eval_results=eval_results(folder),
        **({} if estimate is None else {"co2_eq_emissions": estimate}),
    )


def _architecture(config: NanoVLMConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    counts = config.parameter_counts()
    return {
        "preset": arguments["preset"],
        "relation": _relation(arguments),
        "parameters": {part: f"{count / 1e6:.1f}M" for part, count in counts.items()},
        "shares": {part: f"{count / counts['total']:.0%}" for part, count in counts.items()},
        "image_tokens": config.image_seq_length,
    }


def _relation(arguments: dict[str, Any]) -> str:
    """Return the words between "It is" and "mini model of the paper"."""
    if arguments["preset"] not in TABLE_1:
        return "beyond the paper, as a"
    return "the" if all(arguments.get(name) is None for name in PAPERS_NAMES) else "a variant of the"


def grade_tables(evaluation: Any, where: Path) -> list[dict[str, Any]]:
    """Return the tables of outside graders, with their cells as Markdown; none without such grades."""
    given = evaluation.get("graders") if isinstance(evaluation, dict) else None
    records = validate(given or [], list[GraderRecord], f"{where}: graders")
    return [
        {
            "title": table.title,
            "note": markdown(table.note),
            "rows": [list(map(markdown, row)) for row in (table.header, *table.rows)],
        }
        for table in graders_tables(records)
    ]


def _data(record: dict[str, Any]) -> str:
    """Return what a checkpoint was trained on, in Markdown."""
    if record["about"]:
        return record["about"].strip()
    images = record["data"]["train"]["photos"]
    return (
        f"{f'{images:,} images' if images else 'A stream of images'} for training and "
        f"{record['data']['validation']['photos']:,} for validation, from the dataset "
        f"`{record['arguments']['dataset']}`."
    )


def deviations_from_paper(record: dict[str, Any]) -> list[str]:
    """Return the ways in which a run differs from the paper's recipe, as sentences."""
    arguments = record["arguments"]
    found = []
    if arguments["learning_rate"] != PAPERS_LEARNING_RATE:
        found.append(f"The learning rate is {arguments['learning_rate']:g} instead of {PAPERS_LEARNING_RATE:g}.")
    if arguments["vision_initializer_range"] is None:
        found.append("The vision encoder is initialised by fan-in.")
    if arguments["augment"]:
        found.append("Images are augmented: cropped, mirrored, and changed in light.")
    if arguments.get("patch_dropout"):
        found.append(f"Patch dropout hides {100 * arguments['patch_dropout']:.0f}% of the patches during training.")
    if arguments["visual_words_weight"]:
        found.append("A bag-of-words auxiliary loss, without parameters, predicts caption words from the image token.")
    if arguments.get("muon_learning_rate"):
        found.append("Hidden weight matrices use Muon; embeddings, head, norms and biases use AdamW.")
    if arguments["ema_decay"]:
        found.append(f"The weights are an exponential moving average (EMA) with decay {arguments['ema_decay']:g}.")
    if len(arguments["texts"]) > 1:
        found.append(f"It is trained on other texts as well: {', '.join(arguments['texts'][1:])}.")
    if arguments["init_from"]:
        found.append("It is initialised from the weights of another run, named in the command.")
    if arguments.get("grow_from"):
        found.append("It is initialised from a smaller checkpoint (Net2Net), named in the command.")
    if record.get("average_of"):
        found.append(f"The weights are the average of {len(record['average_of'])} runs, named in the last command.")
    return found


class _Settings(BaseModel):
    dataset: str
    variant: VariantName
    prefix_words: int | None
    written_from: str | None = None


class _Measured(BaseModel):
    mentions: dict[str, Any]
    originality: dict[str, Any]


class _InDomain(BaseModel):
    items: int
    models: dict[str, _Measured]


class _Sets(BaseModel):
    in_domain: _InDomain


class _Results(BaseModel):
    """The parts of `results.json` that a card uses."""

    settings: _Settings
    models: dict[str, Any]
    grounding: dict[str, Any]
    sets: _Sets


def add_evaluation(folder: Path, report: Path) -> None:
    """Copy the results of a checkpoint from a report of `nanovlm evaluate` to its `evaluation.json`.

    Raises:
        InputError: if the report has no results of this checkpoint, or no grounding.
    """
    results = read_json(report / "results.json")
    validate(results, _Results, report / "results.json")
    name = short_name(str(folder))
    if name not in results["models"]:
        raise InputError(f"{report}: results.json has no model {name}: evaluate it")
    if name not in results["grounding"]:
        raise InputError(f"{report}: grounding was left out: evaluate with --grounding-images")
    if name not in results["sets"]["in_domain"]["models"]:
        raise InputError(f"{report}: results.json has no completions of {name}: evaluate it again")
    settings = results["settings"]
    in_domain = results["sets"]["in_domain"]
    measured = dict(in_domain["models"][name])
    mentions = measured["mentions"].pop("rows")
    measured["originality"].pop("rows")
    completions = report / "completions" / f"{name}.jsonl"
    examples = _examples(completions)
    if len(examples) != len(mentions):
        raise InputError(
            f"{completions}: {len(examples)} completions, but results.json was written for {len(mentions)}: "
            f"evaluate {name} again"
        )
    failures = sorted(range(len(examples)), key=lambda index: -len(mentions[index]["unseen"]))[:FAILURES]
    write_json(
        folder / "evaluation.json",
        {
            "dataset": settings["dataset"],
            "variant": settings["variant"],
            "written_from": settings.get("written_from"),
            "items": in_domain["items"],
            "prefix_words": settings["prefix_words"] or PREFIX_WORDS[settings["variant"]],
            "grounding": results["grounding"][name],
            "in_domain": measured,
            "examples": examples[:EXAMPLES],
            "graders": own_grades(name, read_records(report / "grades")),
            "failures": [examples[index] | {"unseen": mentions[index]["unseen"]} for index in failures],
        },
    )


def own_grades(name: str, records: list[GraderRecord]) -> list[dict[str, Any]]:
    """Return the means that outside graders gave a model, and the reference descriptions next to it."""
    found = []
    for record in records:
        models = [one for one in record.models if (one.source, one.model) in (("model", name), ("reference", ""))]
        if any(one.source == "model" for one in models):
            kept = record.model_copy(update={"models": models, "lines": [], "flagged": []})
            found.append(kept.model_dump(mode="json"))
    return found


def _examples(completions: Path) -> list[dict[str, str]]:
    """Return the prefix, completion and rest of the reference of each item."""
    return [
        {
            "item_id": row.item_id,
            "prefix": row.prefix,
            "completion": row.completion,
            "reference": row.reference[len(row.prefix) :].strip(),
        }
        for row in read_rows(completions)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the model card of a checkpoint.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory of a checkpoint")
    parser.add_argument("--report", type=Path, help="directory that `nanovlm evaluate` wrote")
    arguments = parser.parse_args()
    with one_line_errors("model_card"):
        if arguments.report is not None:
            add_evaluation(arguments.checkpoint, arguments.report)
        write_card(arguments.checkpoint)


if __name__ == "__main__":
    main()
