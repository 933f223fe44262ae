"""Released checkpoints by short name: mini is part of the package, larger ones are in the repository."""

from pathlib import Path

from ..paper_nanovlm import PRESETS
from ..variants import VARIANTS

NAMES = tuple(f"{preset}-{variant}" for preset in PRESETS for variant in VARIANTS)
_FOLDERS = (Path(__file__).parent, Path(__file__).parents[2] / "checkpoints")
# The folders of those that are on this machine.
SHIPPED = {name: folder / name for name in NAMES for folder in _FOLDERS if (folder / name / "config.json").exists()}
