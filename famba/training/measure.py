"""Measure a network: accuracy and loss on labelled images, and the costs of a training step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

from famba.training.build import Batches
from famba.training.distributed import Process
from famba.training.interrupts import Interrupted

# torch's own counter knows attention on GPUs alone.
_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_NOT_COUNTED = {_ON_CPU: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
# Autograd keeps the same for any batch besides what it keeps of each image: two sizes tell the two apart.
FEW, MANY = 2, 4


class Tally:
    """Sums over labelled images: hits at 1 and at 5 (or all classes), cross-entropy, count; float32 on a device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (b, classes) of any floating dtype, labels (b,)."""
        logits = logits.float()
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        self.sums += torch.stack([best[:, 0].sum().float(), best.sum().float(), loss, loss.new_tensor(len(labels))])

    def results(self) -> dict[str, float]:
        """Return "top1" and "top5" in percent, and "loss", the mean cross-entropy."""
        top1, top5, loss, count = self.sums.tolist()
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    process: Process,
    infer: Callable[[Tensor], Tensor],
    asked_to_stop: Callable[[], int] = lambda: 0,
) -> dict[str, float]:
    """Evaluate in eval mode over all processes; return `Tally.results`.

    infer maps images (b, 3, h, w) to logits (b, classes). asked_to_stop returns the signal that asked this process to
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


def macs_per_image(model: nn.Module, image_size: int) -> int:
    """Count the multiply-adds of one image's forward pass, as `Cost.macs` has them."""
    was_training, device = model.training, next(model.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED) as counter:
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    model.train(was_training)
    return counter.get_total_flops() // 2


def saved_bytes_per_image(model: nn.Module, image_size: int, autocast: torch.dtype | None) -> int:
    """Count the bytes that one more image makes autograd keep for the backward, the same on every device."""
    few, many = (
        count(model, (batch, 3, image_size, image_size), autocast, lambda images, _: model(images))[-1][1]
        for batch in (FEW, MANY)
    )
    return (many - few) // (MANY - FEW)


def count(
    model: nn.Module,
    shape: tuple[int, ...],
    autocast: torch.dtype | None,
    run: Callable[[Tensor, Callable[[], None]], object],
) -> list[tuple[int, int]]:
    """Return operations and bytes kept for the backward, up to each call of `run`'s second argument and to its end.

    run: applies the model to its first argument, images of this shape.
    """
    device = next(model.parameters()).device
    parameters = {_address(parameter) for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # keeping the tensors keeps their addresses apart
    marks: list[tuple[int, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept[_address(tensor)] = tensor
        return tensor

    def mark() -> None:
        saved = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)
        marks.append((counter.get_total_flops(), saved))

    # Not torch.autocast, which refuses a kind of device that is not on this machine.
    before = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    was_training = model.training
    model.train()
    try:
        torch.set_autocast_enabled(device.type, autocast is not None)
        torch.set_autocast_dtype(device.type, autocast or before[1])
        with (
            FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED) as counter,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            run(torch.zeros(shape, device=device), mark)
            mark()
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device.type, before[0])
        torch.set_autocast_dtype(device.type, before[1])
    model.train(was_training)
    return marks


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # data_ptr is 0 for every tensor without data
