"""The mixer as one op against its parts, and what it keeps."""

from __future__ import annotations

import warnings
from typing import Any

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import EXAMPLES, assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from famba.errors import ConfigError
from famba.ops import Direction, bidirectional_mixer, use_backend
from famba.ops.bidirectional_mixer import compose_mixer, kept_bytes
from famba.ops.inputs import MixerInputs, MixerSizes
from famba.ops.native import kernels, library, mixer, mixer_backward

needs_kernels = pytest.mark.skipif(library.obstacle() is not None, reason=f"native kernels: {library.obstacle()}")

Weights = tuple[Tensor, Direction, Direction, Tensor | None]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def direction(channels: int, states: int, rank: int, width: int) -> Direction:
    return Direction(
        conv_weight=draw(channels, width) / width,
        conv_bias=draw(channels),
        x_weight=draw(rank + 2 * states, channels) / max(1, channels) ** 0.5,
        dt_weight=draw(channels, rank) / max(1, rank),
        dt_bias=draw(channels) - 1,
        A=-draw(channels, states).exp(),
        D=draw(channels),
    )


def weights(d_model: int, channels: int, states: int, rank: int, width: int = 4, out: bool = True) -> Weights:
    two = [direction(channels, states, rank, width) for _ in range(2)]
    in_weight = draw(2 * channels, d_model) / max(1, d_model) ** 0.5
    return in_weight, two[0], two[1], draw(d_model, channels) / max(1, channels) ** 0.5 if out else None


def flat(x: Tensor, w: Weights) -> list[Tensor | None]:
    return [x, w[0], *w[1], *w[2], w[3]]


def built(tensors: list[Tensor | None]) -> tuple[Tensor, Tensor, Direction, Direction, Tensor | None]:
    x, in_weight, *rest, out_weight = tensors
    return x, in_weight, Direction(*rest[:7]), Direction(*rest[7:]), out_weight


def run(mixer, tensors: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    """The result and all gradients."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = mixer(*built(leaves))
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))]


def exact(tensors: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    with use_backend("reference"):
        return run(compose_mixer, [None if t is None else t.double() for t in tensors], dy.double())


def drawn_inputs(batch: int, length: int, d_model: int = 6, out: bool = True) -> tuple[list[Tensor | None], Tensor]:
    tensors = flat(draw(batch, length, d_model), weights(d_model, 11, 3, 2, out=out))
    return tensors, draw(batch, length, d_model if out else 11)


@needs_kernels
@EXAMPLES
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 3),
    length=st.sampled_from([0, 1, 2, 5, 16, 17, 33]),
    sizes=st.tuples(st.integers(0, 9), st.integers(0, 20), st.sampled_from([0, 1, 3, 4, 16]), st.integers(0, 4)),
    width=st.integers(1, 5),
    out=st.booleans(),
    isa=st.sampled_from(library.isas() if library.obstacle() is None else ["portable"]),
    chunk=st.sampled_from([4, 384]),
)
def test_one_op_agrees_with_its_parts(
    seed: int, batch: int, length: int, sizes: tuple[int, ...], width: int, out: bool, isa: str, chunk: int
) -> None:
    torch.manual_seed(seed)
    drawn = weights(*sizes, width=width, out=out)
    tensors = [None if t is None else t.float() for t in flat(draw(batch, length, sizes[0]), drawn)]
    dy = draw(batch, length, sizes[0] if out else sizes[1]).float()
    with pytest.MonkeyPatch.context() as patch, use_backend("native"):
        patch.setattr(kernels, "_CHUNK", chunk)
        library.use_isa(isa)
        try:
            actual = run(bidirectional_mixer, tensors, dy)
        finally:
            library.use_isa(None)
    for number, (a, b) in enumerate(zip(actual, exact(tensors, dy), strict=True)):
        assert a.dtype == torch.float32
        # Sums of terms of size 1 that happen to cancel are as exact as their terms.
        assert_close(a, b, 1e-5, f"result {number}", floor=1.0)


@needs_kernels
def test_bfloat16_is_as_near_as_the_parts_in_bfloat16() -> None:
    torch.manual_seed(0)
    tensors = [t.bfloat16() for t in flat(draw(3, 37, 24), weights(24, 48, 16, 3))]
    dy = draw(3, 37, 24).bfloat16()
    wanted = exact(tensors, dy)
    with use_backend("native"):
        actual = run(bidirectional_mixer, tensors, dy)
    with use_backend("reference"):
        parts = run(compose_mixer, tensors, dy)

    def error(x: Tensor, y: Tensor) -> float:
        return ((x.double() - y).norm() / y.norm()).item()

    for number, (a, p, w) in enumerate(zip(actual, parts, wanted, strict=True)):
        assert a.dtype == torch.bfloat16
        assert error(a, w) <= max(1e-2, 1.2 * error(p, w)), f"result {number}"


@needs_kernels
def test_autocast_casts_the_products_and_keeps_the_weights_gradients_in_float32() -> None:
    torch.manual_seed(0)
    tensors = [t.float() for t in flat(draw(2, 19, 24), weights(24, 48, 16, 3))]
    dy = draw(2, 19, 24)
    with use_backend("native"), torch.autocast("cpu", torch.bfloat16):
        actual = run(bidirectional_mixer, tensors, dy)
    assert actual[0].dtype == torch.bfloat16
    for number, (a, w) in enumerate(zip(actual, exact(tensors, dy), strict=True)):
        assert number == 0 or a.dtype == torch.float32
        assert (a.double() - w).norm() <= 2e-2 * w.norm(), f"result {number}"


class Casts(TorchDispatchMode):
    """Counts the matrices that are copied from float32 to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(zip(*args[:2], strict=True)) if func is torch.ops.aten._foreach_copy_.default else []
        given += [args[:2]] if func is torch.ops.aten.copy_.default else []
        out = func(*args, **(kwargs or {}))
        given += [(out, args[0])] if func is torch.ops.aten._to_copy.default else []
        kinds = [(into.dtype, source.dtype) for into, source in given if source.ndim == 2]
        self.count += kinds.count((torch.bfloat16, torch.float32))
        return out


@needs_kernels
def test_each_weight_is_cast_once_in_a_step() -> None:
    tensors, dy = drawn_inputs(2, 5)
    inputs = MixerInputs(*built([t.float() for t in tensors]))
    with Casts() as uncast:
        _, *kept = mixer(inputs)
        mixer_backward(dy.float(), inputs, kept)
    assert uncast.count == kept[3].numel() == 0
    inputs = inputs._replace(x=inputs.x.bfloat16())
    with Casts() as forward:
        _, *kept = mixer(inputs)
    with Casts() as backward:
        mixer_backward(dy.bfloat16(), inputs, kept)
    assert (forward.count, backward.count) == (6, 0)


def test_what_is_kept_is_counted_with_the_copied_weights_and_without() -> None:
    sizes = MixerSizes(2, 5, d_model=6, channels=16, states=4, rank=2, out=6, cast=True)
    assert kept_bytes("reference", sizes, 2) is None
    if library.obstacle() is None:
        of_tokens = 2 * 2 * 5 * (16 + 2 * 10)
        assert kept_bytes("native", sizes._replace(cast=False), 4) == 2 * of_tokens
        weights = 2 * (2 * 16 * 6 + 2 * (10 * 16 + 16 * 2) + 16 * 6)
        assert kept_bytes("native", sizes, 2) == of_tokens + weights


@needs_kernels
def test_it_keeps_less_than_a_third_of_what_its_parts_keep() -> None:
    torch.manual_seed(0)
    drawn = [None if t is None else t.float().requires_grad_() for t in flat(draw(4, 65, 96), weights(96, 192, 16, 6))]

    def kept_bytes(backend: str, batch: int) -> int:
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            return kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)

        x = drawn[0][:batch].detach().bfloat16().requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16), hooks:
            bidirectional_mixer(*built([x, *drawn[1:]]))
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    # Of one more image; weights count in both.
    native, parts = (kept_bytes(backend, 4) - kept_bytes(backend, 3) for backend in ("native", "reference"))
    assert 0 < native < parts / 3


