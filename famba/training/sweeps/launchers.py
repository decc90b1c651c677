"""What a launcher's settings mean for the runs that it is to launch."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from shutil import which

from omegaconf import DictConfig

from famba.errors import ConfigError
from famba.training.config import RunConfig
from famba.training.sweeps.limits import Limits
from famba.training.sweeps.settings import LOCAL, SLURM, check_settings


def check_launcher(launcher: DictConfig) -> None:
    """Raise ConfigError where the launcher itself cannot work here."""
    check_settings(launcher)
    if launcher._target_ == LOCAL:
        Limits.of(launcher)
    if launcher._target_ != SLURM:
        return
    if find_spec("submitit") is None:
        raise ConfigError("hydra/launcher=slurm needs submitit; pip install 'famba[slurm]'")
    absent = [name for name in ("sbatch", "srun", "squeue") if which(name) is None]
    if absent:
        raise ConfigError(
            f"hydra/launcher=slurm needs Slurm's commands, {', '.join(absent)} not found; start it on a login node of "
            "the cluster, outside of containers, or use hydra/launcher=local"
        )


def processes(launcher: DictConfig) -> int | None:
    """Return how many processes a launcher gives to each run; None where it leaves that to the environment."""
    if launcher._target_ == SLURM:
        return launcher.nodes * launcher.tasks_per_node
    if launcher._target_ == LOCAL:
        return max(1, Limits.of(launcher).gpus_per_run)
    return None


def check_run(config: RunConfig, launcher: DictConfig) -> None:
    """Raise ConfigError where a run asks for what its launcher decides."""
    device = config.trainer.device
    if launcher._target_ == LOCAL and device.startswith("cuda:") and Limits.of(launcher).gpus_per_run:
        raise ConfigError(
            f"trainer.device={device}, but hydra/launcher=local gives each run its own GPU; leave out trainer.device"
        )


def elsewhere(config: RunConfig, launcher: DictConfig) -> RunConfig:
    """Return a run's configuration without what only the machine can judge that a launcher takes it to."""
    if launcher._target_ != SLURM:
        return config
    # A login node has neither the GPU nor its precisions and kernels.
    trainer = replace(config.trainer, device="cpu", precision="fp32", cuda_graphs="auto")
    return replace(config, trainer=trainer, ops=replace(config.ops, backend="auto"))
