"""Straight-line implementations, loop by loop, that the tests compare the package with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jaxtyping
import torch
from torch import Tensor
from torch.nn import functional as F


@contextmanager
def as_users_run_it() -> Iterator[None]:
    """Without the checks of types and shapes in signatures, which only the tests switch on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
    reverse: bool = False,
) -> Tensor:
    """The recurrence, one time step after another."""
    batch, length, channels = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias
    if softplus:
        delta = F.softplus(delta)
    state = u.new_zeros(batch, channels, A.shape[1])
    out: dict[int, Tensor] = {}
    for t in reversed(range(length)) if reverse else range(length):
        step = delta[:, t, :, None]
        state = torch.exp(step * A) * state + step * u[:, t, :, None] * B[:, t, None, :]
        y = (state * C[:, t, None, :]).sum(-1)
        if D is not None:
            y = y + D * u[:, t]
        if z is not None:
            y = y * z[:, t] * torch.sigmoid(z[:, t])
        out[t] = y
    if not length:
        return u * 1.0
    return torch.stack([out[t] for t in range(length)], dim=1)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False, reverse: bool = False) -> Tensor:
    """Each position's sum over the taps that fall inside the sequence."""
    length, width = x.shape[1], weight.shape[1]
    rows = []
    for t in range(length):
        y = torch.zeros_like(x[:, t])
        for back in range(width):
            there = t + back if reverse else t - back
            if 0 <= there < length:
                y = y + x[:, there] * weight[:, width - 1 - back]
        if bias is not None:
            y = y + bias
        rows.append(y * torch.sigmoid(y) if silu else y)
    return torch.stack(rows, dim=1) if rows else x * 1.0


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    mean_square = (total * total).sum(-1, keepdim=True) / total.shape[-1]
    return total / torch.sqrt(mean_square + eps) * weight, total


def match(metric: Tensor, r: int, protected: Sequence[Sequence[int]], order: str) -> list[list[int]]:
    """Places of each image's tokens after fusing r pairs, by plain Python; `protected` per image."""
    return [_match_one(image.tolist(), r, list(guards), order) for image, guards in zip(metric, protected, strict=True)]


def _match_one(tokens: list[list[float]], r: int, guards: list[int], order: str) -> list[int]:
    length = len(tokens)
    dealt = sorted(guards) + [i for i in range(length) if i not in guards]
    set_a = [i for i in dealt[0::2] if i not in guards]
    set_b = [i for i in dealt[1::2] if i not in guards]
    norms = [math.sqrt(sum(v * v for v in token)) for token in tokens]
    units = [[v / n for v in token] for token, n in zip(tokens, norms, strict=True)]
    pairs = []
    for a in set_a:
        similarities = [sum(p * q for p, q in zip(units[a], units[b], strict=True)) for b in set_b]
        best = max(similarities, default=-2.0)
        pairs.append((-best, a, set_b[similarities.index(best)] if set_b else a))
    joined = {a: b for _, a, b in sorted(pairs)[:r]}
    alone = [i for i in range(length) if i not in joined]
    if order == "tome":
        alone = [i for i in alone if i not in set_b] + set_b
    if r == 0:
        alone = list(range(length))
    return [alone.index(joined.get(i, i)) for i in range(length)]


