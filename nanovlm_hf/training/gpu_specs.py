"""Peak throughput and power of GPUs."""

from __future__ import annotations

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """Specifications from NVIDIA's data sheets.

    Attributes:
        flops: peak bfloat16 operations per second without sparsity.
        watts: maximum power.
    """

    flops: float
    watts: int


GPUS = {
    "H200": Gpu(989e12, 700),
    "H100": Gpu(989e12, 700),
    "A100": Gpu(312e12, 400),
    "L4": Gpu(121e12, 72),
    "RTX 4090": Gpu(165e12, 450),
}


def gpu_of(device: str) -> Gpu | None:
    """Return the specifications of the GPU with this device name, or None if it is unknown."""
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"\b{name}\b", device)), None)  # an L40S is no L4
