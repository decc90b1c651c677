"""Define the options of `famba benchmark`, measure, and show what was measured."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from famba.analysis import options as shared
from famba.analysis.benchmark import ops, steps
from famba.analysis.benchmark.report import Report, Row, filled
from famba.analysis.benchmark.timing import NOTE, Race, keep_freed_memory
from famba.errors import ConfigError, TrainingError
from famba.training.devices import has_bf16, out_of_memory
from famba.training.measure import provenance


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be timed, and its options."""
    parser.description = "Time contestants in turn, after a warm-up. A table on stdout, progress on stderr."
    kinds = parser.add_subparsers(title="what to time", required=True, metavar="WHAT")
    texts = {
        "ops": "each op by every backend",
        "model": "a training step of Vim by strategy, and of a DeiT",
        "gpu": "a CUDA device: the tables of docs/performance.md",
    }
    of_ops, of_model, of_gpu = (kinds.add_parser(name, help=t, description=f"Time {t}.") for name, t in texts.items())
    shown: dict[str, Any] = {"metavar": "N", "help": "default: %(default)s"}
    of_ops.add_argument("--op", nargs="+", choices=ops.OPS, default=list(ops.OPS), help="default: all")
    of_ops.add_argument("--batch", nargs="+", type=shared.count, default=[8, 32], **shown)
    of_ops.add_argument("--length", nargs="+", type=shared.count, default=[65, 197, 785], **shown)
    models: dict[str, Any] = {"choices": steps.DEITS, "default": list(steps.DEITS), "help": "default: both"}
    of_model.add_argument("--model", nargs="+", **models)
    of_model.add_argument("--batch", type=shared.count, default=32, **shown)
    of_gpu.add_argument("--minutes", type=shared.count, default=8, metavar="N", help="stop in time (default: 8)")
    of_gpu.add_argument("--fill", type=Path, metavar="FILE", help="put the tables between the markers in FILE")
    kinds_of = ((of_ops, "ops", _measure_ops), (of_model, "model", _measure_models), (of_gpu, "gpu", steps.measure_gpu))
    for kind, what, measure in kinds_of:
        if kind is not of_gpu:
            kind.add_argument("--precision", nargs="+", choices=ops.DTYPES, help="default: fp32 and bf16")
        kind.add_argument("--rounds", type=shared.count, default=9 if kind is of_ops else 5, **shown)
        kind.add_argument("--device", default="auto", help="auto (default), cpu, cuda or mps")
        kind.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE as well")
        kind.set_defaults(measure=measure, what=what, fill=None, precision=None)


def run(options: argparse.Namespace) -> int:
    """Measure, and fill a page where one is named; refuse first what cannot be written."""
    if options.fill is not None:
        filled(options.fill, "")
    report = _measure(options)
    if options.fill is not None:
        options.fill.write_text(filled(options.fill, report.text("pipe")))
    return 0


def _measure(options: argparse.Namespace) -> Report:
    """Measure, and tell what has been measured whatever ended it: it took its time."""
    options.device = device = shared.device(options.device)
    if options.what == "gpu":
        steps.check(device)
    options.precision = options.precision or (["fp32", "bf16"] if has_bf16(device) else ["fp32"])
    if "fp16" in options.precision and device.type != "cuda":
        raise ConfigError(f"fp16 is timed on CUDA devices alone, this is a {device.type} device; use fp32 or bf16")
    try:
        if options.json is not None:
            # Found out now: after the measuring it would be lost.
            options.json.open("a").close()
    except OSError as error:
        raise ConfigError(f"--json {options.json} cannot be written ({error.strerror}); name another file") from error
    settings = {name: value for name, value in vars(options).items() if isinstance(value, int | list | str)}
    report = Report(options.what, provenance(device, 0, 1), settings, notes=[NOTE] if device.type == "cuda" else [])
    keep_freed_memory()
    try:
        options.measure(options, report)
        report.complete = True
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(f"out of memory ({error!r}); use a smaller --batch or --length") from error
    finally:
        if any(report.tables.values()):
            print(report.text("simple"))
            report.write(options.json)
    return report


def _measure_ops(options: argparse.Namespace, report: Report) -> None:
    if min(options.length) < 3 and {"match_tokens", "fuse_tokens"} & set(options.op):
        raise ConfigError(f"--length is {min(options.length)}; match_tokens and fuse_tokens need 3 tokens")
    report.notes.append(ops.NOTE)
    for op, precision, batch, length in product(options.op, options.precision, options.batch, options.length):
        ops.measure(ops.Case(op, batch, length, precision=precision), options.device, options.rounds, report)


def _measure_models(options: argparse.Namespace, report: Report) -> None:
    report.notes.append(steps.NOTE)
    for name, precision in product(options.model, options.precision):
        size, deit = (options.batch, 224, precision), steps.DEITS[name]
        race = Race(f"{name}, {options.batch} images of 224 pixels, {precision}", options.device)
        report.tables[race.title] = rows = list[Row]()
        try:
            for strategy in steps.STRATEGIES:
                steps.enter(race, steps.Contestant(strategy, name, strategy, *size), rows)
            steps.enter(race, steps.Contestant(deit, deit, "none", *size), rows)
            race.run(options.rounds)
        finally:
            steps.finish(race, rows)
