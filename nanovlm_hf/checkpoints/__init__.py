"""The checkpoints that ship inside the package, by short name."""

from pathlib import Path

PACKAGED = {"mini-short": Path(__file__).parent / "mini-short"}
