"""Count the costs of a training step: multiply-adds, and bytes kept for the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# torch's own counter knows attention on GPUs alone.
_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_NOT_COUNTED = {_ON_CPU: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
# Autograd keeps the same for any batch besides what it keeps of each image: two sizes tell the two apart.
FEW, MANY = 2, 4


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
    # Keeping the tensors keeps their addresses apart.
    kept: dict[int, Tensor] = {}
    marks: list[tuple[int, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept[_address(tensor)] = tensor
        return tensor

    def mark() -> None:
        saved = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)
        marks.append((counter.get_total_flops(), saved))

    was_training = model.training
    model.train()
    with (
        FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        _autocasting(device.type, autocast),
    ):
        run(torch.zeros(shape, device=device), mark)
        mark()
    model.train(was_training)
    return marks


def _address(tensor: Tensor) -> int:
    # Not data_ptr, which is 0 for every tensor without data.
    return tensor.untyped_storage()._cdata


@contextmanager
def _autocasting(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast as torch.autocast does, also for a kind of device that is not on this machine."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
