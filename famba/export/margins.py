"""How close an image's matching is to another one.

Runtimes round differently. Where two similarities differ by no more than that, one may choose one pair and the other
another, and both are right; what comes out then differs by far more than a rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from famba import ops
from famba.ops.reference import split_alternately


def matching_margins(model: nn.Module, images: Tensor) -> Tensor:
    """For each image the smallest difference of cosines that any layer's matching turned on, (b,).

    Infinite where nothing fuses. images: (b, ...), what the model takes.
    """
    with torch.no_grad(), ops.use_backend("reference"), _Watching() as watching:
        model(images)
    nothing = torch.full((len(images),), float("inf"))
    return torch.stack([nothing, *watching.margins]).amin(0)


class _Watching(TorchDispatchMode):
    """Looks at what is given to every matching within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.margins: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.famba.match_tokens.default:
            metric, leading, protected, _, r, *_ = args
            self.margins.append(_margin(metric, leading, protected, r))
        return func(*args, **(kwargs or {}))


def _margin(metric: Tensor, leading: int, protected: Tensor | None, r: int) -> Tensor:
    """How close a matching is to another, (b,).

    The smaller of two differences: between the last pair that fuses and the first that does not; and, of a token that
    fuses, between its closest partner and the next.
    """
    unit = F.normalize(metric.float(), dim=-1)
    in_a, in_b = (
        _rows(unit, places) for places in split_alternately(leading, protected, metric.shape[1], metric.device)
    )
    closest = (in_a @ in_b.transpose(1, 2)).topk(min(2, in_b.shape[1]), dim=2).values
    order = closest[:, :, 0].argsort(dim=1, descending=True, stable=True)
    closest = closest.gather(1, order.unsqueeze(2).expand_as(closest))
    found = []
    if r < closest.shape[1]:
        found.append(closest[:, r - 1, 0] - closest[:, r, 0])
    if closest.shape[2] > 1:
        found.append((closest[:, :r, 0] - closest[:, :r, 1]).amin(1))
    return torch.stack(found).amin(0) if found else metric.new_full((metric.shape[0],), float("inf"))


def _rows(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places.expand(x.shape[0], -1).unsqueeze(2).expand(-1, -1, x.shape[2]))
