"""The compute of a checkpoint: device, hours, images and estimated CO2 of each run in its lineage."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import without_controls
from .gpu_specs import gpu_of
from .lineage import lineage

WATTS_PER_CORE = 10  # of a server CPU, including a share of the memory
GRAMS_OF_CO2_PER_KWH = 480  # world average in 2023 (Ember, Global Electricity Review 2024)


@dataclass(frozen=True)
class Stage:
    """The cost of one run.

    Attributes:
        run: the directory of the run.
        units: the number of cores or GPUs.
        kind: the name of the CPU or GPU.
        is_cpu: whether the units are cores.
        hours: wall-clock time of the steps.
        images: the number of images, counted each time that one is seen.
        watts: the estimated power of all units, or None for an unknown device.
    """

    run: str
    units: int
    kind: str
    is_cpu: bool
    hours: float
    images: int
    watts: int | None

    @property
    def grams(self) -> float | None:
        """The estimated CO2, or None for an unknown device."""
        return None if self.watts is None else self.hours * self.watts / 1000 * GRAMS_OF_CO2_PER_KWH

    @property
    def hardware(self) -> str:
        """The device in words."""
        if self.is_cpu:
            return f"{self.units} {'core' if self.units == 1 else 'cores'} of {self.kind}"
        return self.kind if self.units == 1 else f"{self.units} x {self.kind}"


def stages(record: dict[str, Any]) -> list[Stage]:
    """Return the cost of each run in a lineage."""
    return [_stage(one) for one in lineage(record)]


def _stage(record: dict[str, Any]) -> Stage:
    cores = re.match(r"(\d{1,6}) cores? of (.*)", record["device"])
    if cores:  # the processes of a machine share its cores
        units, kind, watts = int(cores[1]), cores[2], int(cores[1]) * WATTS_PER_CORE
    else:
        units, kind, gpu = record["processes"], record["device"], gpu_of(record["device"])
        watts = gpu and units * gpu.watts
    run = plain(record["arguments"]["output_dir"])
    return Stage(run, units, plain(kind), bool(cores), record["hours"], record["photos_seen"], watts)


def plain(text: str) -> str:
    """Return a text in one line, without characters that end the cell of a table or begin Markdown or HTML."""
    return re.sub(r"[|`<>\[\]]", "?", without_controls(text))


def unit_hours(stages: list[Stage]) -> dict[str, float]:
    """Return the core-hours of each kind of CPU and the GPU-hours of each kind of GPU."""
    sums: dict[str, float] = {}
    for stage in stages:
        name = f"{'core-hours' if stage.is_cpu else 'GPU-hours'} of {stage.kind}"
        sums[name] = sums.get(name, 0) + stage.units * stage.hours
    return sums


def total_grams(stages: list[Stage]) -> float | None:
    """Return the estimated CO2 of all stages, or None if one of them is unknown."""
    grams = [stage.grams for stage in stages]
    return None if None in grams else sum(grams)


def compute_statement(stages: list[Stage]) -> str:
    """Return a Markdown table of the stages, with their totals below it."""
    lines = ["| run | images seen | hours | hardware | CO2 (g) |", "|---|---|---|---|---|"]
    for stage in stages:
        grams = "unknown" if stage.grams is None else f"{stage.grams:.1f}"
        lines.append(f"| `{stage.run}` | {stage.images:,} | {stage.hours:.2f} | {stage.hardware} | {grams} |")
    hours = " and ".join(f"{value:.2f} {name}" for name, value in unit_hours(stages).items())
    images = sum(stage.images for stage in stages)
    lines += ["", f"In total: {hours} and {images:,} images, counted each time that one is seen."]
    lines += ["Hours are the wall-clock time of the training steps."]
    grams = total_grams(stages)
    if grams is not None:
        lines.append(f"CO2 is estimated, not measured: about {grams:.0f} g, assuming {_assumptions(stages)}.")
    return "\n".join(lines)


def emissions(stages: list[Stage]) -> dict[str, Any] | None:
    """Return the estimate in the form of the Hub's metadata (`co2_eq_emissions`), or None if it is unknown."""
    grams = total_grams(stages)
    if grams is None:
        return None
    hours: dict[str, float] = {}
    for stage in stages:
        hours[stage.hardware] = hours.get(stage.hardware, 0) + stage.hours
    return {
        "emissions": round(grams, 1),
        "source": f"estimated, assuming {_assumptions(stages)}",
        "training_type": "pre-training",
        "hardware_used": ", ".join(f"{name} ({value:.2f} hours)" for name, value in hours.items()),
    }


def _assumptions(stages: list[Stage]) -> str:
    watts = [f"{WATTS_PER_CORE} W per core"] if any(stage.is_cpu for stage in stages) else []
    gpus = {stage.kind: stage.watts // stage.units for stage in stages if not stage.is_cpu and stage.watts}
    watts += [f"{value} W per {kind}" for kind, value in gpus.items()]
    return f"{', '.join(watts)} and the world average of {GRAMS_OF_CO2_PER_KWH} g of CO2 per kWh (2023)"
