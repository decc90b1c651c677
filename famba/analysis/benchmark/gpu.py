"""Measure what docs/performance.md says of a GPU, the most valuable first, for as long as there is time."""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from famba.analysis.benchmark import floors, ops
from famba.analysis.benchmark.models import DEITS, STRATEGIES, vim
from famba.analysis.benchmark.report import Report, Row, table
from famba.analysis.benchmark.steps import NOTE, Contestant, loop_ms, measure
from famba.analysis.benchmark.timing import Race, compared
from famba.errors import ConfigError, FambaError
from famba.ops import backends
from famba.ops.registry import resolve
from famba.training.config import RunConfig

PRECISION, (_TINY, _SMALL) = "bf16", DEITS
TITLE, GPU = "Vim-Ti", "H100"
TARGETS = {
    ("none", "ms"): 74.0,
    ("none", "of_graph"): 1.05,
    ("none", "reserved_of_eager"): 1.1,
    ("all", "of_none"): 0.62,
    ("interleaved", "of_none"): 0.64,
    ("lower", "of_none"): 0.52,
    ("upper", "of_none"): 0.73,
}
"""The most that a column of Vim-Ti's table should hold on an H100."""
# Groups of kernels by parts of their names, in the order in which they are tried.
GROUPS = {
    "optimizer, clipping": "adam|multi_tensor_apply",
    "matrix products": "gemm|cutlass|xmma|nvjet|cublas|splitk|cudnn",
    "scans": "scan",
    "matching and fusing": "match|partner|places|fuse_",
    "norms": "norm",
    "convolutions": "conv",
    "reductions": "reduc|_sums|softmax",
    "casts, copies, elementwise": "elementwise|memcpy|memset|copy|cat|index|fill|triton_",
    "other": "",
}
_NOTE = (
    "loop ms is a step in the loop of `train.py`, where loading and copying do not count; of graph, of none and images "
    "per s are of it; eager ms is a step of trainer.cuda_graphs=false; reserved MiB is what torch's allocator takes "
    "from the device at most for the loop"
)


def blocks(device: torch.device) -> Iterator[tuple[str, list[Contestant]]]:
    """Yield title and contestants of each table of steps, in order of value; none for that of ops."""
    size, pair, deit = (128, 224, PRECISION), ("none", "upper"), DEITS[_TINY]
    yield TITLE, [Contestant(s, _TINY, s, *size) for s in STRATEGIES]
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
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ConfigError(
            f"famba benchmark gpu measures a CUDA device, and was given {device} (torch {torch.__version__}, {built}); "
            "run it on a machine with an NVIDIA GPU and its driver, or take --floors, which needs none"
        )
    if resolve(device.type, ops.DTYPES[PRECISION]) == "reference":
        raise ConfigError("only the reference serves this GPU, and its steps take minutes; famba doctor says why")


def measure_gpu(options: argparse.Namespace, report: Report) -> None:
    """Measure block by block while there is time; the report is written after each contestant."""
    end, longest = time.monotonic() + 60 * options.minutes, 0.0
    report.notes += [NOTE, _NOTE, ops.NOTE]

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
                attempt(case.op, partial(ops.measure, case, options.device, options.rounds, report, reference=False))
            continue
        race = Race(f"{title}, {contestants[0].batch} images of {contestants[0].image_size} pixels", options.device)
        report.tables[race.title] = rows = list[Row]()
        try:
            measure(race, contestants, options.rounds, rows, partial(_loop, options.device), attempt)
        finally:
            compared(rows, "of_none", "loop_ms", "none")
            for row in rows:
                if (loop := row.get("loop_ms")) is not None:
                    row |= {"of_graph": loop / row["ms"], "images_per_s": 1000 * row["batch"] / loop}
            if title == TITLE:
                report.tables |= {
                    f"{title}, a step by kernels": grouped(race),
                    f"{title}, targets": checked(rows, report),
                }


def _loop(device: torch.device, one: Contestant, row: Row) -> None:
    """Measure a step in the loop of a run, and the memory that it takes; of none that of a step without a graph too."""
    config = one.config(device)
    row["loop_ms"], row["reserved_MiB"] = _in_loop(device, config)
    if one.name == "none":
        eager = replace(config, trainer=replace(config.trainer, cuda_graphs=False))
        row["reserved_of_eager"] = row["reserved_MiB"] / _in_loop(device, eager)[1]


def _in_loop(device: torch.device, config: RunConfig) -> tuple[float, int]:
    """Return the milliseconds of a step in the loop of a run, and the MiB that it takes besides what is there."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    milliseconds = loop_ms(config)
    return milliseconds, max(1, (torch.cuda.max_memory_reserved(device) - before) // 2**20)


def grouped(race: Race) -> list[Row]:
    """Return where the steps of none and upper go, by groups of kernels."""
    found: dict[str, Row] = {part: {"part": part} for part in GROUPS}
    for name in ("none", "upper"):
        for kernel, (milliseconds, launches) in race.kernels.get(name, {}).items():
            row = found[next(part for part, words in GROUPS.items() if re.search(words, kernel.lower()))]
            row[f"{name}_ms"] = row.get(f"{name}_ms", 0.0) + milliseconds
            row[f"{name}_launches"] = row.get(f"{name}_launches", 0) + launches
    return [row for row in found.values() if len(row) > 1]


def checked(rows: list[Row], report: Report) -> list[Row]:
    """Compare the rows of Vim-Ti's steps with what they should reach on one kind of GPU."""
    found, here = {row["contestant"]: row for row in rows}, GPU in report.provenance["device"]
    table = []
    for (name, column), most in TARGETS.items():
        value = found.get(name, {}).get(column)
        met = "not measured" if value is None else str(value <= most) if here else f"holds for {GPU}"
        table.append({"target": f"{name}, {column}", "at_most": most, "measured": value, "met": met})
    return table


def floors_alone(style: str) -> str:
    """Return the floors of ops and of Vims' steps on an A100 and an H100, as a table in a style of tabulate's."""
    found = {case.op: case.built().passes for case in cases()}
    for name, strategy in itertools.product(DEITS, STRATEGIES):
        with torch.device("meta"):
            passes, _ = floors.step(vim(name, strategy), 128, ops.DTYPES[PRECISION].itemsize)
        found[f"step of {name}, {strategy}"] = passes
    boards = {f"{name}_ms": floors.BOARDS[name] for name in ("A100-SXM4-80GB", "H100 80GB HBM3")}
    rows = [
        {"of": of, **{key: floors.floor_ms(passes, board, PRECISION) for key, board in boards.items()}}
        for of, passes in found.items()
    ]
    return table(f"Floors of ops, and of steps of 128 images of 224 x 224, in {PRECISION}", rows, style)
