"""Tell what a run is when it starts, and what can be done with it when it is finished."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

from famba.files import write_whole
from famba.ops.registry import explain
from famba.training.config import LoggerConfig
from famba.training.devices import has_bf16
from famba.training.records import METRICS
from famba.training.trainer import Training

_log = logging.getLogger(__name__)
_FOR_GPUS = 500  # million multiply-adds an image; Vim-Ti takes 1,400 at 224 x 224, vim_micro 28 at 32 x 32


def announce(training: Training) -> None:
    """Log what is trained on what, and where, as one table; warn where a CPU would take far too long."""
    config, setup, macs = training.config, training.setup, training.macs / 1e6
    recipe, trainer, size, removed = config.recipe, config.trainer, setup.image_size, sum(setup.schedule)
    classes = training.trained_on.num_classes
    images = [f"{n:,} {part}" for part, n in training.trained_on.images.items()]
    parameters = sum(p.numel() for p in training.state.model.parameters()) / 1e6
    left = f"{removed} removed, {setup.tokens - removed} left after the last layer"
    length = f"{trainer.epochs} epochs of {training.steps_per_epoch} steps of {trainer.batch_size} images"
    extras = (
        "warmup_epochs",
        "weight_decay",
        "mixup",
        "cutmix",
        "label_smoothing",
        "augmentation",
        "auto_augment",
        "random_erasing",
        "ema_decay",
    )
    named = [f"{name.replace('_', ' ')} {getattr(recipe, name)}" for name in extras if getattr(recipe, name)]
    ops_by = explain(setup.device.type, setup.dtype)
    table = {
        "model": f"{config.model.name}: {parameters:.2f} M parameters, {macs:,.1f} M multiply-adds an image",
        "tokens": f"at {size} x {size}, fusion {config.fusion.strategy}: {setup.tokens} tokens, {left}",
        "data": f"{config.data.name}: {classes} classes, {', '.join(images)} images",
        "recipe": f"{length}, {recipe.optimizer}, lr {recipe.lr} for {recipe.lr_batch} images, {', '.join(named)}",
        "device": f"{setup.device} ({training.provenance['device']}), {training.process.world_size} process(es)",
        "compute": f"{str(setup.dtype).removeprefix('torch.')}, ops by {ops_by}",
    }
    for name, text in table.items():
        _log.info("%-8s %s", name, text)
    if setup.device.type == "cpu" and macs > _FOR_GPUS:
        _log.warning(
            "this model is meant for GPUs: on a CPU the run takes very long. For a CPU there is model=vim_micro "
            "recipe=light, on 32 x 32 images; data.subset=500 trainer.epochs=2 tries a larger model on a few images"
        )
    if setup.device.type == "cuda" and setup.autocast is None and has_bf16(setup.device):
        _log.info("this run computes in float32; trainer.precision=bf16 uses the bfloat16 units of this GPU")


def next_steps(folder: Path, logger: LoggerConfig) -> str:
    """Return commands that look at a finished run."""
    run = shlex.quote(str(folder))
    lines = [
        f"famba visualize {run}   # draw which patches each token holds",
        f"famba evaluate {run} --per-class --out {run}/evaluation   # accuracy of each class, confusion matrix",
    ]
    if logger.name == "tensorboard":
        lines.append(f"tensorboard --logdir {run}")
    elif logger.name == "wandb" and logger.mode == "offline":
        lines.append(f"wandb sync {run}/wandb/offline-run-*")
    else:
        lines.append(f"famba report {shlex.quote(str(folder.parent))}   # compare it with the runs beside it")
    return "\n  ".join([f"next, for {folder}:", *lines])


def draw_curves(folder: Path) -> None:
    """Draw loss and Top-1 into curves.png; a failure is a warning, since the run is done."""
    try:
        from famba.drawing import curves  # matplotlib is not needed before

        content = curves(json.loads(line) for line in (folder / METRICS).read_text().splitlines())
        write_whole(folder / "curves.png", lambda file: Path(file).write_bytes(content))
    except Exception as error:
        _log.warning("curves.png is not drawn: %s", error)
