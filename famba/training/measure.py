"""Measure a network: accuracy on labelled images, the costs of a training step, and where the numbers come from."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

import famba
from famba.models import Backbone
from famba.ops.registry import counting_as, resolve
from famba.training.build import Batches, build_model
from famba.training.config import without_credentials
from famba.training.devices import describe_device
from famba.training.distributed import Process
from famba.training.interrupts import Interrupted
from famba.training.step import Infer

# torch's own counter knows attention on GPUs alone.
_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_NOT_COUNTED = {_ON_CPU: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
# Autograd keeps the same for any batch besides what it keeps of each image: two sizes tell the two apart.
FEW, MANY = 2, 4
Mark = Callable[[], None]
_CODE = ("famba", "configs", "train.py", "setup.py", "pyproject.toml")
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "hydra-core", "triton", "mamba-ssm", "causal-conv1d")


class Tally:
    """Sums over labelled images: hits at 1 and at 5 (or all classes), cross-entropy, count; float32 on a device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (b, classes) of any floating dtype, labels (b,)."""
        logits = logits.float()
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        self.sums += torch.stack([best[:, 0].sum().float(), best.sum().float(), loss, loss.new_full((), len(labels))])

    def results(self) -> dict[str, float]:
        """Return "top1" and "top5" in percent, and "loss", the mean cross-entropy."""
        top1, top5, loss, count = self.sums.tolist()
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, process: Process, infer: Infer, asked_to_stop: Callable[[], int]
) -> dict[str, float]:
    """Evaluate in eval mode over all processes; return `Tally.results`.

    infer: from images (b, 3, h, w) to logits (b, classes). asked_to_stop: returns the signal that asked this process to
    stop, else 0. Raises Interrupted, in every process, if any was asked to stop on the way.
    """
    was_training = model.training
    model.eval()
    tally = Tally(process.device)
    hidden = None if process.is_main else True  # None: shown on a terminal alone
    for images, labels in tqdm(batches, "evaluation", leave=False, disable=hidden, dynamic_ncols=True):
        if asked_to_stop():
            break
        images, labels = (x.to(process.device, non_blocking=True) for x in (images, labels))
        tally.add(infer(images), labels)
    model.train(was_training)
    (number,) = process.largest(asked_to_stop())
    if number:
        raise Interrupted("stopped in an evaluation", number)
    process.sum(tally.sums)
    return tally.results()


@contextmanager
def without_data(name: str, arguments: dict[str, Any], device: torch.device, backend: str) -> Iterator[Backbone]:
    """Build a network whose tensors hold no data, to count inside the block what it costs on a device, here or not."""
    with torch.device("meta"):
        model = build_model(name, arguments)
    with FakeTensorMode(allow_non_fake_inputs=True), counting_as(backend):
        yield model.to_empty(device=device.type if device.type == "cuda" else "cpu")


def macs_per_image(model: nn.Module, image_size: int) -> int:
    """Count the multiply-adds of one image's forward pass, as `Cost.macs` has them."""
    was_training, device = model.training, next(model.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED) as counter:
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    model.train(was_training)
    return counter.get_total_flops() // 2


def saved_bytes_per_image(model: nn.Module, image_size: int, autocast: torch.dtype | None) -> int:
    """Count the bytes that one more image makes autograd keep for the backward, the same on every device."""
    shapes = ((batch, 3, image_size, image_size) for batch in (FEW, MANY))
    few, many = (count(model, shape, autocast, lambda images, _: model(images))[-1][1] for shape in shapes)
    return (many - few) // (MANY - FEW)


def count(
    model: nn.Module, shape: tuple[int, ...], autocast: torch.dtype | None, run: Callable[[Tensor, Mark], object]
) -> list[tuple[int, int]]:
    """Return operations and bytes kept for the backward, up to each call of `run`'s second argument and to its end.

    run: applies the model to its first argument, images of this shape.
    """
    device = next(model.parameters()).device
    # By addresses of storages, not data_ptr, which is 0 for every tensor without data; kept tensors keep theirs apart.
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}
    marks: list[tuple[int, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def mark() -> None:
        saved = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)
        marks.append((counter.get_total_flops(), saved))

    counter = FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED)
    was_training, kind = model.training, device.type
    # Not torch.autocast, which refuses a kind of device that is not on this machine.
    before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    try:
        torch.set_autocast_enabled(kind, autocast is not None)
        torch.set_autocast_dtype(kind, autocast or before[1])
        with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train()
            run(torch.zeros(shape, device=device), mark)
            mark()
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(kind, before[0])
        torch.set_autocast_dtype(kind, before[1])
        model.train(was_training)
    return marks


def provenance(device: torch.device, seed: int, world_size: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return versions, machine, commit, seed and backend of this run; no names of users or hosts."""
    packages: dict[str, str] = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        "started": now(),
        "famba": famba.__version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "device": describe_device(device),
        "processes": world_size,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "backend": resolve(device.type, dtype),
        "seed": seed,
        "arguments": [without_credentials(item) for item in sys.argv[1:]],
    }


def git_commit() -> str | None:
    """Return the last commit in famba's checkout that changes what runs; outside of a checkout $FAMBA_COMMIT.

    With "-dirty" if more is changed. Documents and tests do not count, so that runs before and after can be compared.
    """
    root = Path(famba.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments, "--", *_CODE]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()  # noqa: S603

    if (root / "pyproject.toml").is_file():  # famba's own checkout, not one that a virtual environment lies in
        with suppress(OSError, subprocess.SubprocessError):
            if commit := git("log", "-1", "--format=%H"):
                return commit + "-dirty" * bool(git("status", "--porcelain", "-uno"))
    return os.environ.get("FAMBA_COMMIT") or None


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
