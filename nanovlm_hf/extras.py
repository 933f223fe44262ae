"""Optional packages: which extra installs them, and the one line that says so when one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import UsageError

# Import names of the packages that each extra of setup.cfg adds.
EXTRAS = {
    "data": ("lemminflect", "matplotlib", "py3langid", "rensa", "requests"),
    "eval": ("lemminflect", "matplotlib", "scipy"),
    "demo": ("gradio",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "serve": ("fastapi", "uvicorn"),
}


def require(extra: str, command: str) -> None:
    """Raise an error before any work is done if a package of an extra is not installed.

    Args:
        extra: `data`, `eval`, `demo`, `onnx` or `serve`.
        command: that needs it, for the message.

    Raises:
        UsageError: with the missing packages and the command that installs them.
    """
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise UsageError(f"`{command}` needs {', '.join(missing)}: pip install 'nanovlm-hf[{extra}]'")


def missing_extra(error: ModuleNotFoundError) -> UsageError | None:
    """Return what to tell a user whose environment lacks an optional package; None for any other module."""
    name = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if name in packages:
            return UsageError(f"{name} is not installed: pip install 'nanovlm-hf[{extra}]'")
    return None
