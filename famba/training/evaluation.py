"""Top-1, Top-5 and loss of a model on labelled images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from famba.training.build import Batches
from famba.training.distributed import Process
from famba.training.interrupts import StopAsked


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
    stop, else 0. Raises StopAsked, in every process, if any was asked to stop on the way.
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
        raise StopAsked(number)
    process.sum(tally.sums)
    return tally.results()
