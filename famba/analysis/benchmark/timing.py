"""Time contestants in turn: on a CPU by the host's clock, on a GPU as CUDA graphs and as the calls come.

A report holds what was found: tables for the terminal and for a page, and as JSON.
"""

from __future__ import annotations

import ctypes
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from famba.training.devices import release_memory, synchronize
from famba.training.graph import captured, graph_memory, warm_up

Call = Callable[[], object]
_SAMPLE_MS, _MOST_REPLAYS = 5.0, 100  # a sample of a graph takes about so long, and holds no more replays than that
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES = -1, -3, 2**25  # of glibc's malloc.h
NOTE = (
    "on CUDA, ms is a replay of a CUDA graph, which is the time of the kernels; eager ms lies between events around "
    "the calls as they come, as in a step of trainer.cuda_graphs=false"
)


class Race:
    """Contestants that take turns, so that other load falls on all alike; samples: milliseconds of each by column."""

    def __init__(self, title: str, device: torch.device) -> None:
        self.title, self.device = title, device
        release_memory(device)  # a race before this one is a cycle: its clocks hold it
        self.samples: dict[str, dict[str, list[float]]] = {}
        self._clocks: dict[str, dict[str, Callable[[], float]]] = {}

    def enter(self, name: str, calls: Sequence[Call], graph: Call | None = None) -> None:
        """Warm a contestant up and take its first sample, of all calls: the same work on a copy of the inputs each.

        graph: replays all of that as a CUDA graph; captured here where None. Read on CUDA alone.
        """
        sys.stderr.write(f"{self.title}: {name}\n")

        def every() -> None:
            for call in calls:
                call()

        every()
        clocks = {"ms": lambda: self._by_host(every) / len(calls)}
        if self.device.type == "cuda":
            if graph is None:
                memory = graph_memory(self.device)
                warm_up(every, memory)
                graph = captured(every, memory)
            replay = graph
            replays = min(_MOST_REPLAYS, math.ceil(_SAMPLE_MS / max(self._by_events(replay), 1e-3)))
            clocks = {
                "ms": lambda: self._by_events(replay, replays) / len(calls),
                "eager_ms": lambda: self._by_events(every) / len(calls),
            }
        self._clocks[name] = clocks
        self.samples[name] = {column: [clock()] for column, clock in clocks.items()}

    def run(self, rounds: int) -> None:
        """Take samples in turn until each contestant has one of each of `rounds`."""
        for _ in range(rounds - 1):
            for name, clocks in self._clocks.items():
                for column, clock in clocks.items():
                    self.samples[name][column].append(clock())

    def entries(self, name: str) -> Row:
        """Return a row's entries: medians of a call in ms, and all samples."""
        samples = self.samples[name]
        medians = {column: statistics.median(taken) for column, taken in samples.items()}
        return medians | {f"{column}_samples": list(taken) for column, taken in samples.items()}

    def _by_events(self, run: Call, times: int = 1) -> float:
        """Return the milliseconds of one of several runs between two events on the device."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(self.device)
        begin.record()
        for _ in range(times):
            run()
        end.record()
        synchronize(self.device)
        return begin.elapsed_time(end) / times

    def _by_host(self, run: Call) -> float:
        """Return the milliseconds of a run by the host's clock, from an idle device to an idle one."""
        synchronize(self.device)
        begin = time.perf_counter()
        run()
        synchronize(self.device)
        return 1000 * (time.perf_counter() - begin)


def keep_freed_memory() -> None:
    """Let this process keep freed memory for the next use, for tensors of up to 32 MiB, as the middle of a step has it.

    Otherwise an op that is alone in a loop gets its memory page by page at every call, which takes most of its time.
    """
    if platform.system() == "Linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_PACKAGES = ("torch", "timm", "triton", "mamba-ssm", "causal-conv1d")
Row = dict[str, Any]


@dataclass
class Report:
    """Hold what `famba benchmark` has found by now: rows of tables by title, and why others were not measured."""

    benchmark: str
    provenance: dict[str, Any]
    settings: dict[str, Any]
    tables: dict[str, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    def text(self) -> str:
        """Return everything, with tables as Markdown has them."""
        of = self.provenance
        packages = ", ".join(f"{name} {of['packages'][name]}" for name in _PACKAGES if name in of["packages"])
        parts = [
            f"`famba benchmark {self.benchmark}` on {of['device']}, CUDA {of['cuda']}, ops by {of['backend']}; "
            f"{of['started']}, famba {of['famba']} at commit {of['git_commit']}, Python {of['python']}, {packages}; "
            f"medians of {self.settings['rounds']} rounds."
        ]
        parts += [f"{title}:\n\n{_table(rows)}" for title, rows in self.tables.items() if rows]
        parts += [f"Left out: {name}: {reason}." for name, reason in self.left_out.items()]
        parts += [f"Note: {note}." for note in self.notes]
        parts += [] if self.complete else ["Stopped before the end: this is what had been measured."]
        return "\n\n".join(parts)

    def write(self, file: Path | None) -> None:
        """Write everything as JSON where a file is given, unrounded, every sample included."""
        if file is not None:
            file.write_text(json.dumps(asdict(self), indent=2) + "\n")


def _table(rows: list[Row]) -> str:
    """Return rows without samples, and without columns that no row fills."""
    keys = dict.fromkeys(key for row in rows for key in row if not key.endswith("_samples"))
    shown = [key for key in keys if any(row.get(key) is not None for row in rows)]
    cells = [[_cell(row.get(key)) for key in shown] for row in rows]
    return tabulate(cells, [key.replace("_", " ") for key in shown], "github", disable_numparse=True, missingval="-")


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:,.{0 if value >= 1000 else 3}f}"
    return f"{value:,}" if type(value) is int else value
