"""`famba benchmark`: its options, and what becomes of what was measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from famba.analysis.benchmark import fusion, gpu, gpu_tables, length, machine, model, ops
from famba.analysis.benchmark.cases import OPS, SHORTEST_FUSED, USUAL_OPS
from famba.analysis.benchmark.length import PATCH
from famba.analysis.benchmark.model import STRATEGIES, TRANSFORMERS
from famba.analysis.benchmark.peaks import named_peaks, peaks
from famba.analysis.benchmark.report import Report
from famba.analysis.benchmark.timing import EventClock, cache_note, overwriting_cache
from famba.errors import ConfigError, TrainingError, near_miss
from famba.ops import use_backend
from famba.ops.registry import resolve
from famba.training.devices import out_of_memory

_MODELS = tuple(TRANSFORMERS)
_VIM_TI = _MODELS[0]
_SIZES = [128, 224, 448, 896]
_COLD, _WARM = _CACHES = ("cold", "warm")
# Options that count something, and options that name something with what they may name.
_COUNTS = ("rounds", "threads", "batch", "length", "channels", "states", "tokens")
_NAMES: dict[str, Sequence[str]] = {
    "op": tuple(OPS),
    "model": _MODELS,
    "fusion": STRATEGIES,
    "precision": tuple(machine.PRECISIONS),
    "cache": _CACHES,
}


def add_benchmark(commands: Any) -> None:
    """Add `benchmark` to the subparsers of a parser."""
    benchmark = commands.add_parser(
        "benchmark",
        help="time ops, training steps, growth with the length, and fusing",
        description="Time contestants side by side: in turn, after a warm-up. A table on stdout, progress on stderr.",
    )
    kinds = benchmark.add_subparsers(title="what to time", required=True, metavar="WHAT")
    _add_ops(kinds)
    _add_model(kinds)
    _add_length(kinds)
    _add_fusion(kinds)
    _add_gpu(kinds)


def _add_ops(kinds: Any) -> None:
    parser = _add(kinds, "ops", _ops, 9, "each op by every backend, and the scan by mamba-ssm's reference and mamba.py")
    _several_of(parser, "--op", list(USUAL_OPS), f"ops of {', '.join(OPS)}")
    _several_of(parser, "--batch", [8, 32], "batch sizes")
    _several_of(parser, "--length", [65, 197, 785], "tokens")
    _one_of(parser, "--channels", 384, "channels, as in Vim-Ti")
    _one_of(parser, "--states", 16, "states of the scan")
    _add_precision(parser, "--dtype")
    _one_of(parser, "--cache", _COLD, "on CUDA: cold overwrites the cache before each call, warm does not")
    _add_bandwidth(parser)
    parser.set_defaults(quick_values={"batch": [8], "length": [197]})


def _add_model(kinds: Any) -> None:
    parser = _add(kinds, "model", _model, 5, "training step, inference and memory with each strategy, and of a DeiT")
    _several_of(parser, "--model", list(_MODELS), "models")
    _several_of(parser, "--fusion", list(STRATEGIES), "strategies")
    _one_of(parser, "--batch", 32, "images at once")
    _one_of(parser, "--image-size", 224, "pixels a side")
    _add_precision(parser, "--precision")
    parser.add_argument(
        "--backend", nargs="+", default=[], metavar="NAME", help="backends that compute the unfused model once more"
    )
    parser.add_argument("--compile", action="store_true", help="all models by torch.compile")
    parser.add_argument(
        "--tome", action="store_true", help="let the DeiT fuse by the same strategies too, as in ToMe's training"
    )
    _add_bandwidth(parser)
    parser.set_defaults(quick_values={"model": [_VIM_TI], "fusion": ["none", "upper"]})


def _add_length(kinds: Any) -> None:
    parser = _add(kinds, "length", _length, 5, "how a step of Vim and of DeiT grows with the tokens of an image")
    _one_of(parser, "--model", _VIM_TI, f"one of {', '.join(_MODELS)}")
    _several_of(parser, "--image-size", _SIZES, "pixels a side")
    _one_of(parser, "--tokens", 16 * 197, "about how many tokens a step holds, whatever the image size")
    _add_precision(parser, "--precision")
    parser.set_defaults(quick_values={"image_size": _SIZES[:3]})


def _add_fusion(kinds: Any) -> None:
    parser = _add(kinds, "fusion", _fusion, 25, "matching and fusing tokens, as a share of a layer's step")
    _one_of(parser, "--model", _VIM_TI, f"one of {', '.join(_MODELS)}")
    _one_of(parser, "--batch", 32, "images at once")
    _one_of(parser, "--image-size", 224, "pixels a side")
    _add_precision(parser, "--precision")
    parser.set_defaults(quick_values={})


def _add_gpu(kinds: Any) -> None:
    parser = _add(kinds, "gpu", _gpu, 15, "ops and models on a CUDA device: the tables of docs/performance.md")
    parser.add_argument(
        "--fill", dest="page", type=Path, metavar="FILE", help="put the tables between the markers in FILE"
    )
    parser.add_argument(
        "--floors", action="store_true", help="what A100 and H100 need at their best, alone; that needs no GPU"
    )
    parser.add_argument(
        "--from",
        dest="found",
        type=Path,
        metavar="FILE",
        help="show or --fill what a former call, on a machine with a GPU, wrote with --json",
    )
    _add_bandwidth(parser)
    parser.set_defaults(run=_run_gpu, quick_values={})


def _add(
    kinds: Any, name: str, fill: Callable[[argparse.Namespace, Report], None], rounds: int, text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=f"Measure {text}.")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"rounds after the warm-up (default: {rounds})")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch and the kernels")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or mps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE as well")
    parser.add_argument(
        "--quick", action="store_true", help="a third of the rounds, and fewer of what has several values by default"
    )
    parser.set_defaults(run=_run, fill=fill, what=name, usual_rounds=rounds, parser=parser)
    return parser


def _one_of(parser: argparse.ArgumentParser, flag: str, default: int | str, text: str) -> None:
    metavar = "N" if isinstance(default, int) else "NAME"
    parser.add_argument(flag, type=type(default), default=default, metavar=metavar, help=f"{text} (default: {default})")


def _several_of(parser: argparse.ArgumentParser, flag: str, default: Sequence[int | str], text: str) -> None:
    kind, metavar = type(default[0]), "N" if isinstance(default[0], int) else "NAME"
    usual = " ".join(map(str, default))
    parser.add_argument(flag, nargs="+", type=kind, default=default, metavar=metavar, help=f"{text} (default: {usual})")


def _add_precision(parser: argparse.ArgumentParser, flag: str) -> None:
    parser.add_argument(
        flag,
        dest="precision",
        nargs="+",
        metavar="NAME",
        help="fp32, bf16, on CUDA fp16 (default: fp32, and bf16 where the processor has instructions for it)",
    )


def _add_bandwidth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="bandwidth of the device's memory, 10^9 bytes a second (default: as published, for GPUs that are known)",
    )


def _run(options: argparse.Namespace) -> int:
    _settle(options)
    _check(options)
    options.device = machine.pick_device(options.device)
    options.precision = tuple(options.precision or machine.default_precisions(options.device))
    machine.check_precisions(options.precision, options.device)
    with machine.threads(options.threads):
        report = Report(options.what, machine.describe(options.device), _settings(options))
        report.notes += machine.precision_notes(options.precision, options.device)
        if options.device.type == "cuda":
            report.notes.append(cache_note(cold=getattr(options, "cache", _WARM) == _COLD))
        try:
            _fill(options, report)
        finally:
            # Whatever ended the run: what has been measured took its time.
            _tell(report, options.json)
    return 0


def _run_gpu(options: argparse.Namespace) -> int:
    """Refuse what cannot be written or measured before anything is."""
    if options.page is not None:
        gpu.read(options.page)
    if not options.floors and options.found is None:
        gpu.check_cuda(machine.pick_device(options.device))
        options.precision = [gpu_tables.PRECISION]
        return _run(options)
    chosen = "--floors" if options.floors else "--from"
    if options.json is not None:
        raise ConfigError(f"--json writes what was measured, and {chosen} measures nothing; leave out one of them")
    values = {name: getattr(options, name) for name in ("rounds", "threads", "quick", "bandwidth")}
    unread = [f"--{name}" for name, value in values.items() if value is not None and value is not False]
    if unread:
        raise ConfigError(f"{chosen} measures nothing, so {', '.join(unread)} would do nothing; leave it out")
    if options.floors and options.found is not None:
        raise ConfigError("--floors shows floors alone, and --from what was measured too; leave out one of them")
    text = gpu.floors() if options.floors else _found_before(options.found)
    if options.page is None:
        print(text)
    else:
        gpu.fill(options.page, text)
    return 0


def _found_before(file: Path) -> str:
    found = gpu.found_before(file)
    return gpu.tables(found, named_peaks(found["provenance"]["device"], found["settings"].get("bandwidth")))


def _fill(options: argparse.Namespace, report: Report) -> None:
    try:
        options.fill(options, report)
        report.complete = True
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise TrainingError(f"out of memory ({reason}); use a smaller batch or size") from error


def _tell(report: Report, file: Path | None) -> None:
    if report.measured:
        print(report.text())
        if file is not None:
            report.write_json(file)


def _settle(options: argparse.Namespace) -> None:
    """Put in what --quick stands for."""
    if options.rounds is None:
        options.rounds = max(3, options.usual_rounds // 3) if options.quick else options.usual_rounds
    if options.quick:
        for name, value in options.quick_values.items():
            # The very list that the parser was given: nothing else has been asked for.
            if getattr(options, name) is options.parser.get_default(name):
                setattr(options, name, value)


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError for a value that cannot work, before minutes are spent on others."""
    for name in _COUNTS:
        for value in _given(options, name):
            if value < 1:
                raise ConfigError(f"--{name} is {value}; allowed: whole numbers from 1")
    for value in _given(options, "image_size"):
        if value < 2 * PATCH or value % PATCH:
            raise ConfigError(
                f"--image-size is {value}; allowed: multiples of {PATCH}, the patch size, from {2 * PATCH}"
            )
    for value in _given(options, "bandwidth"):
        if not value > 0:
            raise ConfigError(f"--bandwidth is {value:g}; allowed: numbers above 0, in GB/s")
    shortest = min(_given(options, "length"), default=SHORTEST_FUSED)
    if shortest < SHORTEST_FUSED and {"match_tokens", "fuse_tokens"} & set(_given(options, "op")):
        raise ConfigError(f"--length is {shortest}; match_tokens and fuse_tokens need {SHORTEST_FUSED} tokens")
    _check_names(options)


