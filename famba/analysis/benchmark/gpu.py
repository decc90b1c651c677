"""Measure what docs/performance.md says of a GPU, the most valuable first, for as long as there is time."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from famba.analysis.benchmark import ops
from famba.analysis.benchmark.report import Report, Row
from famba.analysis.benchmark.steps import DEITS, NOTE, STRATEGIES, Contestant, enter, finish
from famba.analysis.benchmark.timing import Race
from famba.errors import ConfigError, FambaError
from famba.ops import backends
from famba.ops.registry import resolve

PRECISION, (_TINY, _SMALL) = "bf16", DEITS


def blocks(device: torch.device) -> Iterator[tuple[str, list[Contestant]]]:
    """Yield title and contestants of each table of steps, in order of value; none for that of ops."""
    size, pair, deit = (128, 224, PRECISION), ("none", "upper"), DEITS[_TINY]
    yield "Vim-Ti", [Contestant(s, _TINY, s, *size) for s in STRATEGIES]
    auto = resolve(device.type, ops.DTYPES[PRECISION])
    for name in (n for n in backends() if n not in (auto, "reference") and ops.obstacle(n, device, PRECISION) is None):
        yield f"Vim-Ti by {name}", [Contestant(s, _TINY, s, *size, (f"ops.backend={name}",)) for s in pair]
    compiled = Contestant("DeiT-Ti, torch.compile", deit, "none", *size, ("trainer.compile=true",))
    yield "timm's DeiT-Ti", [Contestant("DeiT-Ti", deit, "none", *size), compiled]
    yield "Ops", []
    four = ("model.patch_size=4",)
    yield "Vim-Ti, patches of 4", [Contestant(s, _TINY, s, 512, 32, PRECISION, four) for s in pair]
    yield "Vim-Ti, 785 tokens", [Contestant(s, _TINY, s, 32, 448, PRECISION) for s in pair]
    yield "Vim-S", [Contestant(s, _SMALL, s, *size) for s in pair]


def cases() -> list[ops.Case]:
    """Return the ops at the size of Vim-Ti."""
    outer = ("add_rms_norm", "match_tokens", "fuse_tokens")
    return [ops.Case(op, 128, 197, 192 if op in outer else 384, 16, PRECISION) for op in ops.OPS]


def check(device: torch.device) -> None:
    """Raise ConfigError where a device is no GPU, or steps on it would take minutes."""
    if device.type != "cuda":
        raise ConfigError(
            f"famba benchmark gpu measures a CUDA device, and was given {device} (torch {torch.__version__}); "
            "run it on a machine with an NVIDIA GPU and its driver"
        )
    if resolve(device.type, ops.DTYPES[PRECISION]) == "reference":
        raise ConfigError("only the reference serves this GPU, and its steps take minutes; famba doctor says why")


def measure_gpu(options: argparse.Namespace, report: Report) -> None:
    """Measure block by block while there is time; the report is written after each contestant."""
    end, longest = time.monotonic() + 60 * options.minutes, 0.0
    report.notes += [NOTE, ops.NOTE]

    def attempt(name: str, call: Callable[[], object]) -> None:
        """Do what there is time for, which is where the longest before would fit; go on after what fails."""
        nonlocal longest
        if (began := time.monotonic()) + longest > end:
            report.left_out[name] = f"no time was left of --minutes {options.minutes}"
            return
        try:
            call()
        except (FambaError, RuntimeError) as error:
            report.left_out[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        longest = max(longest, time.monotonic() - began)
        report.write(options.json)

    for title, contestants in blocks(options.device):
        if not contestants:
            for case in cases():
                attempt(case.op, partial(ops.measure, case, options.device, options.rounds, report))
            continue
        race = Race(f"{title}, {contestants[0].batch} images of {contestants[0].image_size} pixels", options.device)
        report.tables[race.title] = rows = list[Row]()
        try:
            for one in contestants:
                attempt(f"{race.title}: {one.name}", partial(enter, race, one, rows))
            race.run(options.rounds)
        finally:
            finish(race, rows)