@needs_kernels
def test_the_same_bits_whatever_the_threads() -> None:
    torch.manual_seed(0)
    tensors, dy = drawn_inputs(3, 29)
    tensors = [t.float() for t in tensors]
    threads = torch.get_num_threads()
    results = []
    with use_backend("native"):
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(run(bidirectional_mixer, tensors, dy))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
def test_only_the_gradients_asked_for() -> None:
    tensors, _ = drawn_inputs(2, 5)
    tensors = [t.float() for t in tensors]
    tensors[0].requires_grad_()
    with use_backend("native"):
        bidirectional_mixer(*built(tensors)).sum().backward()
    assert tensors[0].grad is not None
    assert all(t.grad is None for t in tensors[1:])


class _GivesNoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return None


@needs_kernels
def test_without_a_gradient_of_the_result_there_are_none() -> None:
    tensors, _ = drawn_inputs(2, 5)
    leaves = [t.float().requires_grad_() for t in tensors]
    with use_backend("native"):
        _GivesNoGradient.apply(bidirectional_mixer(*built(leaves))).sum().backward()
    assert all(t.grad is None for t in leaves)


def test_multiply_adds_are_those_of_the_parts() -> None:
    tensors, _ = drawn_inputs(2, 9)
    tensors = [t.float() for t in tensors]
    counts = []
    for op in (bidirectional_mixer, compose_mixer):
        with FlopCounterMode(display=False) as counter:
            op(*built(tensors))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_wrong_weights_are_refused_by_name() -> None:
    tensors, _ = drawn_inputs(2, 5)
    x, in_weight, forward, backward, out_weight = built(tensors)
    with naive.as_users_run_it():
        with pytest.raises(ConfigError, match=r"in_weight has shape \(22, 7\), expected \(22, 6\)"):
            bidirectional_mixer(x, draw(22, 7), forward, backward, out_weight)
        with pytest.raises(ConfigError, match="even number of rows"):
            bidirectional_mixer(x, draw(21, 6), forward, backward, out_weight)
        with pytest.raises(ConfigError, match=r"backward.x_weight has shape \(8, 12\), expected \(8, 11\)"):
            bidirectional_mixer(x, in_weight, forward, backward._replace(x_weight=draw(8, 12)), out_weight)
        with pytest.raises(ConfigError, match=r"out_weight has shape \(6, 12\), expected \(6, 11\)"):
            bidirectional_mixer(x, in_weight, forward, backward, draw(6, 12))


@needs_kernels
def test_torch_accepts_the_op() -> None:
    tensors, _ = drawn_inputs(2, 5)
    x, in_weight, forward, backward, out_weight = built([t.float().requires_grad_() for t in tensors])
    arguments = (x, in_weight, list(forward), list(backward), out_weight, "native")
    with warnings.catch_warnings(), naive.as_users_run_it():
        warnings.simplefilter("ignore")
        torch.library.opcheck(torch.ops.famba.bidirectional_mixer, arguments)


def test_a_convolution_without_taps_is_refused() -> None:
    torch.manual_seed(0)
    for backend in ("auto", "reference"):
        with use_backend(backend), pytest.raises(ConfigError, match=r"forward.conv_weight has shape \(5, 0\)"):
            bidirectional_mixer(draw(1, 3, 4).float(), *weights(4, 5, 2, 1, width=0))
