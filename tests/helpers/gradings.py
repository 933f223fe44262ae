"""Completions for the judge to grade."""

import json
from dataclasses import asdict

from nanovlm_hf.evaluation.completions import Row


def rows_of(number, model="mini"):
    return [
        Row(str(place), model, "There is a", f"There is a dog, number {place}.", f"dog, number {place}.")
        for place in range(number)
    ]


def write_completions(path, rows):
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return path
