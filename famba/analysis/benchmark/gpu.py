"""`famba benchmark gpu`: everything that docs/performance.md has to say of a GPU, in one run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from famba.analysis.benchmark import gpu_tables, model, ops
from famba.analysis.benchmark.cases import OPS
from famba.analysis.benchmark.contestants import obstacles
from famba.analysis.benchmark.gpu_tables import FAST_BACKENDS, PRECISION, filled, markdown
from famba.analysis.benchmark.machine import DTYPES
from famba.analysis.benchmark.model import STRATEGIES, TRANSFORMERS
from famba.analysis.benchmark.peaks import Peaks
from famba.analysis.benchmark.report import Report, told_packages
from famba.analysis.benchmark.timing import EventClock, overwriting_cache
from famba.errors import ConfigError

_FLOORS = (
    "**Floors alone, nothing measured**: worked out by `famba benchmark gpu --floors`; `famba benchmark gpu --fill "
    "docs/performance.md` measures the rest."
)


def check_cuda(device: torch.device) -> None:
    """Raise ConfigError for a device that is no CUDA device, saying what to do."""
    if device.type == "cuda":
        return
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    raise ConfigError(
        f"famba benchmark gpu measures a CUDA device, and was given {device.type} (torch {torch.__version__} {built}); "
        "run it on a machine with an NVIDIA GPU, its driver and a torch for CUDA, or take --floors, which needs none"
    )


def measure(device: torch.device, rounds: int, peaks: Peaks | None, report: Report) -> None:
    """Time ops and models at the sizes of the tables, with every backend that serves the device."""
    backends = [name for name, reason in obstacles(device, DTYPES[PRECISION]).items() if reason is None]
    sizes: dict[str, Any] = {"precisions": (PRECISION,), "rounds": rounds, "device": device, "peaks": peaks}
    clock = EventClock(device, overwriting_cache(device))
    of_ops = ops.Plan(
        ops=tuple(OPS),
        batches=(gpu_tables.BATCH,),
        lengths=(gpu_tables.LENGTH,),
        channels=gpu_tables.CHANNELS,
        states=gpu_tables.STATES,
        clock=clock,
        **sizes,
    )
    ops.benchmark_ops(of_ops, report)
    of_models = model.Plan(
        models=tuple(TRANSFORMERS),
        strategies=STRATEGIES,
        batch=gpu_tables.BATCH,
        image_size=gpu_tables.IMAGE_SIZE,
        threads=torch.get_num_threads(),
        backends=tuple(name for name in backends if name in FAST_BACKENDS),
        **sizes,
    )
    model.benchmark_model(of_models, report)


def floors() -> str:
    """The tables with floors alone."""
    return markdown(_FLOORS, None, None, None)


def tables(found: Mapping[str, Any], peaks: Peaks | None) -> str:
    """The tables of what `measure` found, by what a report's JSON holds."""
    provenance = found["provenance"]
    origin = (
        f"Measured on {provenance['device']}, CUDA {provenance['cuda']}, {provenance['started']}, famba "
        f"{provenance['famba']} at commit {provenance['git_commit']}, Python {provenance['python']}, "
        f"{told_packages(provenance)}, by `famba benchmark gpu`: medians of {found['settings']['rounds']} rounds, "
        f"contestants in turn. Models without the name of a backend ran on {provenance['backend']}."
    )
    if not found["complete"]:
        origin += " It was stopped before the end: what is missing has not been measured."
    origin += "".join(f" Left out: {line}." for line in found["left_out"])
    ops_rows, times, memory = (found.get(name) for name in ("ops", "times", "memory"))
    return markdown(origin, ops_rows, times, memory, peaks)


def found_before(file: Path) -> dict[str, Any]:
    """What a former call measured and wrote to a file; raises ConfigError for another file."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"--from {file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"--from {file} is no JSON ({error})") from error
    whole = {"benchmark", "complete", "provenance", "settings", "left_out"}
    if not isinstance(found, dict) or found.get("benchmark") != "gpu" or not whole <= found.keys():
        raise ConfigError(f"--from {file} was not written by famba benchmark gpu --json, or not in whole")
    return found


def fill(file: Path, text: str) -> None:
    """Put tables into a file, between its markers. Raises ConfigError where it has none."""
    file.write_text(filled(read(file), text))


def read(file: Path) -> str:
    """The text of a file that tables can be put into; raises ConfigError for another."""
    try:
        text = file.read_text()
    except OSError as error:
        raise ConfigError(f"--fill {file} cannot be read ({error.strerror}); name a file with markers") from error
    try:
        filled(text, "")
    except ConfigError as error:
        raise ConfigError(f"--fill {file}: {error}") from error
    return text
