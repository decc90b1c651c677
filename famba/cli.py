"""Run the `famba` command. Each command's options are in its own module, which is imported only when it is called."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import famba
from famba.errors import ConfigError, FambaError, near_miss

# Of each command its module, with add_options(parser) and run(options), and a line of help; download's are here.
COMMANDS = {
    "train": ("famba.training.app", "train a model: the same as python train.py in a checkout"),
    "download": ("famba.cli", "fetch a data set ahead of time, for machines without network"),
    "resume": ("famba.training.app", "go on with a run from its folder alone"),
    "report": ("famba.analysis.report", "compare runs in a table, or in a report with plots"),
    "status": ("famba.analysis.status", "show how far runs are"),
    "benchmark": ("famba.analysis.benchmark.command", "time ops and training steps"),
    "plan": ("famba.analysis.plan", "show what strategies cost before a run"),
    "evaluate": ("famba.analysis.evaluate", "evaluate a trained model, with other ways of fusing if asked"),
    "predict": ("famba.analysis.predict", "print the five likeliest classes of each image"),
    "visualize": ("famba.analysis.visualize", "draw which patches each token holds, layer by layer"),
    "export": ("famba.export.export", "write a trained model for timm, torch.export or ONNX"),
    "doctor": ("famba.analysis.doctor", "show versions, devices and backends, and check that they work"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for what the user can mend."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if command.startswith("-"):
            _overview().parse_args([command, *rest])  # which ends here, for there is no command
        if command not in COMMANDS:
            raise ConfigError(f"unknown command {command!r}{near_miss(command, COMMANDS)}; `famba --help` lists all")
        gc.disable()  # looking for garbage among the 400,000 objects that torch and timm make takes a fifth of the time
        module: Any = importlib.import_module(COMMANDS[command][0])
        gc.enable()
        if command == "train":  # Hydra reads everything behind it itself, --help included
            gc.freeze()  # what the imports made lives to the end: no collection has to look through it
            return module.main(rest)
        parser = argparse.ArgumentParser(f"famba {command}")
        module.add_options(parser)
        # Options may stand anywhere, but not those of benchmark, which has commands of its own.
        parse = parser.parse_args if command == "benchmark" else parser.parse_intermixed_args
        return module.run(parse(rest))
    except FambaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read the output, such as head, has seen enough; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _overview() -> argparse.ArgumentParser:
    """Return a parser that lists every command."""
    parser = argparse.ArgumentParser("famba", description="Train Vision Mamba models with cross-layer token fusion.")
    parser.add_argument("--version", action="version", version=f"famba {famba.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `famba download`."""
    parser.add_argument("name", help="cifar100 or cifar10")
    parser.add_argument("--root", help="folder for it, as in data.root (default: $FAMBA_DATA or ~/.cache/famba/data)")


def run(options: argparse.Namespace) -> int:
    """Fetch a data set."""
    from famba.data import download

    folder = download(options.name, options.root)
    print(f"{options.name} is in {folder}")
    return 0
