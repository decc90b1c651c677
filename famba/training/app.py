"""Run `python train.py`: a command line in, a run folder out."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from famba import ops
from famba.errors import ConfigError, FambaError
from famba.files import write_whole
from famba.ops.registry import AUTO, explain
from famba.training.compose import Command, help_text
from famba.training.config import RunConfig, flatten, plain
from famba.training.devices import has_bf16
from famba.training.distributed import Process, start_process, world_size
from famba.training.interrupts import Interrupted, StopRequest
from famba.training.logging import FILE_ONLY, log_to, top1_text
from famba.training.records import METRICS, duration
from famba.training.run_folder import RunFolder, as_begun, command_line, continued, finished, override
from famba.training.setup import Setup, prepare
from famba.training.sweeps import Sweep
from famba.training.trainer import Training

_log = logging.getLogger(__name__)
_FOR_GPUS = 500  # million multiply-adds an image; Vim-Ti takes 1,400 at 224 x 224, vim_micro 28 at 32 x 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for errors that the user can mend, 128 + n after signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = Command.parse(arguments)
        if command.question == "help":
            print(help_text(command.config_dir), end="")
        elif command.question is not None and command.multirun:
            raise ConfigError("--cfg shows one run; leave out -m, and name one value of each key")
        elif command.question is not None:
            print(yaml.safe_dump(plain(command.config()), sort_keys=False), end="")
        elif command.multirun:
            sweep = plan(command)
            print("".join(f"{note}\n" for note in dict.fromkeys(command.notes)), end="")
            sweep.launch(train)
        else:
            train(continued(command), notes=command.notes)
    except FambaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        if "-m" in arguments or "--multirun" in arguments:
            print(f"to do what is left of the sweep: {command_line(arguments)}", file=sys.stderr)
        return 128 + stop.signal if isinstance(stop, Interrupted) else 130
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `famba resume`."""
    parser.description = "Go on with a run, with its own settings: the same as python train.py run_dir=RUN."
    parser.add_argument("folder", metavar="RUN", help="the folder of the run")
    text = "a setting that changes no result, such as data.root or trainer.device"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=text)


def run(options: argparse.Namespace) -> int:
    """Go on with a run. Raises ConfigError where none is."""
    if RunFolder(Path(options.folder), writes=False).config is None:
        told = "holds no run to go on with; `famba status FOLDER` lists the runs in a folder"
        raise ConfigError(f"{options.folder} {told}")
    return main([override("run_dir", options.folder), *options.overrides])


def plan(command: Command) -> Sweep:
    """Return the sweep of a command line, with every run checked. Raises FambaError for the first that cannot work."""
    if world_size() > 1:
        raise ConfigError("-m does not go with torchrun; sweep without it, or start one run at a time")
    sweep = Sweep(command)
    alike = (replace(run.config, seed=0, run_dir=str(sweep.folder)) for run in sweep.runs.values())
    for config, processes in {repr(config): sweep.launcher.check(config) for config in alike}.values():
        prepare(config, processes)
    return sweep


