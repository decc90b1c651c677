"""Top-1, Top-5 and loss of a model on labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from famba.training.distributed import Process
from famba.training.interrupts import StopAsked

Batches = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    process: Process,
    autocast: torch.dtype | None,
    asked_to_stop: Callable[[], int] = lambda: 0,
) -> dict[str, float]:
    """Evaluate in eval mode, over all processes.

    Returns "top1" and "top5" in percent, and "loss", the mean cross-entropy. Where there are fewer than five classes,
    Top-5 is over all of them. Raises StopAsked, in every process, where any was asked to stop on the way:
    `asked_to_stop` returns the number of the signal, 0 for none.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(4, device=process.device)
    for images, labels in batches:
        if asked_to_stop():
            break
        images = images.to(process.device, non_blocking=True)
        labels = labels.to(process.device, non_blocking=True)
        with torch.autocast(process.device.type, dtype=autocast, enabled=autocast is not None):
            logits = model(images)
        logits = logits.float()
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        totals += torch.stack([best[:, 0].sum().float(), best.sum().float(), loss, loss.new_tensor(len(labels))])
    model.train(was_training)
    (number,) = process.largest(asked_to_stop())
    if number:
        raise StopAsked(number)
    top1, top5, loss, count = process.sum(totals).tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}
