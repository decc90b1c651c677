"""The tables of docs/performance.md on GPUs, in Markdown: floors always, times where they have been measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tabulate import tabulate

from famba.analysis.benchmark.cases import OPS, Case, passes
from famba.analysis.benchmark.model import PRODUCTS, STRATEGIES, TRANSFORMERS, by_backend
from famba.analysis.benchmark.peaks import A100, H100, Peaks
from famba.analysis.benchmark.products import step_linears
from famba.analysis.benchmark.report import short
from famba.analysis.benchmark.steps import Subject
from famba.analysis.benchmark.traffic import ITEM_BYTES, Passes, floor_ms, forward_and_step, product, total_bytes
from famba.errors import ConfigError
from famba.models.vim import Vim

BATCH, LENGTH, CHANNELS, STATES, IMAGE_SIZE, PRECISION = 128, 197, 384, 16, 224, "bf16"
"""Sizes of the tables: Vim-Ti's ops, in a step of so many images."""
BACKENDS = ("mamba_ssm", "triton", "reference")
FAST_BACKENDS = BACKENDS[:2]
"""Those that compute whole models: the reference's mixer alone takes an H100 1.7 s, times 24 layers."""
BEGIN, END = (f"<!-- famba benchmark gpu: {word} -->" for word in ("begin", "end"))
_NOT_MEASURED = "not measured"
_MODES = {"forward": "forward", "both": "forward and backward"}
Rows = list[dict[str, Any]]


def filled(text: str, tables: str) -> str:
    """Put tables between the markers in a text. Raises ConfigError where the markers are not there once, in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ConfigError(f"expected one line {BEGIN} and behind it one line {END}; the tables go between them")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def markdown(origin: str, ops: Rows | None, times: Rows | None, memory: Rows | None, own: Peaks | None = None) -> str:
    """Write both tables.

    origin: what stands above them. ops, times, memory: rows of the reports of `famba benchmark`, None where nothing
    has been measured. own: peaks of the device that was measured, shown where it is neither an A100 nor an H100.
    """
    boards = list({board.name: board for board in (A100, H100, own) if board is not None}.values())
    parts = [
        origin,
        f"Ops at (batch, length, channels, states) = ({BATCH}, {LENGTH}, {CHANNELS}, {STATES}) in {PRECISION}; "
        "milliseconds:",
        _table(_op_rows(ops, boards)),
        f"A training step and an inference of {BATCH} images at {IMAGE_SIZE} x {IMAGE_SIZE} in {PRECISION}; "
        "milliseconds:",
        _table(_model_rows(times, memory, boards)),
    ]
    return "\n\n".join(parts)


def _table(rows: Iterable[dict[str, str]]) -> str:
    return tabulate(list(rows), headers="keys", tablefmt="pipe", disable_numparse=True)


def _op_rows(measured: Rows | None, boards: list[Peaks]) -> Iterator[dict[str, str]]:
    for op in OPS:
        case = Case(op, BATCH, LENGTH, CHANNELS, STATES, PRECISION)
        of_op = {row["contestant"]: row for row in measured or () if row["op"] == op} or None
        for mode, name in _MODES.items():
            work = passes(case).forward if mode == "forward" else passes(case).both
            if mode == "both" and not passes(case).backward:
                continue
            row = {"op": op, "": name, "MB": short(total_bytes(work) / 1e6)}
            row |= {f"floor, {board.name}": short(floor_ms(work, board, PRECISION)) for board in boards}
            row |= {backend: _cell(of_op, backend, f"{mode}_ms") for backend in BACKENDS}
            yield row | {f"{b}: of bandwidth": _cell(of_op, b, f"{mode}_of_bandwidth") for b in FAST_BACKENDS}


def _model_rows(times: Rows | None, memory: Rows | None, boards: list[Peaks]) -> Iterator[dict[str, str]]:
    for model, transformer in TRANSFORMERS.items():
        of_time, of_memory = (
            {row["contestant"]: row for row in rows or () if row["model"] == model} or None for rows in (times, memory)
        )
        floors = _model_floors(model)
        names = [*STRATEGIES, *(by_backend(name) for name in FAST_BACKENDS), transformer, PRODUCTS]
        for name in names:
            work = floors.get(name)
            row = {"model": model.split("_patch")[0], "": name}
            row |= {f"step: floor, {board.name}": _floor(work, board, step=True) for board in boards}
            row["step"] = _cell(of_time, name, "step_ms")
            row["of none"] = _cell(of_time, name, "step_of_none")
            row["of DeiT"] = _cell(of_time, name, "step_of_transformer")
            row["images/s"] = _cell(of_time, name, "images_per_s")
            row["of matmul peak"] = _cell(of_time, name, "step_of_peak")
            row["peak MiB"] = _cell(of_memory, name, "peak_mib")
            row |= {f"inference: floor, {board.name}": _floor(work, board, step=False) for board in boards}
            yield row | {"inference": _cell(of_time, name, "inference_ms")}


def _model_floors(model: str) -> dict[str, Passes]:
    """What an inference (forward) and a step (both) have to do, by contestant."""
    found = {}
    for strategy in STRATEGIES:
        with torch.device("meta"):
            vim = Subject(model, strategy, BATCH, IMAGE_SIZE, PRECISION, "meta").build()
        assert isinstance(vim, Vim)
        found[strategy] = forward_and_step(vim, BATCH, PRECISION)
        if strategy == "none":
            products = [product(linear, ITEM_BYTES[PRECISION]) for linear in step_linears(vim, BATCH)]
            found[PRODUCTS] = Passes((), tuple(work for one in products for work in one.both))
    return found | {by_backend(name): found["none"] for name in FAST_BACKENDS}


def _floor(work: Passes | None, board: Peaks, step: bool) -> str:
    chosen = () if work is None else work.both if step else work.forward
    return short(floor_ms(chosen, board, PRECISION)) if chosen else ""


def _cell(rows: dict[str, dict[str, Any]] | None, contestant: str, key: str) -> str:
    if rows is None:
        return _NOT_MEASURED
    value = rows.get(contestant, {}).get(key)
    return "" if value is None else short(value)
