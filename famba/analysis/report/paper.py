"""Figures in print, to stand beside one's own where those are of the same setting.

Source: Shen et al., "Famba-V: Fast Vision Mamba with Cross-Layer Token Fusion", arXiv 2409.09808: CIFAR-100 on an A100.
A figure that is not listed here is not known here, and its cell stays empty.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from famba.analysis.report.runs import Run
from famba.fusion.schedules import PAPER, schedule
from famba.training.compose import compose
from famba.training.config import flatten, plain

SOURCE = "arXiv 2409.09808, CIFAR-100 on an A100 with the paper's recipe"
# The experiment, and what of it makes a run one of the paper's, whatever the model and the strategy.
_EXPERIMENT = "experiment=paper_table"
_SHARED = ("trainer.epochs", "trainer.max_steps", "trainer.batch_size", "data.", "model.", "init_from", "recipe.")
_FREE = ("model.name", "model.num_classes", "data.root", "data.image_size", "data.num_classes", "data.workers")
_DEPTH, _TOKENS, _BUDGET, _IMAGE_SIZE = 24, 197, 168, 224


class Printed(NamedTuple):
    """Top-1 in percent of the test images, and the training time in the paper's words; None where not known."""

    top1: float | None
    time: str | None


_NOTHING = Printed(None, None)
_PRINTED = {
    ("vim_small_patch16_224", "none"): Printed(76.9, None),
    ("vim_small_patch16_224", "upper"): Printed(75.2, None),
    ("vim_tiny_patch16_224", "interleaved"): Printed(67.0, "under 4 h"),
}


def has_model(name: str) -> bool:
    """Whether any figure is known of a model, by its timm name."""
    return any(model == name for model, _ in _PRINTED)


def known(run: Run) -> Printed:
    """Return what the paper has for a run's model and strategy, whatever else the run was told."""
    return _PRINTED.get((run.model, run.strategy), _NOTHING)


def printed(run: Run) -> Printed:
    """Return what the paper has for a run of its setting; empty where it has nothing, or the run is of another."""
    found = known(run)
    return _NOTHING if found == _NOTHING or deviations(run) else found


def deviations(run: Run) -> list[str]:
    """Return a line for each way in which a run is not of the paper's setting, which is that of its experiment.

    Order and place of fusing are free: the paper and its code have two places, and no figures for the order.
    """
    wanted = {**_paper(), "image size": _IMAGE_SIZE}
    if run.strategy != "none":
        wanted |= {"fusion.weighting": "mean", "fusion.mode": "fuse"}
    given = {**run.config, "image size": run.image_size}
    found = [
        f"{key} is {_shown(given.get(key))}, {'but not set there' if value is None else f'not {value}'}"
        for key, value in wanted.items()
        if given.get(key) != value
    ]
    budgets = {schedule(run.strategy, _DEPTH, _TOKENS, budget) for budget in (_BUDGET, PAPER)}
    if run.schedule not in budgets:
        totals = " or ".join(map(str, sorted({sum(counts) for counts in budgets})))
        found.append(f"{sum(run.schedule)} tokens are removed, not {totals} as there")
    return found


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)


@cache
def _paper() -> dict[str, Any]:
    values = flatten(plain(compose([_EXPERIMENT, "model=vim_s", "fusion=none"])))
    return {key: values[key] for start in _SHARED for key in values if key.startswith(start) and key not in _FREE}
