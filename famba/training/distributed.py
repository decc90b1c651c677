"""Join the processes that torchrun or srun started, and let them agree."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from famba.errors import ConfigError, TrainingError

_JOIN_TIMEOUT = timedelta(minutes=10)  # nodes that import from a busy file system come late
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # the slowest evaluation is waited for
# By these words of gloo and NCCL the process at the other end is gone.
_BROKEN = re.compile("Connection (closed|reset)|Broken pipe|remote process exited")


@dataclass(frozen=True)
class Process:
    """This process among those that train together; host_group does not wait for the device."""

    rank: int
    world_size: int
    device: torch.device
    host_group: Any = None
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """Return whether this process writes files."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add over processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, *numbers: int) -> list[int]:
        """Return the largest of each number over processes, without waiting for the device."""
        if self.world_size == 1:
            return list(numbers)
        values = torch.tensor(numbers)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.host_group)
        return values.tolist()

    def from_main(self, value: Any) -> Any:
        """Return the main process's value, any picklable object, in every process."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def wait_for_all(self) -> None:
        """Wait until every process has come here."""
        self.largest(0)

    def part(self) -> None:
        """Leave the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()

    def first_failure(self, error: Exception) -> Exception:
        """Publish why this process fails, before others lose it; return the failure that was published first."""
        if self.store is None:
            return error
        lost = isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None
        text = "lost another process: killed, or out of memory" if lost else str(error) or type(error).__name__
        first = mine = f"process {self.rank} failed: {text.splitlines()[0]}"
        with suppress(RuntimeError):  # the store may be gone with the process that kept it
            first = self.store.compare_set("failure", "", mine).decode()
        return TrainingError(first) if lost or first != mine else error


def world_size() -> int:
    """Return the number of processes of torchrun or srun, 1 without them."""
    adopt_slurm()
    return int(os.environ.get("WORLD_SIZE", "1"))


def adopt_slurm() -> None:
    """Set the environment variables of torchrun if srun started several tasks together."""
    given = os.environ
    # Set by srun alone; SLURM_NTASKS may be larger than 1 for a single process in a batch script.
    tasks = given.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or "WORLD_SIZE" in given or "SLURM_PROCID" not in given:
        return
    given |= {"WORLD_SIZE": tasks, "RANK": given["SLURM_PROCID"], "LOCAL_RANK": given.get("SLURM_LOCALID", "0")}
    given.setdefault("MASTER_ADDR", _first_host())
    # Steps that share a node must not share a port.
    own = int(given.get("SLURM_JOB_ID", "0")) * 31 + int(given.get("SLURM_STEP_ID", "0"))
    given.setdefault("MASTER_PORT", str(20_000 + own % 20_000))


def start_process(device: torch.device) -> Process:
    """Join the processes that were started together. Raises ConfigError if they cannot find one another."""
    size = world_size()
    if size == 1:
        return Process(0, 1, device)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_JOIN_TIMEOUT))
    except (ValueError, RuntimeError) as error:
        told = f"the {size} processes cannot connect to one another: {str(error).splitlines()[0]}"
        raise ConfigError(f"{told}; start them by torchrun or srun, or unset WORLD_SIZE") from error
    on_gpu = device.type == "cuda"
    if on_gpu:  # Slurm may show each process its own GPU alone, as number 0
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend, group_store = "nccl" if on_gpu else "gloo", dist.PrefixStore("group", store)
    dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT)
    host_group = dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD
    return Process(rank, size, device, host_group, store)


def _first_host() -> str:
    given = os.environ
    if given.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    command = ["scontrol", "show", "hostnames", given.get("SLURM_STEP_NODELIST", "")]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()[0]  # noqa: S603
    except (OSError, subprocess.SubprocessError, IndexError):
        # A container may lack Slurm's commands. The step is launched from the job's first node.
        return given.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