def _check_names(options: argparse.Namespace) -> None:
    for name, allowed in _NAMES.items():
        for value in _given(options, name):
            if value not in allowed:
                raise ConfigError(f"unknown {name} {value!r}{near_miss(value, allowed)}; allowed: {', '.join(allowed)}")
    file = options.json
    if file is not None:
        try:
            # Found out now: after the measuring it would be lost.
            file.open("a").close()
        except OSError as error:
            raise ConfigError(f"--json {file} cannot be written ({error.strerror}); name another file") from error


def _given(options: argparse.Namespace, name: str) -> Sequence[Any]:
    """The values of an option, which may be one, several, or none."""
    value = getattr(options, name, None)
    if value is None:
        return ()
    return value if isinstance(value, list) else [value]


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    hidden = ("run", "fill", "json", "page", "floors", "found", "quick_values", "usual_rounds", "parser", "what")
    settings = {name: value for name, value in vars(options).items() if name not in hidden}
    return settings | {"device": str(options.device), "threads": torch.get_num_threads()}


def _ops(options: argparse.Namespace, report: Report) -> None:
    on_cuda = options.device.type == "cuda"
    report.notes += [] if on_cuda else machine.keep_freed_memory()
    cold = on_cuda and options.cache == _COLD
    plan = ops.Plan(
        ops=tuple(options.op),
        batches=tuple(options.batch),
        lengths=tuple(options.length),
        channels=options.channels,
        states=options.states,
        precisions=options.precision,
        rounds=options.rounds,
        device=options.device,
        clock=EventClock(options.device, overwriting_cache(options.device)) if cold else None,
        peaks=peaks(options.device, options.bandwidth),
    )
    ops.benchmark_ops(plan, report)


