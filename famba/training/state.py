"""What a run carries from step to step, and into its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3

from famba.models import Backbone
from famba.training.optimizer import load_state, portable_state


@dataclass
class Totals:
    """What a run has gathered so far. Times are seconds.

    The epoch_ members cover the epoch under way; epoch_open says that it is not yet evaluated and logged. evaluated
    holds the last evaluation, best that of the checkpoint that validation selected, schedules each that was measured.
    started_from tells of the weights that init_from named; it is empty without.
    """

    data_s: float = 0.0
    step_s: float = 0.0
    eval_s: float = 0.0
    steps: int = 0
    evaluations: int = 0
    epoch_open: bool = False
    epoch_data_s: float = 0.0
    epoch_step_s: float = 0.0
    epoch_steps: int = 0
    epoch_loss: float = 0.0
    epoch_losses: int = 0
    evaluated: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    schedules: list[dict[str, Any]] = field(default_factory=list)
    started_from: dict[str, Any] = field(default_factory=dict)

    def begin_epoch(self) -> None:
        """Set the epoch's own sums to zero."""
        self.epoch_data_s = self.epoch_step_s = self.epoch_loss = 0.0
        self.epoch_steps = self.epoch_losses = 0

    def add_step(self, data_s: float, step_s: float) -> None:
        """Add the times of a step."""
        self.data_s += data_s
        self.epoch_data_s += data_s
        self.step_s += step_s
        self.epoch_step_s += step_s
        self.steps += 1
        self.epoch_steps += 1

    def add_time(self, seconds: float) -> None:
        """Add time that belongs to steps, but is of none."""
        self.step_s += seconds
        self.epoch_step_s += seconds

    def add_loss(self, loss: float) -> None:
        """Add the loss of a step."""
        self.epoch_loss += loss
        self.epoch_losses += 1


@dataclass
class TrainingState:
    """The parts that training changes; step counts the steps that are done."""

    model: Backbone
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    totals: Totals = field(default_factory=Totals)
    step: int = 0

    def content(self) -> dict[str, Any]:
        """Everything that a continuation needs, as tensors and plain values."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": portable_state(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "schedule": list(self.model.fusion),
            "totals": asdict(self.totals),
        }

    def restore(self, content: dict[str, Any]) -> None:
        """Take over what `content` returned."""
        self.step = content["step"]
        self.set_fusion(content["schedule"])
        self.model.load_state_dict(content["model"])
        load_state(self.optimizer, content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
        self.totals = Totals(**content["totals"])

    def set_fusion(self, schedule: Sequence[int]) -> None:
        """Let the network, and its average, remove other numbers of tokens."""
        self.model.set_fusion(schedule)
        if self.ema is not None:
            cast(Backbone, self.ema.module).set_fusion(schedule)

    def is_finite(self) -> bool:
        """Whether every parameter is a finite number."""
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())
