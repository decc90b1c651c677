"""Processes that train together: started by torchrun or srun, joined by torch.distributed."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from famba.errors import ConfigError, TrainingError

# Nodes that import from a busy file system come late; a collective waits for the slowest evaluation.
_JOIN_TIMEOUT = timedelta(minutes=10)
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
_FIRST_PORT, _PORTS = 20000, 20000


@dataclass(frozen=True)
class Process:
    """This process among those that train together; host_group is what agrees without the device."""

    rank: int
    world_size: int
    device: torch.device
    host_group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average over processes, in place."""
        return self.sum(values) / self.world_size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add over processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, *numbers: int) -> list[int]:
        """Return the largest of each number over processes; a device that still computes is not waited for."""
        if self.world_size == 1:
            return list(numbers)
        values = torch.tensor(numbers)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.host_group)
        return values.tolist()

    def from_main(self, value: Any) -> Any:
        """Return the main process's value, any picklable object, in every process."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def wait_for_all(self) -> None:
        """Wait until every process has come here."""
        self.largest(0)


def world_size() -> int:
    """Processes that torchrun or srun started together; 1 without them. Raises ConfigError where that is no number."""
    adopt_slurm()
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(
            f"WORLD_SIZE is {given!r}; torchrun sets it to the number of processes, take it out of the environment"
        )
    return int(given)


def rank() -> int:
    """Number of this process among them."""
    adopt_slurm()
    return int(os.environ.get("RANK", "0"))


def adopt_slurm() -> None:
    """Say what torchrun would say in the environment, where srun started several tasks together.

    SLURM_STEP_NUM_TASKS is set by srun alone: in a batch script that starts one process by itself SLURM_NTASKS may be
    larger than 1.
    """
    given = os.environ
    tasks = int(given.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1 or "WORLD_SIZE" in given or "SLURM_PROCID" not in given:
        return
    given["WORLD_SIZE"] = str(tasks)
    given["RANK"] = given["SLURM_PROCID"]
    given["LOCAL_RANK"] = given.get("SLURM_LOCALID", "0")
    given.setdefault("MASTER_ADDR", _first_host())
    # Steps that share a node must not share a port.
    own = int(given.get("SLURM_JOB_ID", "0")) * 31 + int(given.get("SLURM_STEP_ID", "0"))
    given.setdefault("MASTER_PORT", str(_FIRST_PORT + own % _PORTS))


def connect(purpose: str) -> dist.Store:
    """Open a connection of its own to the store that the processes share, with keys of this purpose alone.

    Raises TrainingError where the process that keeps the store cannot be reached.
    """
    # torchrun keeps the store itself, and keeps it when it starts the processes again.
    kept_for_us = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if address is None or not port.isdecimal():
        raise ConfigError(
            f"WORLD_SIZE is {world_size()}, but MASTER_ADDR={address} and MASTER_PORT={port or None} name no place to "
            "meet; start the processes by torchrun or srun, or unset WORLD_SIZE"
        )
    try:
        store = dist.TCPStore(
            address,
            int(port),
            world_size(),
            is_master=rank() == 0 and not kept_for_us,
            timeout=_JOIN_TIMEOUT,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise TrainingError(
            f"process {rank()} of {world_size()} cannot reach the others at {address}:{port} "
            f"(MASTER_ADDR, MASTER_PORT): {str(error).splitlines()[0]}"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"famba/{attempt}/{purpose}", store)


def start_process(device: torch.device) -> Process:
    """Join the processes that were started together, or be the only one."""
    if world_size() == 1:
        return Process(0, 1, device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        # Slurm may show each process its own GPU alone, as number 0.
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=connect("group"),
        rank=rank(),
        world_size=world_size(),
        timeout=_COLLECTIVE_TIMEOUT,
    )
    host_group = dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD
    return Process(rank(), world_size(), device, host_group)


def part(process: Process) -> None:
    """Leave the others; they do the same."""
    if process.world_size > 1:
        dist.destroy_process_group()


def _first_host() -> str:
    given = os.environ
    if given.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1"
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST", "")
    scontrol = shutil.which("scontrol")
    if scontrol is not None:
        done = subprocess.run(  # noqa: S603 - Slurm's own command on Slurm's own list
            [scontrol, "show", "hostnames", nodes], capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode == 0 and done.stdout.split():
            return done.stdout.split()[0]
    # A container may lack Slurm's commands. The step is launched from the job's first node.
    return given.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
