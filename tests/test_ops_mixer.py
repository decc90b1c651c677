"""The mixer as one op, by each backend that has it, against its parts; what it keeps and casts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import Backend, all_backends, assert_close, draw, examples, threads
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from famba.errors import ConfigError
from famba.ops import Direction, availability, bidirectional_mixer, use_backend
from famba.ops.bidirectional_mixer import compose_mixer
from famba.ops.inputs import MixerInputs, TokenMeasures

# What Triton's kernels and those in CUDA C++ share is not tested twice.
of_each_kind = all_backends("native", "triton", "cuda", slow="triton")
# The interpreter cuts bfloat16 off instead of rounding it, which makes for several times the error.
BFLOAT16 = 3e-2 if availability.interpreted() else 1e-2


def mixer_inputs(
    batch: int,
    length: int,
    d_model: int = 6,
    channels: int = 11,
    states: int = 3,
    rank: int = 2,
    width: int = 4,
    out: bool = True,
) -> tuple[list[Tensor | None], Tensor]:
    """Draw x, in_weight, the two directions' weights in a row and out_weight; and a gradient of the result."""

    def direction() -> Direction:
        return Direction(
            conv_weight=draw(channels, width) / width,
            conv_bias=draw(channels),
            x_weight=draw(rank + 2 * states, channels) / max(1, channels) ** 0.5,
            dt_weight=draw(channels, rank) / max(1, rank),
            dt_bias=draw(channels) - 1,
            A=-draw(channels, states).exp(),
            D=draw(channels),
        )

    x, in_weight = draw(batch, length, d_model), draw(2 * channels, d_model) / max(1, d_model) ** 0.5
    out_weight = draw(d_model, channels) / max(1, channels) ** 0.5 if out else None
    tensors = [x, in_weight, *direction(), *direction(), out_weight]
    return tensors, draw(batch, length, d_model if out else channels)


def built(tensors: list[Tensor | None]) -> MixerInputs:
    x, in_weight, *rest, out_weight = tensors
    return MixerInputs(x, in_weight, Direction(*rest[:7]), Direction(*rest[7:]), out_weight)


