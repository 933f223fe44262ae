"""Time several calls in turns, so that other load on the machine affects all of them alike."""

import statistics
import time
from collections.abc import Callable


def median_seconds(calls: dict[str, Callable[[int], object]], rounds: int, warm_up: int) -> dict[str, float]:
    """Return the median seconds of each call over `rounds`, after `warm_up` rounds; a call receives its round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call(number)
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
