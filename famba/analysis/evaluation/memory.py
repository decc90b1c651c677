"""What the inference of a batch adds to the memory that weights and images take.

On CUDA what torch's allocator gave out at most. On a CPU by the resident memory of a process of its own, where nothing
is left over from other work: the libraries, which are most of a small model's process, are there before.
"""

from __future__ import annotations

import multiprocessing
import platform
import signal
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from famba.analysis.evaluation.request import Request
from famba.analysis.malloc import return_freed_memory
from famba.analysis.variants import Variant
from famba.ops import use_backend
from famba.ops.registry import AUTO
from famba.training.devices import peak_memory_mib, reset_peak_memory
from famba.training.weights import Trained, load_trained

_MIB = 2**20


class _Order(NamedTuple):
    """A request as it travels to another process."""

    path: str
    variants: tuple[Variant, ...]
    batch_size: int
    autocast: torch.dtype | None
    backend: str
    threads: int


def inference_memory(request: Request) -> list[float | None]:
    """Measure each variant, in MiB; None where this device or system does not tell, or memory runs out."""
    if request.device.type == "cuda":
        return [_on_cuda(request, variant) for variant in request.variants]
    unknown: list[float | None] = [None] * len(request.variants)
    if request.device.type != "cpu" or platform.system() != "Linux":
        return unknown
    order = _Order(
        request.path,
        request.variants,
        request.batch_size,
        request.autocast,
        request.backend,
        torch.get_num_threads(),
    )
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, order), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except (EOFError, KeyboardInterrupt):
        return unknown
    finally:
        process.kill()
        process.join()


def _on_cuda(request: Request, variant: Variant) -> float:
    variant.put_into(request.trained.model)
    images = _images(request.trained, request.batch_size, request.device)
    reset_peak_memory(request.device)
    before = torch.cuda.memory_allocated(request.device)
    with torch.no_grad(), request.chosen_backend(), request.autocasting():
        request.trained.model(images)
    return (torch.cuda.max_memory_allocated(request.device) - before) / _MIB


def _answer(sender: Connection, order: _Order) -> None:
    # Ctrl-C reaches every process of the terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(order.threads)
    return_freed_memory()
    trained = load_trained(order.path)
    cpu = torch.device("cpu")
    images = _images(trained, order.batch_size, cpu)
    found = []
    if order.backend != AUTO:
        use_backend(order.backend)
    autocast = torch.autocast("cpu", dtype=order.autocast, enabled=order.autocast is not None)
    for variant in order.variants:
        variant.put_into(trained.model)
        with torch.no_grad(), autocast:
            trained.model(images)  # what the kernels allocate once
            reset_peak_memory(cpu)
            before = peak_memory_mib(cpu)
            trained.model(images)
        found.append(peak_memory_mib(cpu) - before)
    sender.send(found)


def _images(trained: Trained, batch_size: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = trained.image_size
    return torch.randn(batch_size, 3, size, size, generator=generator).to(device)
