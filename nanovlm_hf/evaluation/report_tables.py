"""Tables of the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from . import judge as judging
from .assets import read_asset
from .intervals import interval
from .judge import HIGHEST

SET_TITLES = {"in_domain": "In-domain", "out_of_domain": "Out-of-domain"}
FOIL_KINDS = ("colour", "object", "count")


@dataclass
class Table:
    """A table of a report, with its cells as text.

    Attributes:
        paper: indices of the rows that hold numbers of the paper.
    """

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    paper: frozenset[int] = frozenset()


def report_tables(results: dict[str, Any]) -> list[Table]:
    """Return the tables of a report that have rows."""
    tables = []
    for name, one in results["sets"].items():
        suffix = f", {SET_TITLES[name].lower()}" if len(results["sets"]) > 1 else ""
        if "judge" in one:
            variant = results["settings"]["variant"] if name == "in_domain" else None
            tables += [judge_table(one["judge"], variant, suffix), flagged_table(one["judge"]["flagged"], suffix)]
        tables += [_coherence_table(one, suffix), _originality_table(one, suffix)]
    tables += [_grounding_table(results["grounding"]), _foils_table(results["grounding"])]
    tables.append(_speed_table(results["sets"]["in_domain"]))
    return [table for table in tables if table.rows]


def judge_table(judge: dict[str, Any], variant: str | None, suffix: str = "") -> Table:
    """Return the table of a judge's grades (Table 3).

    Args:
        judge: as `Judge.summary` returns it.
        variant: which of the paper's rows to add; None adds none.
    """
    rows = [
        [
            name,
            *(interval(graded["scores"][criterion]) for criterion in judging.CRITERIA),
            interval(graded["total"]),
            str(graded["missing"]),
        ]
        for name, graded in judge["models"].items()
    ]
    printed = [] if variant is None else _paper_rows(variant)
    return Table(
        f"Grades from 0 to {HIGHEST} (Table 3){suffix}",
        _judge_note(judge, with_paper=bool(printed)),
        ["model", *judging.CRITERIA, f"total of {judging.highest_total()}", "missing"],
        rows + printed,
        frozenset(range(len(rows), len(rows) + len(printed))),
    )


def _judge_note(judge: dict[str, Any], with_paper: bool) -> str:
    dates = " to ".join(dict.fromkeys(judge["dates"])) or "no grades yet"
    prompt = "Prompt 3 of the paper" if judge["paper_prompt"] else "a custom prompt"
    sentences = [
        f"Judge: {judge['judge']}, {dates}, {prompt} (sha256 {judge['prompt_sha256']}), parameters "
        f"{json.dumps(judge['parameters'])}, grades per completion: {judge['repeats']}; means over items with 95% "
        "bootstrap confidence intervals.",
        "The judge saw the images." if judge["sees_the_photo"] else "The judge did not see the images.",
    ]
    if judge["texts_delimited"]:
        sentences.append("The texts were delimited in the prompt and declared as data.")
    if judge["missing_reasons"]:
        reasons = (f"{reason} ({count})" for reason, count in judge["missing_reasons"].items())
        sentences.append(f"Missing: {', '.join(reasons)}.")
    if with_paper:
        sentences.append(
            "Rows in italics are the paper's numbers: they come from another judge and other items, so small "
            "differences mean nothing."
        )
    return " ".join(sentences)


def _paper_rows(variant: str) -> list[list[str]]:
    """Return the paper's rows of a variant; a criterion, or a variant, that the paper lacks is missing."""
    rows = []
    for name, values in json.loads(read_asset("table3.json")).get(variant, {}).items():
        printed = [criterion for criterion in values if criterion not in ("size", "total")]
        cells = [f"{values[criterion]:.2f}" if criterion in values else "-" for criterion in judging.CRITERIA]
        of = "" if set(printed) == set(judging.CRITERIA) else f" of {HIGHEST * len(printed)}"
        rows.append([f"{name} in the paper ({values['size']})", *cells, f"{values['total']:.2f}{of}", "-"])
    return rows


