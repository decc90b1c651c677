"""How many runs this machine does at once, and with what."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from famba.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """What hydra/launcher=local may use. gpus holds their names as CUDA_VISIBLE_DEVICES has them.

    jobs: runs at once. threads: of each run, None for its share of the cores.
    """

    jobs: int
    threads: int | None
    gpus_per_run: int
    gpus: tuple[str, ...]

    @classmethod
    def of(cls, launcher: DictConfig) -> Limits:
        """Work them out from a launcher's settings. Raises ConfigError for what this machine does not have."""
        gpus = _visible_gpus()
        per_run = launcher.gpus_per_run
        if per_run is None:
            per_run = 1 if gpus else 0
        places = len(gpus) // per_run if per_run else None
        jobs: int | None = launcher.jobs or places
        if per_run * max(1, jobs or 1) > len(gpus):
            raise ConfigError(
                f"hydra.launcher.gpus_per_run={per_run} for {max(1, jobs or 1)} runs at once takes "
                f"{per_run * max(1, jobs or 1)} GPUs, this process sees {len(gpus)}; lower it, or hydra.launcher.jobs"
            )
        threads = launcher.threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or None
        return cls(jobs or max(1, cores() // (threads or 1)), threads, per_run, gpus)

    def places(self) -> list[tuple[str, ...]]:
        """Return the GPUs of each run that goes on at once."""
        step = self.gpus_per_run
        return [self.gpus[place * step : (place + 1) * step] for place in range(self.jobs)]

    def threads_of(self, at_once: int) -> int:
        """Return the threads of each process, where so many runs go on at once."""
        return self.threads or max(1, cores() // at_once // max(1, self.gpus_per_run))


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _visible_gpus() -> tuple[str, ...]:
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if named is None else [name.strip() for name in named.split(",")]
    return tuple(names[:count])
