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

# Of each command its module, with add_options(parser) and run(options), and a line of help.
COMMANDS = {
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
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if arguments[0] == "train":  # Hydra reads everything behind it itself, --help included
            train = _import("famba.training.app").main
            gc.freeze()  # what the imports made lives to the end: no collection has to look through it
            return train(arguments[1:])
        if arguments[0] in COMMANDS:
            module, parser = _import(COMMANDS[arguments[0]][0]), argparse.ArgumentParser(f"famba {arguments[0]}")
            module.add_options(parser)
            # Options may stand anywhere, but not those of benchmark, which has commands of its own.
            parse = parser.parse_args if arguments[0] == "benchmark" else parser.parse_intermixed_args
            return module.run(parse(arguments[1:]))
        options = _parser(arguments).parse_args(arguments)
        return options.run(options)
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


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser that lists every command. Raises ConfigError for one that is not there."""
    parser = argparse.ArgumentParser("famba", description="Train Vision Mamba models with cross-layer token fusion.")
    parser.add_argument("--version", action="version", version=f"famba {famba.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    # This and those of COMMANDS are listed for their help; main has taken them before.
    commands.add_parser("train", help="train a model: the same as python train.py in a checkout")
    download = commands.add_parser("download", help="fetch a data set ahead of time, for machines without network")
    download.add_argument("name", help="cifar100 or cifar10")
    download.add_argument("--root", help="folder for it, as in data.root (default: $FAMBA_DATA or ~/.cache/famba/data)")
    download.set_defaults(run=_download)
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    if asked is not None and asked not in (known := [*commands.choices, *COMMANDS]):
        raise ConfigError(f"unknown command {asked!r}{near_miss(asked, known)}; `famba --help` lists all")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser


def _import(module: str) -> Any:
    """Import a module without looking for garbage meanwhile, among the 400,000 objects that torch and timm make."""
    gc.disable()  # looking would take a fifth of the time
    found = importlib.import_module(module)
    gc.enable()
    return found


def _download(options: argparse.Namespace) -> int:
    from famba.data import download

    folder = download(options.name, options.root)
    print(f"{options.name} is in {folder}")
    return 0
