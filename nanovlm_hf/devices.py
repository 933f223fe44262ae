"""Device, mixed precision, number of cores and peak memory: the one place that knows the hardware."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

_STATUS = Path("/proc/self/status")

# Values of oneDNN's ONEDNN_MAX_CPU_ISA that disable the bfloat16 instructions.
_ISAS_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


class Precision(NamedTuple):
    """Mixed precision of a run.

    Attributes:
        value: `bf16` (autocast) or `no` (float32), as in Accelerate.
        message: the value and the reason, in one line.
    """

    value: str
    message: str


def default_device() -> torch.device:
    """Return the best available device: CUDA, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def cpu_count() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # no affinity on macOS and Windows
        return os.cpu_count() or 1


def peak_memory_mib(device: torch.device | None = None) -> int | None:
    """Return the peak memory in MiB: what PyTorch allocated on a CUDA device, else what this process had resident.

    On Linux the latter is `VmHWM` of /proc: `ru_maxrss` includes the memory of the process that started this one. On
    Windows, which has no `getrusage`, it is None.
    """
    if device is not None and device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    with contextlib.suppress(OSError, IndexError):
        return int(_STATUS.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) // 2**10
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, else KiB


def cpu_has_bf16() -> bool:
    """Return whether the CPU multiplies bfloat16 in hardware (AVX512-bf16 or AMX) and oneDNN may use it."""
    return _cpu_bf16() is not None


def has_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 matrix products are fast on a device; False for Apple's MPS, where it is unmeasured."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_has_bf16()


def choose_precision(requested: str, device: torch.device) -> Precision:
    """Choose the mixed precision of a run.

    Args:
        requested: `auto`, `no` or `bf16`. `auto` is bf16 if the device multiplies it in hardware, otherwise float32.
        device: of the run.
    """
    fast = has_bf16(device)
    value = requested if requested != "auto" else "bf16" if fast else "no"
    reason = _reason(device, fast)
    if value == "bf16" and not fast:
        reason = f"as requested, although {reason}: use auto for float32"
    elif requested != "auto":
        reason = "as requested"
    return Precision(value, f"mixed_precision: {value} ({reason})")


def _reason(device: torch.device, fast: bool) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return name if fast else f"{name} does not multiply bfloat16 in hardware"
    if device.type != "cpu":
        return f"bf16 has not been measured on {device.type}"
    return _cpu_bf16() or "this CPU has no bfloat16 instructions; bf16 would be several times slower"


def _cpu_bf16() -> str | None:
    """Return the instruction set with which the CPU multiplies bfloat16, or None."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _ISAS_WITHOUT_BF16:
        return None
    names = {"_is_amx_tile_supported": "AMX", "_is_avx512_bf16_supported": "AVX512-bf16"}
    for check, name in names.items():
        if getattr(torch.cpu, check, lambda: False)():
            return name
    return None