def fuse(x: Tensor, places: Sequence[Sequence[int]], length: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weighted mean and summed sizes of each place."""
    images, all_sizes = [], []
    for i, image_places in enumerate(places):
        rows, row_sizes = [], []
        for place in range(length):
            members = [t for t, p in enumerate(image_places) if p == place]
            weights = [1.0 if sizes is None else float(sizes[i, t]) for t in members]
            rows.append(sum((w * x[i, t] for w, t in zip(weights, members, strict=True)), 0 * x[i, 0]) / sum(weights))
            row_sizes.append(sum(weights))
        images.append(torch.stack(rows))
        all_sizes.append(row_sizes)
    return torch.stack(images), torch.tensor(all_sizes, dtype=torch.float64)


def _mixer_scan(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Vim's two gated scans, averaged."""
    inner = w["in_proj.weight"].shape[0] // 2
    u, z = x @ w["in_proj.weight"][:inner].T, x @ w["in_proj.weight"][inner:].T
    states = w["A_log"].shape[1]
    out = torch.zeros_like(u)
    for tail, rates, reverse in (("", "A_log", False), ("_b", "A_b_log", True)):
        v = conv(u, w[f"conv1d{tail}.weight"][:, 0], w[f"conv1d{tail}.bias"], silu=True, reverse=reverse)
        projected = v @ w[f"x_proj{tail}.weight"].T
        rank = projected.shape[-1] - 2 * states
        delta = projected[..., :rank] @ w[f"dt_proj{tail}.weight"].T + w[f"dt_proj{tail}.bias"]
        B, C = projected[..., rank : rank + states], projected[..., rank + states :]
        out = out + scan(v, delta, -torch.exp(w[rates]), B, C, w[f"D{tail}"], z, softplus=True, reverse=reverse) / 2
    return out


def _patches(w: dict[str, Tensor], images: Tensor) -> Tensor:
    kernel = w["patch_embed.proj.weight"]
    height, width = kernel.shape[2:]
    rows = []
    for top in range(0, images.shape[2], height):
        for left in range(0, images.shape[3], width):
            patch = images[:, :, top : top + height, left : left + width]
            rows.append(patch.reshape(len(images), -1) @ kernel.reshape(len(kernel), -1).T)
    return torch.stack(rows, dim=1) + w["patch_embed.proj.bias"]


def vim(
    w: dict[str, Tensor],
    images: Tensor,
    fusion: Sequence[int],
    cls_position: str,
    order: str,
    weighting: str,
    place: str,
) -> tuple[Tensor, dict[str, Any]]:
    """Logits of a Vim from its state_dict, and for each layer its places, its sizes and the stream that it leaves."""
    x = _patches(w, images)
    batch, patches, _ = x.shape
    index = {"head": 0, "middle": patches // 2, "none": None}[cls_position]
    if index is not None:
        x = torch.cat([x[:, :index], w["cls_token"].expand(batch, -1, -1), x[:, index:]], dim=1)
    x = x + w["pos_embed"]
    residual = None
    cls = [[] if index is None else [index] for _ in range(batch)]
    sizes = torch.ones(x.shape[:2], dtype=torch.float64)
    kept: dict[str, Any] = {"places": [], "sizes": [], "streams": []}
    for layer, r in enumerate(fusion):
        prefix = f"layers.{layer}."
        mixer = {k.removeprefix(prefix + "mixer."): v for k, v in w.items() if k.startswith(prefix + "mixer.")}
        normed, residual = add_rms_norm(x, residual, w[prefix + "norm.weight"], 1e-5)
        source = normed if place == "before_mixer" else _mixer_scan(mixer, normed)
        places = match(source.detach(), r, cls, order)
        weights = sizes if weighting == "size" else None
        length = source.shape[1] - r
        fused, _ = fuse(source, places, length, weights)
        residual, _ = fuse(residual, places, length, weights)
        sizes = fuse(source.detach(), places, length, sizes)[1]
        x = (_mixer_scan(mixer, fused) if place == "before_mixer" else fused) @ mixer["out_proj.weight"].T
        cls = [[image_places[c] for c in guards] for image_places, guards in zip(places, cls, strict=True)]
        kept["places"].append(places)
        kept["sizes"].append(sizes)
        kept["streams"].append(residual + x)
    normed, _ = add_rms_norm(x, residual, w["norm_f.weight"], 1e-5)
    if index is not None:
        pooled = torch.stack([normed[i, guards[0]] for i, guards in enumerate(cls)])
    elif weighting == "size":
        pooled = (normed * sizes[..., None]).sum(1) / patches
    else:
        pooled = normed.sum(1) / normed.shape[1]
    return pooled @ w["head.weight"].T + w["head.bias"], kept
