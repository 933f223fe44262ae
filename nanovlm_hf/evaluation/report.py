"""The report: one page that needs nothing beside it, and the same tables in Markdown."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import written_whole
from .human import data_uri
from .judge import CRITERIA
from .templates import render

if TYPE_CHECKING:
    from .run import ItemSet

TITLES = {"in_domain": "In the domain", "out_of_domain": "Out of the domain"}


@dataclass
class Table:
    """A table of a report, its cells as text.

    Attributes:
        paper: which rows are the paper's own, by number.
    """

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    paper: frozenset[int] = frozenset()


def write_report(out: Path, results: dict[str, Any], sets: list[ItemSet]) -> None:
    """Writes `index.html` and `report.md`, with the histograms as PNG files beside them."""
    tables = [table for table in _tables(results) if table.rows]
    pictures = {one.name: _histogram(results["sets"][one.name]) for one in sets}
    for name, picture in pictures.items():
        (out / f"originality-{name.replace('_', '-')}.png").write_bytes(picture)
    fields = {
        "title": f"{_names(list(results['models']))} on {_data_name(results['settings'])}",
        "settings": {name: value for name, value in results["settings"].items() if value not in (None, "")},
        "tables": tables,
        "histograms": [
            {
                "title": TITLES[name],
                "file": f"originality-{name.replace('_', '-')}.png",
                "uri": f"data:image/png;base64,{base64.b64encode(picture).decode()}",
            }
            for name, picture in pictures.items()
        ],
    }
    with written_whole(out / "report.md") as file:
        file.write(render("report.md", **fields))
    galleries = [{"title": TITLES[one.name], "items": _gallery(one, results)} for one in sets]
    with written_whole(out / "index.html") as file:
        file.write(render("report.html", galleries=galleries, **fields))


def _names(models: list[str]) -> str:
    return ", ".join(models) if len(models) < 4 else f"{len(models)} models"


def _data_name(settings: dict[str, Any]) -> str:
    return f"{settings['dataset']} ({settings['variant']}, {settings['split']})"


def _tables(results: dict[str, Any]) -> list[Table]:
    tables = []
    for name, one in results["sets"].items():
        where = f", {TITLES[name].lower()}" if len(results["sets"]) > 1 else ""
        if "judge" in one:
            tables.append(_judge_table(one, results["settings"]["variant"], name == "in_domain", where))
        tables += [_words_table(one, where), _originality_table(one, where)]
    tables += [_grounding_table(results["grounding"]), _foils_table(results["grounding"])]
    tables.append(_speed_table(results["sets"]["in_domain"]))
    return tables


def interval(value: dict[str, Any], digits: int = 2, percent: bool = False) -> str:
    """`mean [low, high]`, or a dash where there is nothing."""
    if value["mean"] is None:
        return "-"
    if percent:
        return f"{100 * value['mean']:.0f}% [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _judge_table(one: dict[str, Any], variant: str, with_paper: bool, where: str) -> Table:
    judge = one["judge"]
    rows = [
        [
            name,
            *(interval(graded["scores"][criterion]) for criterion in CRITERIA),
            interval(graded["total"]),
            str(graded["missing"]),
        ]
        for name, graded in judge["models"].items()
    ]
    paper: frozenset[int] = frozenset()
    facts = json.loads(files("nanovlm_hf.evaluation").joinpath("facts/table3.json").read_text(encoding="utf-8"))
    if with_paper:
        paper = frozenset(range(len(rows), len(rows) + len(facts[variant])))
        rows += [
            [f"{name}, the paper's ({values['size']})"]
            + [f"{values[criterion]:.2f}" for criterion in (*CRITERIA, "total")]
            + ["-"]
            for name, values in facts[variant].items()
        ]
    seen = "The judge saw the photos." if judge["sees_the_photo"] else "The judge did not see the photos."
    prompt = "the paper's Prompt 3" if judge["paper_prompt"] else "a prompt of its own"
    note = (
        f"Judge: {judge['judge']}, {' to '.join(dict.fromkeys(judge['dates'])) or 'never'}, {prompt} "
        f"(sha256 {judge['prompt_sha256']}), parameters {json.dumps(judge['parameters'])}, {judge['repeats']} grades "
        f"for each completion, means over items with bootstrap 95% intervals. {seen}"
    )
    if with_paper:
        note += (
            " Rows in italics are the paper's own numbers: another judge, other items; not to be compared to a tenth."
        )
    return Table(
        f"Grades of 0 to 10 (Table 3){where}", note, ["model", *CRITERIA, "total of 50", "missing"], rows, paper
    )


def _words_table(one: dict[str, Any], where: str) -> Table:
    rows = [
        [
            name,
            f"{measured['coherence']['words']:.1f}",
            f"{100 * measured['coherence']['repetition_rate']:.0f}%",
            f"{100 * measured['coherence']['end_rate']:.0f}%",
            f"{100 * measured['coherence']['empty_rate']:.0f}%",
            f"{100 * measured['coherence']['known_words']:.1f}%",
            interval(measured["mentions"]["precision"], percent=True),
            interval(measured["mentions"]["recall"], percent=True),
        ]
        for name, measured in one["models"].items()
    ]
    note = (
        "Of the words that a model added. Repeats: three words in a row come again. Known: words that the training "
        "texts have. Things: of those that it names, how many one of five people named too (precision); of those that "
        "two people named, how many it names (recall); the prefix's do not count."
    )
    header = ["model", "words", "repeats", "ends", "empty", "known words", "things, precision", "things, recall"]
    return Table(f"Coherence without a judge, and things{where}", note, header, rows)


def _originality_table(one: dict[str, Any], where: str) -> Table:
    rows = []
    for name, measured in one["models"].items():
        own = measured["originality"]
        rows.append(
            [
                name,
                "-" if own["rouge1_reference"] is None else f"{own['rouge1_reference']:.3f}",
                f"{own['rouge1_nearest']:.3f}",
                f"{100 * own['rouge1_nearest_share_below_half']:.0f}%",
                f"{own['rouge1_nearest_whole']:.3f}",
                f"{100 * own['rouge1_nearest_whole_share_below_half']:.0f}%",
                f"{own['longest_copy_words']:.1f}",
                f"{own['distinct_1']:.2f} / {own['distinct_2']:.2f}",
            ]
        )
    note = (
        "ROUGE-1 (F) of the words that a model added, to their reference and to the nearest of all training texts; "
        "then with the prefix, as the paper may have counted. The paper says about 0.5 or less."
    )
    header = [
        "model",
        "reference",
        "nearest",
        "below 0.5",
        "nearest, with prefix",
        "below 0.5",
        "copied words",
        "distinct-1 / 2",
    ]
    return Table(f"Originality (figure 8){where}", note, header, rows)


def _grounding_table(grounding: dict[str, Any]) -> Table:
    rows = []
    for name, one in grounding.items():
        row = [
            name,
            f"{one['eval_loss']:.3f}",
            f"{one['eval_loss_wrong_photo']:.3f}",
            f"{one['grounding_gap']:.3f} [{one['grounding_gap_low']:.3f}, {one['grounding_gap_high']:.3f}]",
        ]
        for size in ("32", "100"):
            found = one["retrieval"].get(size)
            row += (
                ["-", "-"]
                if found is None
                else [
                    interval(found["r_at_1"], percent=True),
                    interval(found["r_at_5"], percent=True),
                ]
            )
        rows.append(row)
    note = (
        "On validation photos: loss in nats per token with the right and with a wrong photo; the gap is 0 for a model "
        "that does not look. R@1 and R@5: how often the photo's own description is the likeliest of 32 or 100, or "
        "among five (by chance 3% and 16%, 1% and 5%), each text's mean over the photos taken off."
    )
    header = ["model", "loss", "wrong photo", "gap", "R@1 of 32", "R@5 of 32", "R@1 of 100", "R@5 of 100"]
    return Table("Does it look at the picture?", note, header, rows)


def _foils_table(grounding: dict[str, Any]) -> Table:
    kinds = ("colour", "object", "count")
    rows = []
    for name, one in grounding.items():
        cells = (one["foils"][kind][what] for kind in kinds for what in ("accuracy", "wrong_photo", "photo_helps"))
        rows.append([name, *(interval(cell, percent=True) for cell in cells)])
    note = (
        "How often the true description is likelier than the same one with a colour, an object or a count swapped; "
        "beside it the same with a wrong photo, which is what the language alone prefers, and how often the true text "
        "is ahead by more with the right photo than with the wrong one (half of the time by chance)."
    )
    header = ["model", *(text for kind in kinds for text in (kind, "wrong photo", "photo helps"))]
    return Table("Foils", note, header, rows)


def _speed_table(one: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            f"{measured['parameters'] / 1e6:.1f}M",
            f"{measured['seconds_per_completion']:.2f}",
            f"{measured['tokens_per_second']:.0f}",
            f"{measured['memory_mib']}",
        ]
        for name, measured in one["models"].items()
    ]
    note = (
        "One item at a time, as measured here: median seconds, tokens over all time, peak memory of the process or GPU."
    )
    return Table("Size and speed", note, ["model", "parameters", "seconds", "tokens/s", "MiB"], rows)


def _histogram(one: dict[str, Any]) -> bytes:
    """ROUGE-1 to the nearest training text, a panel for each model, with the line at 0.5 (figure 8); PNG."""
    from matplotlib.figure import Figure

    models = one["models"]
    figure = Figure(figsize=(7, 0.6 + 1.5 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, measured) in zip(panels, models.items(), strict=True):
        rows = measured["originality"]["rows"]
        for key, label, color in (
            ("rouge1_nearest", "words added", "C0"),
            ("rouge1_nearest_whole", "with the prefix", "C1"),
        ):
            panel.hist([row[key] for row in rows], bins=20, range=(0, 1), alpha=0.6, label=label, color=color)
        panel.axvline(0.5, color="0.3", linestyle="--", linewidth=1)
        panel.set_title(name, fontsize=9, loc="left")
        panel.set_ylabel("items", fontsize=8)
    panels[0].legend(fontsize=8)
    panels[-1].set(xlim=(0, 1), xlabel="ROUGE-1 to the nearest training text")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def _gallery(one: ItemSet, results: dict[str, Any]) -> list[dict[str, Any]]:
    """For each item its photo, what was given, and what every model added, with its grades (figures 7, 9 to 13)."""
    measured = results["sets"][one.name]
    lines = measured.get("judge", {}).get("lines", [])
    grades = {(line["item_id"], line["model"]): line for line in lines}
    shown = []
    for place, item in enumerate(one.items):
        texts = []
        for name, rows in one.rows.items():
            line = grades.get((item.item_id, name))
            texts.append(
                {
                    "model": name,
                    "completion": rows[place].completion,
                    "scores": line and line["scores"],
                    "total": line and line["total"],
                    "missing": line and line.get("missing"),
                    "unseen": measured["models"][name]["mentions"]["rows"][place]["unseen"],
                    "rouge": measured["models"][name]["originality"]["rows"][place]["rouge1_nearest"],
                }
            )
        shown.append(
            {
                "item_id": item.item_id,
                "picture": data_uri(item.image),
                "prefix": item.prefix,
                "reference": item.reference,
                "texts": texts,
            }
        )
    return shown
