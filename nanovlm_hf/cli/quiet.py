"""Keep the terminal free for a command's own output."""

from __future__ import annotations


def quiet() -> None:
    """Silence Python warnings, and the warnings and progress bars of Transformers."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def quiet_datasets() -> None:
    """Silence the progress bars of `datasets`, and its log, which repeats errors that the command reports."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