def cast(tensors: list[Tensor | None], dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def run(mixer: Callable[..., Tensor], tensors: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    """The result and all gradients."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = mixer(*built(leaves))
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y))]


def exact(tensors: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    with use_backend("reference"):
        return run(compose_mixer, cast(tensors, torch.float64), dy.double())


def error(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y).norm() / y.norm()).item()


def check(backend: Backend, tensors: list[Tensor | None], dy: Tensor, **tile: int) -> None:
    tensors = backend.place(cast(tensors))
    with backend.running(tile):
        actual = run(bidirectional_mixer, tensors, dy.float())
    for number, (a, b) in enumerate(zip(actual, exact(tensors, dy.to(backend.device)), strict=True)):
        assert a.dtype == torch.float32
        # Sums of terms of size 1 that happen to cancel are as exact as their terms.
        assert_close(a, b, 1e-5, f"result {number}", floor=1.0)


@all_backends("native", "triton", "cuda")
def test_it_agrees_with_its_parts(backend: Backend) -> None:
    least = 0 if backend.name == "native" else 1

    @examples(backend, share=0.4)
    @given(
        seed=st.integers(0, 2**31),
        batch=st.integers(0, 3),
        length=st.sampled_from([0, 1, 2, 5, 9, *([] if backend.name == "triton" else [16, 17, 33])]),
        d_model=st.integers(least, 9),
        channels=st.integers(least, 20),
        states=st.sampled_from([least, 1, 3, 4]),
        rank=st.integers(least, 4),
        width=st.sampled_from([w for w in backend.widths if w < 6]),
        out=st.booleans(),
        chunk=st.sampled_from([4, 384]),
    )
    def agrees(seed: int, chunk: int, **sizes: Any) -> None:
        torch.manual_seed(seed)
        check(backend, *mixer_inputs(**sizes), **{"famba.ops.native.kernels._CHUNK": chunk})

    agrees()


@of_each_kind
@pytest.mark.parametrize("out", [False, True])
def test_vims_columns_and_others_that_need_no_padding(backend: Backend, out: bool) -> None:
    # The second has one state, as many as nothing is padded for; the last a single token.
    for sizes in ((1, 2, 6, 9, 16, 12), (2, 3, 6, 8, 4, 8), (1, 5, 3, 7, 1, 1, 3), (1, 1, 1, 1, 1, 1, 2)):
        check(backend, *mixer_inputs(*sizes, out=out))


@of_each_kind
def test_half_precision_is_as_near_as_the_parts_in_it(backend: Backend) -> None:
    sizes = (2, 13, 24, 48, 4, 3) if backend.name == "triton" else (3, 37, 24, 48, 16, 3)
    drawn, dy = mixer_inputs(*sizes)
    for dtype in backend.dtypes[1:]:
        tensors, half = backend.place(cast(drawn, dtype)), dy.to(backend.device, dtype)
        with backend.running():
            actual = run(bidirectional_mixer, tensors, half)
        with use_backend("reference"):
            parts = run(compose_mixer, tensors, half)
        limit = BFLOAT16 if (backend.name, dtype) == ("triton", torch.bfloat16) else 1e-2
        for number, (a, p, w) in enumerate(zip(actual, parts, exact(tensors, half), strict=True)):
            assert a.dtype == dtype
            assert error(a, w) <= max(limit, 1.2 * error(p, w)), f"result {number}"
    # Under autocast the products are cast, and the weights' gradients stay in float32.
    tensors = backend.place(cast(drawn))
    with backend.running(), torch.autocast(backend.device, torch.bfloat16):
        actual = run(bidirectional_mixer, tensors, dy)
    assert [a.dtype for a in actual] == [torch.bfloat16] + [torch.float32] * (len(actual) - 1)
    for number, (a, w) in enumerate(zip(actual, exact(tensors, dy.to(backend.device)), strict=True)):
        assert error(a, w) <= 2 * BFLOAT16, f"result {number} under autocast"


@of_each_kind
def test_each_weight_has_a_dtype_of_its_own(backend: Backend) -> None:
    drawn, _ = mixer_inputs(2, 8, 6, 11, 3, 3)
    x, in_weight, *rest = backend.place(cast(drawn))
    kinds = [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.float32]
    sides = [w.to(dtype) for w, dtype in zip(rest, kinds * 2, strict=False)]
    # Tokens as they lie behind a class token, and a gradient that is one number everywhere.
    tensors = [x.bfloat16()[:, 1:], in_weight, *sides, rest[-1]]
    dy = torch.ones(1, device=backend.device).expand(2, 7, 6)
    with backend.running():
        found = run(bidirectional_mixer, tensors, dy)
    assert [a.dtype for a in found] == [torch.bfloat16, *(t.dtype for t in tensors)]
    for number, (a, w) in enumerate(zip(found, exact(tensors, dy), strict=True)):
        assert error(a, w) <= 2 * BFLOAT16, f"result {number}"


@of_each_kind
@pytest.mark.parametrize("sizes", [(6, 11, 3, 3), (6, 8, 4, 8)], ids=["padded", "nothing to pad"])
def test_the_same_bits_again_and_nothing_from_memory_that_was_not_written(backend: Backend, sizes: Any) -> None:
    tensors, dy = mixer_inputs(2, 5, *sizes)
    tensors, dy = backend.place(cast(tensors)), dy.to(backend.device)
    with backend.running():
        wanted = run(bidirectional_mixer, tensors, dy)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(1).isnan(), "new memory holds NaN"
            for count in (1, 2, 2) if backend.name == "native" else (torch.get_num_threads(),):
                with threads(count):
                    assert all(map(torch.equal, run(bidirectional_mixer, tensors, dy), wanted))
        finally:
            torch.use_deterministic_algorithms(False)
        leaf = tensors[0].clone().requires_grad_()
        bidirectional_mixer(*built([leaf, *tensors[1:]])).backward(dy.float())
    # Only the gradients asked for.
    assert torch.equal(leaf.grad, wanted[1])
    assert all(t.grad is None for t in tensors[1:])


@of_each_kind
def test_torch_keeps_less_than_half_of_what_the_parts_keep_of_an_image(backend: Backend) -> None:
    drawn = [t.requires_grad_() for t in backend.place(cast(mixer_inputs(4, 9, 24, 48, 16, 3)[0])) if t is not None]

    def kept(batch: int, name: str) -> int:
        found: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)
        with use_backend(name), torch.autocast(backend.device, torch.bfloat16), hooks:
            y = bidirectional_mixer(*built([drawn[0][:batch].detach().clone().requires_grad_(), *drawn[1:]]))
        assert y.requires_grad
        return sum(found.values())

    with backend.running():
        own, parts = (kept(4, name) - kept(3, name) for name in (backend.name, "reference"))
    assert 0 < own < parts / 2


def measured(inputs: MixerInputs) -> TokenMeasures:
    """Measure tokens by loops."""
    u = inputs.x @ inputs.in_weight.chunk(2)[0].T
    steps, outputs = [], []
    for w, reverse in zip(inputs.directions, (False, True), strict=True):
        v = naive.conv(u, w.conv_weight, w.conv_bias, silu=True, reverse=reverse)
        states = w.A.shape[1]
        dt, B, C = (v @ w.x_weight.T).split([w.dt_weight.shape[1], states, states], dim=-1)
        delta = F.softplus(dt @ w.dt_weight.T + w.dt_bias)
        steps.append(delta.mean(-1))
        outputs.append(naive.scan(v, delta, w.A, B, C, w.D, reverse=reverse).clamp(min=0).sum(-1))
    return TokenMeasures(torch.stack(steps, dim=-1), torch.stack(outputs, dim=-1))


@all_backends()
def test_measures_are_those_of_the_loops_and_leave_all_else_as_it_is(backend: Backend) -> None:
    # Channels that fill a block of 32 and begin another; nothing at all; many images, whose channels share a task.
    shapes = [(1, 3, 6, 33, 3, 2), (0, 3, 4, 5, 2, 1), (2, 0, 4, 5, 2, 1), (17, 3, 4, 5, 2, 1), (1, 1, 3, 2, 1, 1, 2)]
    for number, sizes in enumerate(shapes[: 3 if backend.name == "triton" else 5]):
        dtype = backend.dtypes[number % len(backend.dtypes)]
        tolerance = 3 * BFLOAT16 if dtype.itemsize == 2 else 1e-5
        drawn, dy = mixer_inputs(*sizes)
        tensors, dy = backend.place(cast(drawn, dtype)), dy.to(backend.device)
        found: list[TokenMeasures] = []

        def mixer(*inputs: Any, found: list[TokenMeasures] = found) -> Tensor:
            y, measures = bidirectional_mixer(*inputs, measure=True)
            found.append(measures)
            return y

        with backend.running():
            wanted, results = run(bidirectional_mixer, tensors, dy), run(mixer, tensors, dy)
        # A GPU's compilers may round otherwise where they have more to do; a mixer of parts gates behind the scan.
        assert (
            backend.name in ("reference", "mamba_ssm") or backend.device == "cuda" or torch.equal(results[0], wanted[0])
        )
        for a, b in zip(results, wanted, strict=True):
            assert_close(a.double(), b.double(), tolerance, floor=1.0)
        exact_ones = measured(built(cast(tensors, torch.float64)))
        for name, a, b in zip(TokenMeasures._fields, found[0], exact_ones, strict=True):
            assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert not a.requires_grad
            assert_close(a, b, tolerance, name)


@of_each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_accepts_the_op(backend: Backend, dtype: torch.dtype) -> None:
    tensors, _ = mixer_inputs(1, 3)
    x, in_weight, forward, backward, out_weight = built([t.requires_grad_() for t in backend.place(cast(tensors))])
    x = x.detach().to(dtype).requires_grad_()
    with warnings.catch_warnings(), naive.as_users_run_it(), backend.running():
        warnings.simplefilter("ignore")
        arguments = (x, in_weight, *forward, *backward, out_weight, dtype != torch.float32, backend.name)
        torch.library.opcheck(torch.ops.famba.bidirectional_mixer, arguments)


@all_backends("triton", "cuda")
@pytest.mark.parametrize("field", ["conv_weight", "dt_weight", "A"])
def test_directions_of_unequal_shapes_are_refused(backend: Backend, field: str) -> None:
    inputs = built(backend.place(cast(mixer_inputs(1, 3, 4, 5, 2, 2)[0])))
    changed: dict[str, Any] = {"conv_weight": {"width": 3}, "dt_weight": {"rank": 1}, "A": {"states": 3, "rank": 1}}
    other = built(backend.place(cast(mixer_inputs(1, 3, **{"d_model": 4, "channels": 5, **changed[field]})[0])))
    with backend.running(), pytest.raises(ConfigError, match=f"backend '{backend.name}' needs the same"):
        bidirectional_mixer(*inputs._replace(backward=other.backward))


@all_backends("reference", "native")
def test_multiply_adds_are_those_of_the_parts(backend: Backend) -> None:
    inputs = built(cast(mixer_inputs(2, 9)[0]))
    counts = []
    for op in (bidirectional_mixer, compose_mixer):
        with backend.running(), FlopCounterMode(display=False) as counter:
            op(*inputs)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_wrong_weights_are_refused_by_name(backend: str) -> None:
    good = built(mixer_inputs(2, 5)[0])
    forward, backward = good.directions
    for changes, message in (
        ({"in_weight": draw(22, 7)}, r"in_weight has shape \(22, 7\), expected \(22, 6\)"),
        ({"in_weight": draw(21, 6)}, "in_weight has 21 rows, expected 22: 2 d, an even number"),
        ({"backward": backward._replace(x_weight=draw(8, 12))}, r"backward.x_weight has shape .* expected \(8, 11\)"),
        ({"out_weight": draw(6, 12)}, r"out_weight has shape \(6, 12\), expected \(6, 11\)"),
        ({"forward": forward._replace(conv_weight=draw(11, 0))}, r"forward.conv_weight has shape \(11, 0\)"),
    ):
        with naive.as_users_run_it(), use_backend(backend), pytest.raises(ConfigError, match=message):
            bidirectional_mixer(*good._replace(**changes))  # type: ignore[arg-type]