def train(config: RunConfig, run_dir: Path | None = None, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Train as configured, in `run_dir` instead of the configuration's own if it is given; return the summary.

    notes: lines for the log, on how the configuration came about. Raises Interrupted if the run was asked to stop and
    has saved itself; after a notice of Slurm's it is back in the queue by then.
    """
    path = run_dir or Path(config.run_dir)
    with StopRequest() as stop:
        asked, config = config, as_begun(config, path)
        setup = prepare(config)
        process = start_process(setup.device)
        try:
            folder = RunFolder(process.from_main(path), writes=process.is_main)
            with folder, log_to(folder):
                for note in dict.fromkeys(notes):
                    _log.info("%s", note)
                now, then = flatten(plain(asked)), flatten(plain(config))
                if kept := ", ".join(f"{key}={value}" for key, value in then.items() if value != now[key]):
                    _log.info("this run continues as an earlier version of Famba began it: %s", kept)
                summary = _train_in(folder, config, setup, process, stop)
            process.wait_for_all()
        except Interrupted:
            process.part()
            raise
        except Exception as error:
            failure = process.first_failure(error)
            raise failure from (None if failure is error else error)
    process.part()
    return summary


def _train_in(
    folder: RunFolder, config: RunConfig, setup: Setup, process: Process, stop: StopRequest
) -> dict[str, Any]:
    done = process.from_main(finished(folder, config) if process.is_main else None)
    if done is not None:
        _log.info("%s is finished already (%s)", folder.path, top1_text("test", done))
        return done
    before, training = folder.summary, None
    try:
        with nullcontext() if config.ops.backend == AUTO else ops.use_backend(config.ops.backend):
            _log.info("run folder: %s", folder.path)
            training = Training(config, setup, folder, process, stop)
            announce(training)
            summary = training.run()
    except Exception as error:
        reason = str(process.first_failure(error))
        # A start that is refused leaves the summary of the run that is there as it was.
        if training is not None or before is None:
            with suppress(FambaError):
                said = folder.summary or {"model": config.model.name, "strategy": config.fusion.strategy}
                folder.writes = True  # in any process: the main one may be killed first
                failed = folder.write_summary({**said, "status": "failed", "error": reason})
                if training is not None:
                    training.metrics.finish(failed)
        _log.error("%s", reason, extra=FILE_ONLY)
        raise
    results = top1_text("test", summary)
    _log.info("finished, trained in %s: %s, Top-5 %.2f %%", duration(summary["train_time_s"]), results, summary["top5"])
    if folder.writes:
        draw_curves(folder.path)
        run = shlex.quote(str(folder.path))
        _log.info("next: famba visualize %s; famba evaluate %s --per-class --out %s/evaluation", run, run, run)
    return summary


def announce(training: Training) -> None:
    """Log what is trained on what, and where, as one table; warn where a CPU would take far too long."""
    config, setup, macs = training.config, training.setup, training.macs / 1e6
    recipe, trainer, size, on = config.recipe, config.trainer, setup.image_size, training.trained_on
    removed, parameters = sum(setup.schedule), sum(p.numel() for p in training.state.model.parameters()) / 1e6
    tokens = f"{setup.tokens} tokens, {removed} removed, {setup.tokens - removed} left after the last layer"
    steps = f"{trainer.epochs} epochs of {training.steps_per_epoch} steps of {trainer.batch_size} images"
    if training.total_steps < trainer.epochs * training.steps_per_epoch:
        steps += f", stopped after {training.total_steps} steps"
    padding = None if recipe.augmentation == "timm" else recipe.crop_padding
    crop = {None: "random resized crop", 0: "no crop"}.get(padding, f"crop padding {padding}")
    images = ", ".join(f"{n:,} {part}" for part, n in on.images.items())
    named = ("mixup", "cutmix", "label_smoothing", "augmentation", "auto_augment", "random_erasing", "ema_decay")
    extras = [crop, *(f"{name.replace('_', ' ')} {getattr(recipe, name)}" for name in named if getattr(recipe, name))]
    for name, text in (
        ("model", f"{config.model.name}: {parameters:.2f} M parameters, {macs:,.1f} M multiply-adds an image"),
        ("tokens", f"at {size} x {size}, fusion {config.fusion.strategy}: {tokens}"),
        ("data", f"{config.data.name}: {on.num_classes} classes, {images} images"),
        ("recipe", f"{steps}, {recipe.optimizer}, lr {recipe.lr} for {recipe.lr_batch} images, {', '.join(extras)}"),
        ("device", f"{setup.device} ({training.provenance['device']}), {training.process.world_size} process(es)"),
        ("compute", f"{str(setup.dtype).removeprefix('torch.')}, ops by {explain(setup.device.type, setup.dtype)}"),
    ):
        _log.info("%-8s %s", name, text)
    if setup.device.type == "cpu" and macs > _FOR_GPUS:
        _log.warning(
            "this model is meant for GPUs: on a CPU the run takes very long. For a CPU there is model=vim_micro "
            "recipe=light, on 32 x 32 images; data.subset=500 trainer.epochs=2 tries a larger model on a few images"
        )
    if setup.device.type == "cuda" and setup.autocast is None and has_bf16(setup.device):
        _log.info("this run computes in float32; trainer.precision=bf16 uses the bfloat16 units of this GPU")


def draw_curves(folder: Path) -> None:
    """Draw loss and Top-1 into curves.png; a failure is a warning, since the run is done."""
    try:
        from famba.drawing import curves  # matplotlib is not needed before

        content = curves(json.loads(line) for line in (folder / METRICS).read_text().splitlines())
        write_whole(folder / "curves.png", lambda file: Path(file).write_bytes(content))
    except Exception as error:
        _log.warning("curves.png is not drawn: %s", error)
