"""The card of a checkpoint, filled from the files beside its weights.

`python training/card.py CHECKPOINT` writes it anew; `--report FOLDER` adds what `nanovlm evaluate` measured.
"""

from __future__ import annotations

import argparse
import functools
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from arguments import TrainingArguments, read_arguments
from huggingface_hub import ModelCard, ModelCardData
from machines import gpu_of
from messages import one_line_errors
from run_folder import RECORD, photos_per_step
from setup_run import PAPERS_NAMES

from nanovlm_hf import InputError, NanoVLMConfig
from nanovlm_hf.checkpoints import NAMES
from nanovlm_hf.data.card import NAMES as DATASETS
from nanovlm_hf.data.sources import read_json
from nanovlm_hf.evaluation.completions import read_rows, write_json
from nanovlm_hf.evaluation.items import PREFIX_WORDS
from nanovlm_hf.evaluation.report import interval
from nanovlm_hf.files import written_whole
from nanovlm_hf.publish import eval_results

CONFIGS = Path(__file__).parent / "configs"
PAPERS_LEARNING_RATE = 1e-3  # section 2.3
EXAMPLES, FAILURES = 4, 4  # rows of a card
WATTS_OF_A_CORE = 10  # of a server's processor, with its share of the memory
GRAMS_OF_CO2_A_KWH = 480  # the world's mean in 2023 (Ember, Global Electricity Review 2024)


def write_card(folder: Path) -> None:
    """Writes `README.md` from the files of a checkpoint."""
    text = card(folder)
    with written_whole(folder / "README.md") as file:
        file.write(text)


def card(folder: Path) -> str:
    """The model card of a checkpoint: `hub_cards/model_card.md`, filled from the files beside the weights.

    Raises:
        InputError: if a file or a metric is missing.
    """
    if not (folder / RECORD).exists() or not (folder / "metrics.json").exists():
        raise InputError(f"{folder}: there is no {RECORD} or metrics.json: training writes both beside a best model")
    record = yaml.safe_load((folder / RECORD).read_text(encoding="utf-8"))
    evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").exists() else None
    config = NanoVLMConfig.from_pretrained(folder)
    arguments, photos, name = record["arguments"], record["data"], record["name"]
    counts = config.parameter_counts()
    train = photos["train"]["photos"]
    data = record["about"] or (
        f"{f'{train:,} photos' if train else 'A stream of photos'} to train and {photos['validation']['photos']:,} to "
        f"validate of the dataset `{arguments['dataset']}`."
    )
    own_sizes = any(arguments[name] is not None for name in PAPERS_NAMES)
    taken = _compute(record)
    card_data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["nanovlm_hf", "image-captioning"],
        datasets=[DATASETS[arguments["variant"]]],
        model_name=name,
        eval_results=eval_results(folder),
        **({} if taken["grams"] is None else {"co2_eq_emissions": _emissions(taken)}),
    )
    filled = ModelCard.from_template(
        card_data,
        template_str=files("nanovlm_hf.hub_cards").joinpath("model_card.md").read_text(encoding="utf-8"),
        name=name,
        load_from=f'nanovlm_hf.SHIPPED["{name}"]' if name in NAMES else f'"runs/{name}/best"',
        description=DATASETS[arguments["variant"]],
        size=f"The {arguments['preset']}" if not own_sizes else f"A variant of the {arguments['preset']}",
        parameters=f"{counts['total'] / 1e6:.1f}M",
        shares="/".join(f"{100 * counts[part] / counts['total']:.0f}" for part in ("encoder", "projector", "decoder")),
        image_tokens="one token" if config.image_seq_length == 1 else f"{config.image_seq_length} tokens",
        data=data.strip(),
        beyond=beyond_the_paper(record),
        batch_size=photos_per_step(record),
        dropout=arguments["dropout"],
        precision="bf16 autocast" if arguments["mixed_precision"] == "bf16" else "float32",
        device=record["device"],
        command="\n".join(line for one in lineage(record) for line in command(one)),
        compute=_told(taken, others=bool(record["before"])),
        validation_photos=f"{photos['validation']['photos']:,}",
        metrics=read_json(folder / "metrics.json"),
        evaluation=evaluation,
        interval=functools.partial(interval, percent=True),
    )
    return f"{str(filled).rstrip()}\n"


def beyond_the_paper(record: dict[str, Any]) -> str:
    """What a run does that the paper does not tell of, in a sentence."""
    arguments = record["arguments"]
    did = []
    if arguments["learning_rate"] != PAPERS_LEARNING_RATE:
        did.append(f"the learning rate is {arguments['learning_rate']:g} instead of {PAPERS_LEARNING_RATE:g}")
    if arguments["vision_initializer_range"] is None:
        did.append("the first weights of the encoder are scaled by fan-in")
    if arguments["augment"]:
        did.append("photos are cropped, mirrored and lit at random")
    if arguments.get("patch_dropout"):
        did.append(f"{100 * arguments['patch_dropout']:.0f}% of the patches, others each time, were hidden in training")
    if arguments["visual_words_weight"]:
        did.append("an auxiliary loss without parameters of its own makes the visual token name the captions' words")
    if arguments.get("muon_learning_rate"):
        did.append("Muon instead of AdamW changes the matrices between embedding and head")
    if arguments["ema_decay"]:
        did.append("the weights are a moving average")
    if len(arguments["texts"]) > 1:
        did.append(f"it also learned to write {' and '.join(arguments['texts'][1:])}")
    if arguments["init_from"]:
        did.append("it began from the weights of another run, which the command names")
    if arguments.get("grow_from"):
        did.append("it was grown from the weights of a smaller one, whose run the command names")
    if record.get("average_of"):
        did.append(f"the weights are the mean of {len(record['average_of'])} runs', which the last command names")
    return f"Beyond the paper: {', '.join(did)}." if did else "Nothing in it is beyond the paper."


