"""What several `nanovlm data` commands read and print alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import warn

if TYPE_CHECKING:
    from ..data.build import BuildSummary


def read_about(path: Path | None) -> str:
    """Return the Markdown of `--about`, or "" without one."""
    from ..files import read_text

    return "" if path is None else read_text(path)


def print_summary(summary: BuildSummary, out: Path) -> None:
    """Print the number of rows of each variant and split, and how many images were left out."""
    for variant, counts in summary.rows.items():
        print(f"{variant}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    if summary.skipped:
        warn(f"{out / summary.skipped_file}: {summary.skipped} images are left out")
