"""What is known of GPUs by their names."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """A GPU as NVIDIA's data sheets give it.

    Attributes:
        flops: operations a second without sparsity in bfloat16.
        watts: at most.
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
    """The GPU that a device's name tells of, or None."""
    return next((gpu for name, gpu in GPUS.items() if name in device), None)