def lineage(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A run and all runs before it, each once, the first one first."""
    runs: list[dict[str, Any]] = []
    for one in (*(each for before in record["before"] for each in lineage(before)), record):
        if one not in runs:
            runs.append(one)
    return runs


def command(record: dict[str, Any]) -> list[str]:
    """How to run a run again with the code of today: its YAML file, where there is one, and what was given anew. A
    field that is younger than the run has the value that leaves it out. Before it, the commit of the run's own code."""
    commit = [f"# made with the code of {record['git_commit']}"] if record["git_commit"] else []
    if record.get("average_of"):
        runs = " ".join(record["average_of"])
        return [*commit, f"python training/average.py {runs} --out {record['arguments']['output_dir']}"]
    return [*commit, _launch(record["arguments"])]


def _launch(arguments: dict[str, Any]) -> str:
    name = Path(arguments["output_dir"]).name
    text = "accelerate launch training/train.py"
    defaults = vars(TrainingArguments(dataset="data", output_dir=arguments["output_dir"], variant=arguments["variant"]))
    if (CONFIGS / f"{name}.yaml").exists():
        usual = vars(read_arguments(["--config", str(CONFIGS / f"{name}.yaml")]))
        text += f" --config training/configs/{name}.yaml"
    else:
        usual = defaults | {"variant": TrainingArguments.variant}
        text += f" --dataset data --output_dir {arguments['output_dir']}"
    arguments = defaults | arguments
    for field, value in arguments.items():
        if field in ("dataset", "output_dir", "tokenizer", "trackers") or value == usual[field]:
            continue
        text += f" --{field} {' '.join(map(str, value)) if isinstance(value, list) else value}"
    return text


def _compute(record: dict[str, Any]) -> dict[str, Any]:
    """Hours, photos and grams of CO2 of a run and those before it."""
    runs = lineage(record)
    hours = sum(one["hours"] for one in runs)
    photos = sum(one["photos_seen"] for one in runs)
    watts = [_watts(one["device"]) for one in runs]
    grams = None
    if None not in watts:
        grams = sum(one["hours"] * power / 1000 * GRAMS_OF_CO2_A_KWH for one, power in zip(runs, watts, strict=True))
    return {"hours": hours, "photos": photos, "grams": grams, "watts": watts[-1], "device": record["device"]}


def _watts(device: str) -> int | None:
    cores = re.match(r"(\d+) cores? of ", device)
    if cores:
        return int(cores[1]) * WATTS_OF_A_CORE
    gpu = gpu_of(device)
    return gpu and gpu.watts


def _told(taken: dict[str, Any], others: bool) -> str:
    steps = "Its steps, with those of the runs before it," if others else "Its steps"
    text = f"{steps} took {taken['hours']:.1f} hours of {taken['device']} for {taken['photos']:,} photos, counted each "
    text += "time that one was seen."
    if taken["grams"] is not None:
        text += (
            f" Nobody measured the power: at {taken['watts']} W and the world's mean of {GRAMS_OF_CO2_A_KWH} g of CO2 "
            f"a kWh (2023) that is about {taken['grams']:.0f} g of CO2."
        )
    return text


def _emissions(taken: dict[str, Any]) -> dict[str, Any]:
    return {
        "emissions": round(taken["grams"], 1),
        "source": f"estimate: {taken['watts']} W, {GRAMS_OF_CO2_A_KWH} g a kWh",
        "training_type": "pre-training",
        "hardware_used": taken["device"],
    }


def add_evaluation(folder: Path, report: Path) -> None:
    """Takes a checkpoint's part of a report of `nanovlm evaluate` into `evaluation.json`.

    Raises:
        InputError: if the report has nothing of this checkpoint, or no grounding.
    """
    results = read_json(report / "results.json")
    if folder.name not in results["models"]:
        raise InputError(f"{report}: results.json says nothing of a model {folder.name}")
    if folder.name not in results["grounding"]:
        raise InputError(f"{report}: grounding was left out: evaluate with --grounding-photos")
    settings = results["settings"]
    in_domain = results["sets"]["in_domain"]
    measured = dict(in_domain["models"][folder.name])
    mentions = measured["mentions"].pop("rows")
    measured["originality"].pop("rows")
    rows = [vars(row) for row in read_rows(report / "completions" / f"{folder.name}.jsonl")]
    shown = [{name: row[name] for name in ("item_id", "prefix", "completion", "reference")} for row in rows]
    for row in shown:
        row["reference"] = row["reference"][len(row["prefix"]) :].strip()
    worst = sorted(range(len(rows)), key=lambda place: -len(mentions[place]["unseen"]))[:FAILURES]
    write_json(
        folder / "evaluation.json",
        {
            "dataset": settings["dataset"],
            "variant": settings["variant"],
            "items": in_domain["items"],
            "prefix_words": settings["prefix_words"] or PREFIX_WORDS[settings["variant"]],
            "grounding": results["grounding"][folder.name],
            "in_domain": measured,
            "examples": shown[:EXAMPLES],
            "failures": [shown[place] | {"unseen": mentions[place]["unseen"]} for place in worst],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the card of a checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--report", type=Path, help="folder that `nanovlm evaluate` wrote")
    arguments = parser.parse_args()
    with one_line_errors("card.py"):
        if arguments.report is not None:
            add_evaluation(arguments.checkpoint, arguments.report)
        write_card(arguments.checkpoint)


if __name__ == "__main__":
    main()
