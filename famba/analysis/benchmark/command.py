"""Define the options of `famba benchmark`, measure, and show what was measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from famba.analysis import options as shared
from famba.analysis.benchmark import gpu, models, ops
from famba.analysis.benchmark.report import Report, filled, read
from famba.analysis.benchmark.timing import NOTE, keep_freed_memory
from famba.errors import ConfigError, TrainingError
from famba.training.devices import has_bf16, out_of_memory
from famba.training.provenance import provenance

_VIMS, _SIZES = list(models.DEITS), [128, 224, 448, 896]
_CHOICES = {"op": ops.OPS, "model": _VIMS, "fusion": models.STRATEGIES}
# Options and their defaults: a list where one takes several values, and what --quick makes of it.
_OPTIONS: dict[str, dict[str, Any]] = {
    "ops": {"op": list(ops.OPS)[:3], "batch": [8, 32], "length": [65, 197, 785], "channels": 384, "states": 16},
    "model": {"model": _VIMS, "fusion": list(models.STRATEGIES), "batch": 32, "image-size": 224},
    "length": {"model": _VIMS[0], "image-size": _SIZES, "tokens": 16 * 197},
    "fusion": {"model": _VIMS[0], "batch": 32, "image-size": 224},
    "gpu": {},
}
_QUICK = {"batch": [8], "length": [197], "model": _VIMS[:1], "fusion": ["none", "upper"], "image-size": _SIZES[:3]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be timed, and its options."""
    parser.description = (
        "Time contestants side by side: in turn, after a warm-up. A table on stdout, progress on stderr."
    )
    kinds = parser.add_subparsers(title="what to time", required=True, metavar="WHAT")
    _add(kinds, "ops", _measure_ops, 9, "each op by every backend")
    _add(kinds, "model", models.measure_models, 5, "training step and inference by strategy, and of a DeiT")
    _add(kinds, "length", models.measure_lengths, 5, "how a step of Vim and of DeiT grows with the tokens of an image")
    _add(kinds, "fusion", models.measure_fusing, 25, "matching and fusing tokens, as a share of a layer's step")
    of_gpu = _add(kinds, "gpu", gpu.measure_gpu, 5, "a CUDA device: the tables of docs/performance.md")
    of_gpu.add_argument("--minutes", type=_count, default=8, metavar="N", help="stop in time (default: 8)")
    of_gpu.add_argument("--fill", type=Path, metavar="FILE", help="put the tables between the markers in FILE")
    of_gpu.add_argument(
        "--floors", action="store_true", help="the least time that an A100, an H100 and an H200 need; needs no GPU"
    )
    of_gpu.add_argument("--from", dest="found", type=Path, metavar="FILE", help="show or --fill what --json wrote")


def _add(
    kinds: Any, name: str, measure: Callable[[argparse.Namespace, Report], None], rounds: int, text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=f"Measure {text}.")
    for option, default in _OPTIONS[name].items():
        kind: dict[str, Any] = {"type": _size if option == "image-size" else _count, "metavar": "N"}
        if option in _CHOICES:
            kind = {"choices": _CHOICES[option]}
        several = isinstance(default, list)
        shown = " ".join(map(str, default)) if several else default
        parser.add_argument(
            f"--{option}", default=default, help=f"default: {shown}", nargs="+" if several else None, **kind
        )
    if name != "gpu":
        parser.add_argument("--precision", "--dtype", nargs="+", choices=ops.DTYPES, help="default: fp32 and bf16")
    parser.add_argument("--rounds", type=_count, metavar="N", help=f"default: {rounds}, with --quick a third")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or mps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE as well")
    parser.add_argument("--quick", action="store_true", help="fewer of what has several values by default")
    parser.set_defaults(measure=measure, what=name, usual=rounds, precision=None)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; allowed: whole numbers from 1")
    return int(text)


def _size(text: str) -> int:
    if (size := _count(text)) % models.PATCH or size < 2 * models.PATCH:
        raise argparse.ArgumentTypeError(f"{text}; allowed: multiples of {models.PATCH}, the patch size, from 32")
    return size


def run(options: argparse.Namespace) -> int:
    """Measure; for a GPU, refuse what cannot be written or measured first, and fill a page where one is named."""
    if options.what != "gpu":
        _measure(options)
        return 0
    if options.fill is not None:
        filled(options.fill, "")
    style = "simple" if options.fill is None else "pipe"
    if not options.floors and options.found is None:
        gpu.check(shared.device(options.device))
        text = _measure(options).text(style)
    elif options.json is not None or (options.floors and options.found is not None):
        raise ConfigError("--floors and --from measure nothing: leave out --json, and one of them")
    else:
        text = gpu.floors_alone(style) if options.floors else read(options.found).text(style)
        if options.fill is None:
            print(text)
    if options.fill is not None:
        options.fill.write_text(filled(options.fill, text))
    return 0


def _measure(options: argparse.Namespace) -> Report:
    """Measure, and tell what has been measured whatever ended it: it took its time."""
    options.device = device = shared.device(options.device)
    options.rounds = options.rounds or (max(3, options.usual // 3) if options.quick else options.usual)
    for option, default in _OPTIONS[options.what].items():
        # The very list that is the default: nothing else has been asked for.
        if options.quick and isinstance(default, list) and getattr(options, option.replace("-", "_")) is default:
            setattr(options, option.replace("-", "_"), _QUICK.get(option, default))
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
        raise TrainingError(f"out of memory ({error!r}); use a smaller batch or size") from error
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
        case = ops.Case(op, batch, length, options.channels, options.states, precision)
        ops.measure(case, options.device, options.rounds, report)
