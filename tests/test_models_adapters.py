"""Adapters, hooks, pruned and quantized layers in a Vim's mixers act as in any other module."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from famba.models import Vim, mixer
from famba.models.mixer import VimMixer

LINEAR = ("in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj")
CONV = ("conv1d", "conv1d_b")
PLACES = ("before_mixer", "after_scan")


def make(place: str = "before_mixer", **changes: Any) -> Vim:
    torch.manual_seed(0)
    options = {"fusion": (3, 0, 2), "fusion_weighting": "size", "num_classes": 3, "d_state": 4, **changes}
    model = Vim(img_size=8, patch_size=2, embed_dim=16, depth=3, fusion_place=place, **options)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)  # away from the small first values, so that each layer shows in the logits
    return model


def differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() > 1e-4 * b.norm())


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def mixer_of(model: Vim, layer: int = 0) -> VimMixer:
    found = model.layers[layer].mixer
    assert isinstance(found, VimMixer)
    return found


class Adapter(nn.Module):
    """A low-rank addition to a linear layer, which has the layer's weight as an attribute as those of libraries do."""

    weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LINEAR)
def test_an_adapter_counts_as_if_it_were_merged(name: str, place: str) -> None:
    model, merged = make(place), make(place)
    for layer in range(3):
        plain, part = getattr(mixer_of(merged, layer), name), getattr(mixer_of(model, layer), name)
        adapter = Adapter(part)
        setattr(mixer_of(model, layer), name, adapter)
        with torch.no_grad():
            plain.weight += adapter.up.weight @ adapter.down.weight
    logits = model(images())
    torch.testing.assert_close(logits, merged(images()), rtol=1e-5, atol=5e-6)
    assert differ(logits, make(place)(images()))
    logits.square().sum().backward()
    adapter = getattr(mixer_of(model), name)
    assert all(weight.grad.abs().sum() > 0 for weight in (adapter.up.weight, adapter.down.weight))
    assert adapter.base.weight.grad is None


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [*LINEAR, *CONV])
def test_hooks_are_called_and_change_what_they_change(name: str, place: str) -> None:
    model = make(place)
    before = model(images())
    part, seen = getattr(mixer_of(model), name), list[str]()
    handles = [
        part.register_forward_pre_hook(lambda *_: seen.append("before")),
        part.register_forward_hook(lambda *_: seen.append("after")),
        part.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    logits = model(images())
    torch.testing.assert_close(logits, before, rtol=1e-5, atol=5e-6)
    logits.sum().backward()
    assert seen == ["before", "after", "backward"]
    handles.append(part.register_forward_hook(lambda _, given, output: 2 * output))
    assert differ(model(images()), before)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(images()), before)
    original = part.forward
    part.forward = lambda x: 3 * original(x)
    assert differ(model(images()), before)
    del part.forward
    mixer_of(model).register_forward_hook(lambda _, given, output: torch.zeros_like(output))
    assert differ(model(images()), before)


@pytest.mark.parametrize("change", [partial(prune.l1_unstructured, name="weight", amount=0.5), weight_norm])
def test_pruned_and_parametrized_layers_train(change: Callable[[nn.Module], Any]) -> None:
    model = make()
    before, parts = model(images()), [getattr(mixer_of(model, i), name) for i in range(3) for name in (*LINEAR, *CONV)]
    for part in parts:
        change(part)
    logits = model(images())
    assert differ(logits, before) == (change is not weight_norm)
    logits.square().sum().backward()
    for part in parts:
        assert all(p.grad.abs().sum() > 0 for p in part.parameters())
        if change is not weight_norm:
            assert torch.equal(part.weight == 0, part.weight_mask == 0)
            prune.remove(part, "weight")
    torch.testing.assert_close(model(images()), logits, rtol=1e-5, atol=5e-6)


@pytest.mark.filterwarnings("ignore")  # torch recommends another package
def test_dynamically_quantized_layers_compute() -> None:
    model = make().eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(mixer_of(quantized).in_proj).__module__
    logits, exact = quantized(images()), model(images())
    assert not torch.equal(logits, exact)
    assert (logits - exact).norm() < 0.2 * exact.norm()


def test_it_is_said_once_and_with_the_layer(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixer, "_told", set())
    model = make()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)  # of all modules: leaves the one op
    model(images())
    handle.remove()
    assert not caplog.records
    for layer in range(3):
        mixer_of(model, layer).x_proj_b = Adapter(mixer_of(model, layer).x_proj_b)  # type: ignore[assignment]
    model(images())
    model(images())
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "x_proj_b of a Vim's mixer was replaced or has hooks" in caplog.text
