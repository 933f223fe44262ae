"""Accelerate, set up for a run: device, mixed precision, trackers, sharding."""

from __future__ import annotations

import os
import sys

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, KwargsHandler

from ..devices import choose_precision, default_device
from ..errors import InputError
from .arguments import RunArguments


def make_accelerator(arguments: RunArguments) -> Accelerator:
    """Return the accelerator of a run and print the mixed precision that it uses.

    Raises:
        InputError: for a tracker that is unknown or not installed, and for FSDP without GPUs.
    """
    check_fsdp_device()
    on_cpu = default_device().type == "cpu"
    state = PartialState(cpu=on_cpu)  # the launcher's configuration may choose the CPU as well
    precision = choose_precision(arguments.mixed_precision, state.device)
    if state.is_main_process:
        print(precision.message, file=sys.stderr)
    try:
        accelerator = Accelerator(
            mixed_precision=precision.value,
            cpu=on_cpu,
            log_with=arguments.trackers or None,
            project_dir=arguments.output_dir if arguments.trackers else None,
            kwargs_handlers=_handlers(arguments),
        )
    except (ImportError, ValueError) as error:
        raise InputError(f"trackers, mixed_precision: {error}") from None
    missing = set(arguments.trackers) - {str(tracker) for tracker in accelerator.log_with} - {"all"}
    if missing:  # Accelerate ignores it silently
        raise InputError(f"trackers: {sorted(missing)[0]} is not installed: install it, or leave it out")
    if accelerator.distributed_type == DistributedType.FSDP:
        # Autocast alone, as in every other run: FSDP's own policy would also round losses and gradients to bf16.
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = None
        # PyTorch unpickles the index (`.metadata`) of a sharded state, which could run code; a full state has none.
        plugin.state_dict_config = plugin.optim_state_dict_config = None
        plugin.set_state_dict_type("FULL_STATE_DICT")
    return accelerator


def _handlers(arguments: RunArguments) -> list[KwargsHandler]:
    """Have DDP look for the weights that no loss depends on, if there are any."""
    always_has_texts = any(arguments.weights_of_images)  # files may have fewer texts than a step has micro-batches
    if always_has_texts and arguments.trains_encoder:
        return []
    return [DistributedDataParallelKwargs(find_unused_parameters=True)]


def check_fsdp_device() -> None:
    """Raise InputError for FSDP on CPUs, for which Accelerate silently runs DDP."""
    if not torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise InputError(
            "accelerate: FSDP needs a GPU; on CPUs Accelerate falls back to DDP: launch without --use_fsdp"
        )
