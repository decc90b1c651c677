"""The launchers, where Hydra looks for them. It imports this at every start; the work is in famba.training.sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class FambaLauncher(Launcher):
    """What the launchers share: they keep their settings until there is something to launch."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take over what Hydra has composed."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config


class SequentialLauncher(FambaLauncher):
    """One run after the other in this process."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Do the runs; return what came of each, in order."""
        from famba.training.sweeps import sequential

        return sequential.launch(self, job_overrides, initial_job_idx)


class LocalLauncher(FambaLauncher):
    """Several runs at once on this machine, each a process of its own."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Do the runs; return what came of each, in order."""
        from famba.training.sweeps import local

        return local.launch(self, job_overrides, initial_job_idx)


class SlurmLauncher(FambaLauncher):
    """Each run a job of a Slurm cluster."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the runs and wait for them; return what came of each, in order."""
        from famba.training.sweeps import slurm

        return slurm.launch(self, job_overrides, initial_job_idx)
