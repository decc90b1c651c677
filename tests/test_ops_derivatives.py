"""Derivatives of another kind than one backward: right, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import naive
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from famba.errors import ConfigError
from famba.models import Vim
from famba.ops import (
    Direction,
    add_rms_norm,
    bidirectional_mixer,
    causal_conv1d,
    fuse_tokens,
    match_tokens,
    selective_scan,
    use_backend,
)

# Entering forward-mode makes torch script functions of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

PLACES = torch.tensor([[0, 1, 1], [0, 0, 1]])
SIDE = [(4, 3), (4,), (6, 4), (4, 2), (4,), (4, 2), (4,)]
MIXER = {
    "x": (2, 3, 5),
    "in_weight": (8, 5),
    **{f"{side}.{f}": s for side in ("forward", "backward") for f, s in zip(Direction._fields, SIDE, strict=True)},
    "out_weight": (5, 4),
}
SCAN = {**dict.fromkeys(("u", "delta"), (2, 3, 4)), "A": (4, 2), **dict.fromkeys(("B", "C"), (2, 3, 2))}
SCAN |= {"D": (4,), "z": (2, 3, 4), "delta_bias": (4,)}


def mixer(x: Tensor, in_weight: Tensor, *rest: Tensor) -> Tensor:
    return bidirectional_mixer(x, in_weight, Direction(*rest[:7]), Direction(*rest[7:14]), rest[14])


CALLS: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]]]] = {
    "add_rms_norm": (lambda *t: add_rms_norm(*t, 1e-5), {"x": (2, 3, 4), "residual": (2, 3, 4), "weight": (4,)}),
    "causal_conv1d": (causal_conv1d, {"x": (2, 3, 4), "weight": (4, 3), "bias": (4,)}),
    "fuse_tokens": (lambda x, w: fuse_tokens(x, PLACES, w, 2), {"x": (2, 3, 4), "weights": (2, 3)}),
    "match_tokens": (lambda x, s: match_tokens(x, 0, None, s, 1, "tome"), {"metric": (2, 6, 4), "sizes": (2, 6)}),
    "selective_scan": (selective_scan, SCAN),
    "bidirectional_mixer": (mixer, MIXER),
}


@pytest.fixture(params=["auto", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize(("name", "given"), [(name, i) for name, (_, s) in CALLS.items() for i in range(len(s))])
def test_every_input_refuses_a_tangent(name: str, given: int) -> None:
    op, shapes = CALLS[name]
    inputs = [torch.randn(shape) for shape in shapes.values()]
    with forward_ad.dual_level(), naive.as_users_run_it():
        op(*inputs)  # without a tangent there is nothing to lose
        for leaf in (inputs[given], inputs[given].clone().requires_grad_()):
            inputs[given] = forward_ad.make_dual(leaf, torch.ones_like(leaf))
            with pytest.raises(ConfigError, match=f"{name}: {list(shapes)[given]} carries a tangent.*autograd.grad"):
                op(*inputs)


def make() -> tuple[Vim, Callable[[Tensor], Tensor], Tensor]:
    torch.manual_seed(0)
    model = Vim(img_size=8, patch_size=2, embed_dim=16, depth=2, num_classes=3, d_state=4, fusion=(3, 2))
    return model, lambda x: model(x).square().sum(), torch.randn(2, 3, 8, 8)


def test_forward_mode_through_a_model_is_refused_with_the_remedy() -> None:
    model, loss, x = make()
    with naive.as_users_run_it():
        for ask in (
            lambda: torch.func.jvp(loss, (x,), (x,)),
            lambda: torch.func.jacfwd(model)(x),
            lambda: torch.autograd.functional.jacobian(model, x, strategy="forward-mode", vectorize=True),
        ):
            with pytest.raises(ConfigError, match="forward-mode .* is not supported, only reverse mode"):
                ask()
        # The remedy that the message names.
        rows = torch.autograd.functional.jacobian(model, x)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(model(leaf)[1, 2], leaf)[0]
    torch.testing.assert_close(rows[1, 2], expected)


def test_derivatives_of_derivatives_are_refused() -> None:
    _, loss, x = make()

    def twice() -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    with naive.as_users_run_it():
        for ask in (twice, lambda: torch.func.hessian(loss)(x), lambda: torch.autograd.functional.hessian(loss, x)):
            with pytest.raises((RuntimeError, ConfigError)):
                ask()
