"""The `nanovlm` command: one module for each sub-command.

Heavy imports are inside the functions, so that `--help` and usage errors respond at once.
"""

from .command import app, main

__all__ = ["app", "main"]
