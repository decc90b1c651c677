"""Choose devices and precisions, measure memory, and seed the generators of random numbers."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import random
import re
import resource
from contextlib import suppress
from pathlib import Path
from typing import Literal

import joblib
import numpy as np
import torch

from famba.data.draws import Stream, derived_integer
from famba.errors import ConfigError, TrainingError
from famba.training.config import TrainerConfig

_MOST_WORKERS = 16


def choose_device(name: str) -> torch.device:
    """Return the device of this name, a GPU made the current one; "auto" is the first of CUDA, MPS and CPU here."""
    present = ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if torch.cuda.is_available():
        present = ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count())), *present]
    if name not in ("auto", *present):
        raise ConfigError(f"trainer.device {name!r} is not on this machine; allowed here: auto, {', '.join(present)}")
    device = torch.device(present[0] if name == "auto" else name)
    if device.type == "cuda":  # with torchrun each process gets its own
        own = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(own % torch.cuda.device_count())
        torch.backends.cudnn.deterministic = True  # or else the patch embedding's gradient differs from run to run
    return device


def loading_workers(workers: int | Literal["auto"]) -> int:
    """Return how many processes read images; "auto": the cores that this process may use, at most 16."""
    if workers != "auto":
        return workers
    # Affinity and quotas count. Processes of torchrun share the cores; Slurm gives each its own.
    return min(_MOST_WORKERS, max(1, joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def has_bf16(device: torch.device) -> bool:
    """Return whether the device computes in bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # which some releases of torch lack
    return device.type == "cpu" and any(getattr(torch.cpu, question, lambda: False)() for question in questions)


def choose_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype, None for float32; "auto" is bfloat16 if the device has it, else float32."""
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else None
    if (precision == "bf16" and not has_bf16(device)) or (precision == "fp16" and device.type == "mps"):
        raise ConfigError(f"this {device.type} device has no trainer.precision={precision}; use fp32 or auto")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def describe_device(device: torch.device) -> str:
    """Name the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        name = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def release_memory(device: torch.device) -> None:
    """Give back what an earlier run in this process left behind in cycles, such as its CUDA graphs."""
    gc.collect()
    with suppress(OSError, AttributeError):  # of glibc alone: free memory goes back to the system
        ctypes.CDLL(None).malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak, so that a run does not inherit that of the run before; macOS cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif platform.system() == "Linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB: of CUDA's allocator, or of this process on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if platform.system() == "Linux":
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or a CPU."""
    said = "(?i)can't allocate memory|out of memory|_ALLOC_FAILED"  # the latter by cuBLAS and cuDNN
    told = re.search(said, str(error)) and isinstance(error, RuntimeError)
    return bool(told) or isinstance(error, torch.OutOfMemoryError | MemoryError)


def memory_error(error: BaseException, batch: int, trainer: TrainerConfig) -> TrainingError:
    """Return an error that says which settings need less memory than those of a run with `batch` images at once."""
    reason = (str(error) or repr(error)).splitlines()[0]
    less = [f"trainer.accumulation={2 * trainer.accumulation}", "a smaller trainer.batch_size"]
    less += [] if trainer.grad_checkpointing else ["trainer.grad_checkpointing=true"]
    less += ["trainer.precision=bf16"] if trainer.precision == "fp32" else []
    told = f"{', '.join(less)}, a larger fusion.budget, or a smaller model"
    return TrainingError(f"out of memory with {batch} images at once ({reason}). Less memory: {told}")


def seed_generators(stream: Stream, *place: int) -> None:
    """Seed all global generators for one use at one place in the run, so that no generator's state has to be saved."""
    torch.manual_seed(derived_integer(stream, *place))
    np.random.seed(derived_integer(stream, *place, bits=32))
    random.seed(derived_integer(stream, *place))
