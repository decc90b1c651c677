"""Gather the summary of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from famba.fusion import tokens_per_layer
from famba.models import Backbone
from famba.training.config import RunConfig
from famba.training.devices import peak_memory_mib
from famba.training.distributed import Process
from famba.training.measure import macs_per_image, saved_bytes_per_image
from famba.training.provenance import now, provenance
from famba.training.setup import Setup
from famba.training.state import TrainingState
from famba.training.summary import FORMAT, Summary
from famba.training.trained_on import TrainedOn


@dataclass(frozen=True)
class Facts:
    """Hold facts of a run that change with its schedule alone."""

    parameters: int
    macs_per_image: int
    saved_bytes_per_image: int
    steps_per_epoch: int
    total_steps: int
    provenance: dict[str, Any]

    def measured_again(self, model: Backbone, setup: Setup) -> Facts:
        """Return the facts of a model whose schedule has changed."""
        macs, saved = _costs(model, setup)
        return replace(self, macs_per_image=macs, saved_bytes_per_image=saved)


def _costs(model: Backbone, setup: Setup) -> tuple[int, int]:
    """Return multiply-adds, and bytes saved for the backward, per image."""
    saved = saved_bytes_per_image(model, setup.image_size, setup.autocast)
    return macs_per_image(model, setup.image_size), saved


def gather_facts(
    model: Backbone, config: RunConfig, setup: Setup, process: Process, steps_per_epoch: int, total_steps: int
) -> Facts:
    """Measure a model on the device it is on."""
    macs, saved = _costs(model, setup)
    return Facts(
        parameters=sum(p.numel() for p in model.parameters()),
        macs_per_image=macs,
        saved_bytes_per_image=saved,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        provenance=provenance(process.device, config.seed, process.world_size, setup.dtype),
    )


def summarize(
    status: str,
    config: RunConfig,
    setup: Setup,
    process: Process,
    state: TrainingState,
    facts: Facts,
    tested: dict[str, float],
    trained_on: TrainedOn,
) -> Summary:
    """Return the summary of a run as it is now.

    tested: results on the test images, empty until they are known. Where the schedule adapts, all that depends on it is
    of the last one, and `adapted` lists each measurement.
    """
    totals, schedule = state.totals, state.model.fusion
    epochs = max(totals.steps / facts.steps_per_epoch, 1e-9)
    train_time = totals.data_s + totals.step_s
    return Summary(
        status=status,
        format=FORMAT,
        model=config.model.name,
        data=config.data.name,
        strategy=config.fusion.strategy,
        top1=tested.get("top1"),
        top5=tested.get("top5"),
        loss=tested.get("loss"),
        ema_top1=tested.get("ema_top1"),
        ema_top5=tested.get("ema_top5"),
        selected=totals.best or None,
        epoch=state.step // facts.steps_per_epoch,
        epochs=config.trainer.epochs,
        step=state.step,
        steps=facts.total_steps,
        train_time_s=train_time,
        eval_time_s=totals.eval_s,
        epoch_time_s={
            "data": totals.data_s / epochs,
            "step": totals.step_s / epochs,
            "evaluation": totals.eval_s / max(1, totals.evaluations),
        },
        images_per_s=config.trainer.batch_size * totals.steps / max(train_time, 1e-9),
        peak_memory_mib=peak_memory_mib(process.device),
        saved_bytes_per_image=facts.saved_bytes_per_image,
        macs_per_image=facts.macs_per_image,
        parameters=facts.parameters,
        image_size=setup.image_size,
        precision="fp32" if setup.autocast is None else str(setup.autocast).removeprefix("torch."),
        tokens=setup.tokens,
        schedule=tuple(schedule),
        adapted=tuple(totals.schedules) or None,
        started_from=totals.started_from or None,
        budget_matched=setup.matched,
        tokens_per_layer=tuple(tokens_per_layer(schedule, setup.tokens)),
        tokens_removed=sum(schedule),
        updated=now(),
        provenance=facts.provenance,
        images=trained_on.images,
        classes=trained_on.classes,
    )
