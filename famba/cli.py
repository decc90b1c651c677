"""The `famba` command."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import famba
from famba.analysis.benchmark.command import add_benchmark
from famba.analysis.evaluation.command import add_evaluate
from famba.analysis.pictures.command import add_visualize
from famba.errors import ConfigError, FambaError
from famba.export.command import add_export


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for what the user can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["train"]:
        # Hydra reads everything behind "train" itself, --help included.
        from famba.training.app import main as train

        gc.freeze()  # as in train.py
        return train(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except FambaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output, such as head, has seen enough; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="famba", description="Train Vision Mamba models with cross-layer token fusion."
    )
    parser.add_argument("--version", action="version", version=f"famba {famba.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    # Listed for its help; main has taken it before.
    commands.add_parser("train", help="train a model: the same as python train.py in a checkout")

    download = commands.add_parser(
        "download",
        help="fetch a data set ahead of time",
        description="Fetch a data set ahead of time, for machines without network.",
    )
    download.add_argument("name", help="cifar100 or cifar10")
    download.add_argument(
        "--root",
        help="folder to put it in, to be named by data.root (default: $FAMBA_DATA or ~/.cache/famba/data)",
    )
    download.set_defaults(run=_download)

    report = commands.add_parser(
        "report",
        help="compare runs in a table, or in a report with plots",
        description="Compare runs, from run folders and from CSV files of runs: in a table on the terminal, or with "
        "--out in a report with means over seeds, intervals and plots, as Markdown, CSV, LaTeX and one HTML page.",
    )
    report.add_argument(
        "runs", nargs="+", metavar="FOLDER", help="run folders, folders that hold some, or CSV files with a run per row"
    )
    report.add_argument("--out", type=Path, metavar="DIR", help="write a report to this folder instead")
    report.set_defaults(run=_report)

    status = commands.add_parser(
        "status",
        help="show how far runs are",
        description="Show how far runs are, in a table of all in some folders, and the count of each state.",
    )
    status.add_argument("runs", nargs="+", metavar="FOLDER", help="runs, sweeps, or folders that hold some")
    status.add_argument("--json", action="store_true", help="print a list of JSON objects instead")
    status.set_defaults(run=_status)

    add_benchmark(commands)
    _add_plan(commands)
    add_evaluate(commands).set_defaults(run=_evaluate)
    add_visualize(commands).set_defaults(run=_visualize)
    add_export(commands).set_defaults(run=_export)

    doctor = commands.add_parser(
        "doctor",
        help="show versions, devices and backends, and check that they work",
        description="Show versions, devices and backends, and check each backend that can be used against the "
        "reference. The exit status is 1 where something fails.",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="show what strategies cost before a run",
        description="Count what strategies cost, layer by layer and in total, before anything runs: tokens, "
        "multiply-adds, bytes kept for the backward, and the share of an unfused model's step that is left.",
        epilog="examples: famba plan model=vim_s fusion=all,interleaved,lower,upper fusion.budget=150; "
        "famba plan model=vim_s fusion=upper trainer.device=cuda trainer.precision=bf16",
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="as train.py takes them, several values by commas; "
        "trainer.device and trainer.precision may be those of another machine")  # fmt: skip
    add("-m", "--multirun", action="store_true", help="as for train.py; here several values need no -m")
    add("--config-dir", type=Path, metavar="FOLDER", help="a folder of your own configuration files, as for train.py")
    add("--backend", metavar="NAME", help="whose bytes to count (default: ops.backend, or the one that would serve)")
    add("--measure", action="store_true", help="time training steps here, beside what is predicted")
    add("--batch", type=int, default=32, metavar="N", help="images in a measured step (default: 32)")
    add("--rounds", type=int, default=5, metavar="N", help="measured steps each, in turn (default: 5)")
    add("--out", metavar="FOLDER", help="write plan.csv, plan.json and tokens.svg and .png there")
    parser.set_defaults(run=_plan)


def _download(options: argparse.Namespace) -> int:
    from famba.data import download

    folder = download(options.name, options.root)
    print(f"{options.name} is in {folder}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from famba.analysis.folders import prepare_folder
    from famba.analysis.plan import measure, plan, tables, write

    for name in ("batch", "rounds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; allowed: 1 or more")
    plans = plan(options.overrides, options.backend, options.config_dir)
    folder = None if options.out is None else prepare_folder(options.out)
    if options.measure:
        plans = measure(plans, options.batch, options.rounds)
    print(tables(plans))
    if folder is not None:
        write(plans, folder)
        print(f"\nplan.csv, plan.json, tokens.svg and tokens.png are in {folder}")
    return 0


def _report(options: argparse.Namespace) -> int:
    if options.out is not None:
        from famba.analysis.report import terminal, write_report

        print(terminal(write_report(options.runs, options.out), options.out))
        return 0
    from famba.analysis.runs import read_runs, run_table

    print(run_table(read_runs(options.runs)))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from famba.analysis.evaluation.evaluate import evaluate
    from famba.analysis.evaluation.report import as_json, table, write
    from famba.analysis.evaluation.request import check
    from famba.analysis.folders import prepare_folder

    request = check(options)
    folder = None if options.out is None else prepare_folder(options.out)
    found = evaluate(request)
    print(as_json(found) if options.json else table(found))
    if folder is not None:
        files = write(found, folder)
        print(f"in {folder}: {', '.join(file.name for file in files)}", file=sys.stderr)
    return 130 if found.interrupted else 0


def _visualize(options: argparse.Namespace) -> int:
    from famba.analysis.folders import prepare_folder
    from famba.analysis.pictures.images import SAMPLES_NOTE
    from famba.analysis.pictures.visualize import check, visualize

    request = check(options)
    folder = prepare_folder(options.out)
    for file in visualize(request, folder):
        print(file)
    if not options.images:
        print(SAMPLES_NOTE)
    return 0


def _export(options: argparse.Namespace) -> int:
    from famba.export.export import export
    from famba.export.request import check

    print(export(check(options)))
    return 0


def _status(options: argparse.Namespace) -> int:
    from famba.analysis.status import status, status_json, status_table

    runs = status(options.runs)
    print(status_json(runs) if options.json else status_table(runs))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from famba.analysis.doctor import diagnose

    report, works = diagnose()
    print(report)
    return 0 if works else 1