def flagged_table(flagged: list[dict[str, Any]], suffix: str) -> Table:
    """Return the table of texts that mention grades or instructions."""
    rows = [
        [one["model"], one["item_id"], one["flagged"], "-" if one["total"] is None else f"{one['total']:.2f}"]
        for one in flagged
    ]
    note = "These texts address the judge or mention grades or instructions: check whether they deserve their grades."
    return Table(f"Texts to check{suffix}", note, ["model", "item", "text", "total"], rows)


def _coherence_table(one: dict[str, Any], suffix: str) -> Table:
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
        "Measured on the words that a model added. Repetition: the same three words in a row occur twice. Complete: "
        "the text ends like a sentence. Known words: words of the training texts. Object precision (cf. CHAIR): share "
        "of the objects in a completion that a human caption mentions. Object recall: share of the objects in two or "
        "more captions that the completion mentions. Objects of the prefix do not count."
    )
    header = ["model", "words", "repetition", "complete", "empty", "known words", "object precision", "object recall"]
    return Table(f"Coherence and objects{suffix}", note, header, rows)


def _originality_table(one: dict[str, Any], suffix: str) -> Table:
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
        "ROUGE-1 (F measure) of the words that a model added, to the reference and to the nearest training text; then "
        "with the prefix, which the paper may have included. The paper reports about 0.5 or less."
    )
    header = [
        "model",
        "reference",
        "nearest",
        "below 0.5",
        "nearest, with prefix",
        "below 0.5",
        "longest copy (words)",
        "distinct-1 / 2",
    ]
    return Table(f"Originality (figure 8){suffix}", note, header, rows)


def _grounding_table(grounding: dict[str, Any]) -> Table:
    rows = []
    for name, one in grounding.items():
        row = [
            name,
            f"{one['eval_loss']:.3f}",
            f"{one['nats_per_word']:.3f}",
            f"{one['eval_loss_wrong_photo']:.3f}",
            f"{one['grounding_gap']:.3f} [{one['grounding_gap_low']:.3f}, {one['grounding_gap_high']:.3f}]",
        ]
        for size in ("32", "100"):
            found = one["retrieval"].get(size)
            cells = ("r_at_1", "r_at_5")
            row += ["-" if found is None else interval(found[cell], percent=True) for cell in cells]
        rows.append(row)
    note = (
        "On validation images: loss in nats per token with the matching image; the same in nats per word, which does "
        "not depend on the tokenizer; and with a mismatched image. The difference, the grounding gap, is 0 for a model "
        "that ignores the image. R@1 and R@5: how often an image's own description is the most likely of 32 or 100, or "
        "among the five most likely (by chance 3% and 16%, 1% and 5%), after subtracting each text's mean over the "
        "images."
    )
    header = ["model", "loss", "per word", "mismatched image", "gap"]
    header += ["R@1 of 32", "R@5 of 32", "R@1 of 100", "R@5 of 100"]
    return Table("Grounding", note, header, rows)


def _foils_table(grounding: dict[str, Any]) -> Table:
    measures = ("accuracy", "wrong_photo", "photo_helps")
    rows = []
    for name, one in grounding.items():
        cells = (one["foils"][kind][measure] for kind in FOIL_KINDS for measure in measures)
        rows.append([name, *(interval(cell, percent=True) for cell in cells)])
    note = (
        "How often the true description is more likely than the same text with a colour, an object or a count swapped; "
        "the same with a mismatched image, which shows what the language alone prefers; and how often the advantage of "
        "the true text is larger with the matching image than with the mismatched one (50% by chance)."
    )
    header = ["model", *(text for kind in FOIL_KINDS for text in (kind, "mismatched image", "image helps"))]
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
        "One item at a time on this machine: median seconds per completion, tokens per second, and peak memory of the "
        "process or GPU."
    )
    return Table("Size and speed", note, ["model", "parameters", "seconds", "tokens/s", "MiB"], rows)
