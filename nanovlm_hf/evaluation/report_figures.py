"""Figures of the report."""

from __future__ import annotations

import io
from typing import Any

from ..errors import scrub


def originality_histogram(models: dict[str, Any]) -> bytes:
    """Return a PNG of ROUGE-1 to the nearest training text, with a panel for each model and a line at 0.5 (figure 8).

    Args:
        models: measures of an item set by model.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 1.5 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, measured) in zip(panels, models.items(), strict=True):
        rows = measured["originality"]["rows"]
        for key, label, color in (
            ("rouge1_nearest", "completion", "C0"),
            ("rouge1_nearest_whole", "with the prefix", "C1"),
        ):
            panel.hist([row[key] for row in rows], bins=20, range=(0, 1), alpha=0.6, label=label, color=color)
        panel.axvline(0.5, color="0.3", linestyle="--", linewidth=1)
        panel.set_title(scrub(name, max_length=80), fontsize=9, loc="left", parse_math=False)
        panel.set_ylabel("items", fontsize=8)
    panels[0].legend(fontsize=8)
    panels[-1].set(xlim=(0, 1), xlabel="ROUGE-1 to the nearest training text")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()