def _model(options: argparse.Namespace, report: Report) -> None:
    _check_backends(options)
    plan = model.Plan(
        models=tuple(options.model),
        strategies=tuple(options.fusion),
        precisions=options.precision,
        batch=options.batch,
        image_size=options.image_size,
        rounds=options.rounds,
        threads=torch.get_num_threads(),
        device=options.device,
        backends=tuple(options.backend),
        compiled=options.compile,
        peaks=peaks(options.device, options.bandwidth),
        tome=options.tome,
    )
    model.benchmark_model(plan, report)


def _check_backends(options: argparse.Namespace) -> None:
    """Raise BackendError where one cannot serve the device in a precision."""
    for name, precision in product(options.backend, options.precision):
        with use_backend(name):
            resolve(options.device.type, machine.DTYPES[precision])


def _length(options: argparse.Namespace, report: Report) -> None:
    plan = length.Plan(
        model=options.model,
        image_sizes=tuple(options.image_size),
        tokens=options.tokens,
        precisions=options.precision,
        rounds=options.rounds,
        threads=torch.get_num_threads(),
        device=options.device,
    )
    length.benchmark_length(plan, report)


def _fusion(options: argparse.Namespace, report: Report) -> None:
    report.notes += [] if options.device.type == "cuda" else machine.keep_freed_memory()
    plan = fusion.Plan(
        model=options.model,
        batch=options.batch,
        image_size=options.image_size,
        precisions=options.precision,
        rounds=options.rounds,
        device=options.device,
    )
    fusion.benchmark_fusion(plan, report)


def _gpu(options: argparse.Namespace, report: Report) -> None:
    limits = peaks(options.device, options.bandwidth)
    gpu.measure(options.device, options.rounds, limits, report)
    if options.page is not None:
        report.complete = True
        gpu.fill(options.page, gpu.tables(report.entries(), limits))
