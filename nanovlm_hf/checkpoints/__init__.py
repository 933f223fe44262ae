"""The checkpoints that ship, by short name: mini inside the package, larger ones in the repository beside it."""

from pathlib import Path

NAMES = tuple(f"{preset}-{variant}" for preset in ("mini", "base", "large") for variant in ("short", "long"))
_FOLDERS = (Path(__file__).parent, Path(__file__).parents[2] / "checkpoints")
# Those that are on this machine.
SHIPPED = {name: folder / name for name in NAMES for folder in _FOLDERS if (folder / name / "config.json").exists()}
