"""Peak memory of a training step, where nothing counts that is left over from another measurement.

On a CPU that takes a process of its own. On a CUDA device torch counts what it allocates, so this process serves, in
which the kernels have been compiled and tuned already.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from famba.analysis.benchmark.machine import return_freed_memory
from famba.analysis.benchmark.steps import Step, Subject
from famba.errors import TrainingError
from famba.training.devices import out_of_memory, peak_memory_mib, reset_peak_memory, synchronize


class Peak(NamedTuple):
    """Memory in MiB: at most the whole process's, and what the step adds to model, gradients and optimizer."""

    peak_mib: float
    step_mib: float


def step_peak(subject: Subject, threads: int) -> Peak | None:
    """Measure one training step; None where memory runs out. threads: of the process that a CPU's step has."""
    if torch.device(subject.device).type == "cuda":
        return _peak_on_cuda(subject)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, subject, threads), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:  # how Linux ends a process when memory runs out
            return None
        raise TrainingError(f"measuring the memory of {subject} failed with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _peak_on_cuda(subject: Subject) -> Peak | None:
    gc.collect()
    torch.cuda.empty_cache()
    device = torch.device(subject.device)
    reset_peak_memory(device)
    others = peak_memory_mib(device)
    try:
        peak = measure(subject)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None
    return Peak(peak.peak_mib - others, peak.step_mib)


def measure(subject: Subject) -> Peak:
    """Measure one training step in this process, which on a CPU should be a fresh one."""
    return_freed_memory()
    device = torch.device(subject.device)
    step = Step(subject)
    if device.type == "cuda":
        # Tuning the kernels and the products' workspaces take memory once.
        step.train()
    step.allocate()
    reset_peak_memory(device)
    at_rest = peak_memory_mib(device)
    step.train()
    synchronize(device)
    peak = peak_memory_mib(device)
    return Peak(peak, peak - at_rest)


def _answer(sender: Connection, subject: Subject, threads: int) -> None:
    # Ctrl-C reaches every process of the terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        sender.send(measure(subject))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        sender.send(None)
