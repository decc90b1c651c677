"""What a training step costs: multiply-adds, and bytes kept for the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Both products of attention; shapes (b, heads, l, channels)."""
    batch, heads, length, channels = query
    return 2 * batch * heads * length * key[2] * (channels + value[3])


# Attention as torch has it on a CPU: its own counter knows those of GPUs alone.
_NOT_COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def macs_per_image(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of one image's forward pass: what papers on vision backbones call FLOPs.

    Matrix products, convolutions, attention and scans count; element-wise work and norms do not.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED) as counter:
        model(torch.zeros(1, 3, image_size, image_size, device=device))
    model.train(was_training)
    return counter.get_total_flops() // 2


def saved_bytes_per_image(model: nn.Module, image_size: int, autocast: torch.dtype | None) -> int:
    """Bytes that one more image makes autograd keep for the backward, parameters not counted.

    Exact and the same on every device: the difference between two batch sizes.
    """
    few, many = (_saved_bytes(model, batch, image_size, autocast) for batch in (2, 4))
    return (many - few) // 2


def _saved_bytes(model: nn.Module, batch: int, image_size: int, autocast: torch.dtype | None) -> int:
    parameter = next(model.parameters())
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    # Keeping the tensors keeps their addresses apart.
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    was_training = model.training
    model.train()
    images = torch.zeros(batch, 3, image_size, image_size, device=parameter.device)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(parameter.device.type, dtype=autocast, enabled=autocast is not None),
    ):
        model(images).sum()
    model.train(was_training)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in parameters)
