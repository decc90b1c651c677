"""`famba benchmark gpu`: what docs/performance.md says of a GPU, in order of value, for as long as there is time."""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from famba.analysis.benchmark import floors, ops
from famba.analysis.benchmark.models import BUDGET, DEITS, NOTE, STRATEGIES
from famba.analysis.benchmark.report import Report, Table
from famba.analysis.benchmark.steps import Contestant, TimedStep, compared, loop_ms, measure
from famba.analysis.benchmark.timing import COLUMNS, Race, ratio
from famba.errors import ConfigError, FambaError
from famba.fusion import schedule
from famba.models import Vim, create_network
from famba.ops import backends
from famba.ops.registry import resolve

PRECISION, (_TINY, _SMALL) = "bf16", DEITS
_COLUMNS = ("contestant", *COLUMNS, "loop_ms", "of_graph", "of_none", "images_per_s", "floor_ms", "floor_share")
GPU = "H100"
TARGETS = {
    ("none", "ms"): 74.0,
    ("none", "of_graph"): 1.05,
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


def blocks(device: torch.device) -> Iterator[tuple[str, str, list[Contestant]]]:
    """Yield key, title and contestants of each table of steps, and the key "ops", in order of value."""
    size, pair = (128, 224, PRECISION), ("none", "upper")
    yield "steps", "Vim-Ti", [Contestant(s, _TINY, s, *size) for s in STRATEGIES]
    auto = resolve(device.type, ops.DTYPES[PRECISION])
    for name in (n for n in backends() if n not in (auto, "reference") and ops.obstacle(n, device, PRECISION) is None):
        yield name, f"Vim-Ti by {name}", [Contestant(s, _TINY, s, *size, (f"ops.backend={name}",)) for s in pair]
    compiled = Contestant("DeiT-Ti, torch.compile", DEITS[_TINY], "none", *size, ("trainer.compile=true",))
    yield "transformer", "timm's DeiT-Ti", [Contestant("DeiT-Ti", DEITS[_TINY], "none", *size), compiled]
    yield "ops", "", []
    more = ("model.patch_size=4",)
    yield "small_images", "Vim-Ti, patches of 4", [Contestant(s, _TINY, s, 512, 32, PRECISION, more) for s in pair]
    yield "long", "Vim-Ti, 785 tokens", [Contestant(s, _TINY, s, 32, 448, PRECISION) for s in pair]
    yield "vim_small", "Vim-S", [Contestant(s, _SMALL, s, *size) for s in pair]


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
    began, end, longest = time.monotonic(), time.monotonic() + 60 * options.minutes, 0.0
    report.notes += [NOTE, _NOTE, ops.NOTE]

    def attempt(name: str, call: Callable[[], object]) -> None:
        """Do what there is time for, which is where the longest before would fit; go on after what fails."""
        nonlocal began, longest
        began = time.monotonic()
        if began + longest > end:
            report.leave_out(name, f"no time was left of --minutes {options.minutes:g}")
            return
        try:
            call()
        except (FambaError, RuntimeError) as error:
            report.leave_out(name, f"{type(error).__name__}: {str(error).splitlines()[0]}")
        longest = max(longest, time.monotonic() - began)
        report.write(options.json)

    for key, title, contestants in blocks(options.device):
        if key == "ops":
            report.tables[key] = ops.table()
            for case in cases():
                attempt(case.op, partial(ops.measure, [case], options.device, options.rounds, report, reference=False))
            continue
        size = f"{contestants[0].batch} images, {contestants[0].image_size} x {contestants[0].image_size}"
        rows: list[dict[str, Any]] = []
        race = Race(title, options.device)
        report.tables[key] = Table(f"{title}: steps of {size}, {PRECISION}", (*_COLUMNS, "reserved_MiB"), rows)
        try:
            measure(race, contestants, options.rounds, rows, _loop, attempt)
        finally:
            for row in rows:
                row["of_graph"] = ratio(row.get("loop_ms"), row["ms"])
                row["images_per_s"] = ratio(1000 * row["batch"], row.get("loop_ms"))
            compared(rows, "of_none", "loop_ms", "none")
            if key == "steps":
                report.tables |= {"groups": grouped(race), "targets": checked(rows, report.provenance["device"])}


def _loop(one: Contestant, step: TimedStep, row: dict[str, Any]) -> None:
    """Measure a step in the loop of a run, and the memory that it takes besides what is there."""
    device = step.setup.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    row["loop_ms"] = loop_ms(one.config(device))
    row["reserved_MiB"] = (torch.cuda.max_memory_reserved(device) - before) // 2**20


def grouped(race: Race) -> Table:
    """Return where the steps of none and upper go, by groups of kernels."""
    found: dict[str, dict[str, Any]] = {part: {"part": part} for part in GROUPS}
    for name in ("none", "upper"):
        for kernel, (milliseconds, launches) in race.kernels.get(name, {}).items():
            row = found[next(part for part, words in GROUPS.items() if re.search(words, kernel.lower()))]
            row[f"{name}_ms"] = row.get(f"{name}_ms", 0.0) + milliseconds
            row[f"{name}_launches"] = row.get(f"{name}_launches", 0) + launches
    columns = ("part", "none_ms", "none_launches", "upper_ms", "upper_launches")
    return Table("Where a step of Vim-Ti goes, one call by torch.profiler", columns, list(found.values()))


def checked(rows: list[dict[str, Any]], device: str) -> Table:
    """Compare the rows of Vim-Ti's steps with what they should reach; on other GPUs the targets hold for none."""
    found: dict[str, Mapping[str, Any]] = {row["contestant"]: row for row in rows}
    table = Table(f"Targets for Vim-Ti on an {GPU}", ("target", "at_most", "measured", "met"))
    for (name, column), most in TARGETS.items():
        value = found.get(name, {}).get(column)
        met = "not measured" if value is None else f"holds for {GPU}s" if GPU not in device else str(value <= most)
        table.rows.append({"target": f"{name}, {column}", "at_most": most, "measured": value, "met": met})
    return table


def floors_alone(style: str) -> str:
    """Return the floors of ops and of Vims' steps on an A100 and an H100, as tables in a style of tabulate's."""
    found = {case.op: case.built().passes for case in cases()}
    for name, strategy in itertools.product(DEITS, STRATEGIES):
        with torch.device("meta"):
            model = create_network(name)
        assert isinstance(model, Vim)
        model.set_fusion(schedule(strategy, model.depth, model.num_tokens, BUDGET, protected=model.protected))
        found[f"step of {name}, {strategy}"] = floors.step(model, 128, ops.DTYPES[PRECISION].itemsize)
    boards = {f"{name}_ms": floors.BOARDS[name] for name in ("A100-SXM4-80GB", "H100 80GB HBM3")}
    table = Table(f"Floors of an op and of a step of 128 images of 224 x 224, in {PRECISION}", ("of", *boards))
    for name, passes in found.items():
        floor = {key: floors.floor_ms(passes, board, PRECISION) for key, board in boards.items()}
        table.rows.append({"of": name, **floor})
    return table.text(style)
