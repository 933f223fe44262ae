"""`nanovlm evaluate human-score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import scrub
from ..extras import require
from . import options


def human_score(
    key: Annotated[Path, typer.Option(help="The .key.json file written with the rating form.")],
    ratings: Annotated[list[Path], typer.Option(help="File of one rater's ratings; may be repeated.")],
    judge: Annotated[
        Path | None,
        typer.Option(help="judge.json or results.json with the judge's grades to compare with.", show_default="none"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(callback=options.output_file, help="JSON file to write.", show_default="none")
    ] = None,
) -> None:
    """Print the mean human ratings, Krippendorff's alpha between raters, and the correlation with a judge."""
    require("eval", "nanovlm evaluate human-score")

    from ..evaluation.human import read_judged, score_ratings
    from ..evaluation.judge import CRITERIA
    from ..evaluation.report import interval
    from ..files import write_json

    result = score_ratings(key, ratings, None if judge is None else read_judged(judge))
    if out is not None:
        write_json(out, result)
    for name, scores in result["models"].items():
        print(f"{scrub(name, 60)}: " + ", ".join(f"{one} {interval(scores[one])}" for one in (*CRITERIA, "total")))
    shown = {name: "-" if value is None else f"{value:.3f}" for name, value in result["alpha"].items()}
    print(f"alpha between {result['raters']} raters: " + ", ".join(f"{name} {value}" for name, value in shown.items()))
    for name, found in result.get("judge", {}).items():
        values = {kind: "-" if found[kind] is None else f"{found[kind]:.3f}" for kind in ("pearson", "spearman")}
        print(f"judge, {name}: Pearson {values['pearson']}, Spearman {values['spearman']} over {found['items']} texts")
