"""Means with confidence intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

RESAMPLES = 10_000
BATCH = 100  # resamples in memory at a time; another value draws other resamples


def bootstrap(values: list[float] | np.ndarray, seed: int = 0) -> dict[str, float | int | None]:
    """Return a mean with its 95% confidence interval (percentile bootstrap with 10,000 resamples).

    Args:
        values: one value for each item, so that everything measured on an item is resampled together.

    Returns:
        `mean`, `low`, `high` (None without values) and `items`.
    """
    from scipy import stats  # imported here because training uses this package without needing intervals

    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return {"mean": None, "low": None, "high": None, "items": 0}
    mean = float(values.mean())
    if len(values) == 1:  # `scipy.stats.bootstrap` needs two observations
        return {"mean": mean, "low": mean, "high": mean, "items": 1}
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=BATCH,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return {"mean": mean, "low": float(found.low), "high": float(found.high), "items": len(values)}


def interval(value: dict[str, Any], digits: int = 2, percent: bool = False) -> str:
    """Return what `bootstrap` returned as `mean [low, high]`, or a dash without values."""
    if value["mean"] is None:
        return "-"
    if percent:
        return f"{100 * value['mean']:.0f}% [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
