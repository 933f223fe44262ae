"""Means with an interval."""

from __future__ import annotations

import numpy as np

RESAMPLES = 10_000


def bootstrap(values: list[float] | np.ndarray, seed: int = 0) -> dict[str, float | int | None]:
    """Mean and bootstrap 95% interval (percentiles of 10,000 means of resampled items).

    Args:
        values: one for each item, so that what belongs together is resampled together.

    Returns:
        `mean`, `low`, `high` (None if there is no value) and `items`.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return {"mean": None, "low": None, "high": None, "items": 0}
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [values[rng.integers(0, len(values), (100, len(values)))].mean(1) for _ in range(RESAMPLES // 100)]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "items": len(values)}
