"""The `famba` command."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence

import famba
from famba.analysis.benchmark.command import add_benchmark
from famba.errors import FambaError


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
        help="compare runs in a table",
        description="Compare runs in a table, from their run folders.",
    )
    report.add_argument("runs", nargs="+", metavar="FOLDER", help="run folders, or folders that hold some")
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

    doctor = commands.add_parser(
        "doctor",
        help="show versions, devices and backends, and check that they work",
        description="Show versions, devices and backends, and check each backend that can be used against the "
        "reference. The exit status is 1 where something fails.",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _download(options: argparse.Namespace) -> int:
    from famba.data import download

    folder = download(options.name, options.root)
    print(f"{options.name} is in {folder}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from famba.analysis.tables import find_runs, run_table

    print(run_table(find_runs(options.runs)))
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
