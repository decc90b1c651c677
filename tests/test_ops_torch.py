"""The ops as torch sees them: dtypes, autocast, gradients by differences, fakes, operations counted, memory."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import naive
import pytest
import torch
from ops_helpers import Backend, all_backends, draw, scan_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from famba.ops import add_rms_norm, causal_conv1d, reference, selective_scan
from famba.ops.inputs import ScanInputs


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_STEP_ELEMENTS", 16)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 48)


def test_results_have_the_dtypes_that_are_promised() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        total = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = [None if x is None else x.to(dtype) for x in scan_inputs(1, 3, 2, 2)]
        assert selective_scan(*inputs, delta_softplus=True).dtype == dtype
        assert causal_conv1d(draw(1, 3, 2, dtype=dtype), torch.ones(2, 2)).dtype == dtype
        normed, residual = add_rms_norm(draw(1, 3, 2, dtype=dtype), None, torch.ones(2), 1e-5)
        assert (normed.dtype, residual.dtype) == (dtype, total)
        again = add_rms_norm(draw(1, 3, 2, dtype=dtype), residual, torch.ones(2), 1e-5)
        assert (again[0].dtype, again[1].dtype) == (dtype, total)


def test_autocast_changes_nothing() -> None:
    torch.manual_seed(0)
    inputs = [x.float() for x in scan_inputs(2, 11, 8, 8)]
    x, weight = torch.randn(2, 11, 8), torch.randn(8, 4)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (*inputs, x, weight)]
        *scan_in, conv_in, taps = leaves
        outs = [
            selective_scan(*scan_in, delta_softplus=True),
            causal_conv1d(conv_in, taps, activation="silu"),
            *add_rms_norm(conv_in, scan_in[0], taps[:, 0], 1e-5),
        ]
        return [*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_by_differences(reverse: bool) -> None:
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in scan_inputs(2, 5, 2, 2)]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, delta_softplus=True, reverse=reverse), inputs)
    leaves = [draw(2, 5, 3).requires_grad_(), draw(3, 4).requires_grad_(), draw(3).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *x: causal_conv1d(*x, activation="silu", reverse=reverse), leaves)
    stream = draw(2, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s, w: add_rms_norm(x, s, w, 1e-3), (leaves[0], stream, leaves[2]))


def test_only_the_gradients_asked_for() -> None:
    x, weight = draw(1, 3, 2).requires_grad_(), draw(2)
    _, total = add_rms_norm(x, None, weight, 1e-5)
    total.sum().backward()
    assert x.grad.eq(1).all()
    assert weight.grad is None


@pytest.mark.usefixtures("small_tiles")
def test_equal_input_gives_equal_bits() -> None:
    torch.manual_seed(0)
    inputs = [x.float() for x in scan_inputs(3, 21, 5, 4)]

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = selective_scan(*leaves, delta_softplus=True)
        conv = causal_conv1d(y, leaves[2], leaves[5], activation="silu")
        out, total = add_rms_norm(conv, y, leaves[5], 1e-5)
        return [y, conv, out, total, *torch.autograd.grad(out.sum() + total.prod(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def operator_calls(backend: Backend, state: Tensor) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    ops = torch.ops.famba

    def leaf(*shape: int, layout: str = "contiguous") -> Tensor:
        return draw(*shape, layout=layout, dtype=torch.float32).to(backend.device).requires_grad_()

    def scan(optional: bool = True, layout: str = "contiguous") -> list[Tensor | None]:
        drawn = backend.place(scan_inputs(2, 5, 3, 2, (optional,) * 3, layout, torch.float32))
        return [None if x is None else x.requires_grad_() for x in drawn]

    full, x, half = scan(), leaf(2, 5, 3), leaf(2, 5, 3).detach().bfloat16().requires_grad_()
    detached = [t.detach() for t in full if t is not None]
    return {
        "scan": (ops.selective_scan, (*full, True, False)),
        "scan, reverse": (ops.selective_scan, (*full, False, True)),
        "scan, without options": (ops.selective_scan, (*scan(optional=False), True, False)),
        "scan, not contiguous": (ops.selective_scan, (*scan(layout="transposed"), True, False)),
        "scan backward": (ops.selective_scan_backward, (detached[0], *detached, True, False, state)),
        "conv": (ops.causal_conv1d, (x, leaf(3, 4), leaf(3), True, False)),
        "conv, without bias": (ops.causal_conv1d, (x, leaf(3, 4), None, False, True)),
        "conv, not contiguous": (
            ops.causal_conv1d,
            (leaf(2, 5, 3, layout="transposed"), leaf(3, 4, layout="transposed"), leaf(3), True, False),
        ),
        "conv backward": (
            ops.causal_conv1d_backward,
            (detached[0], detached[0], leaf(3, 4).detach(), detached[5], True, False),
        ),
        "norm": (ops.add_rms_norm, (x, leaf(2, 5, 3), leaf(3), 1e-5)),
        "norm, at the beginning": (ops.add_rms_norm, (half, None, leaf(3), 1e-5)),
        "norm, not contiguous": (ops.add_rms_norm, (leaf(2, 5, 3, layout="transposed"), x, leaf(3), 1e-5)),
        "norm backward": (ops.add_rms_norm_backward, (*detached[:2], detached[0], detached[5], 1e-5)),
    }


@all_backends("reference", "native", "mamba_ssm")
def test_ops_keep_the_rules_of_custom_operators(backend: Backend) -> None:
    state = torch.empty((2, 0, 3, 2) if backend.name == "native" else 0)
    # Compiled alike for all backends.
    some = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    checks: Any = {} if backend.name == "reference" else some
    for name, (op, arguments) in operator_calls(backend, state).items():
        if backend.name == "mamba_ssm" and "norm" in name:  # Triton's
            continue
        with warnings.catch_warnings(), naive.as_users_run_it(), backend.running():
            warnings.simplefilter("ignore")
            torch.library.opcheck(op.default, (*arguments, backend.name), **checks)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_operations_are_counted(skip: bool, gate: bool) -> None:
    batch, length, channels, states = 2, 5, 3, 4
    inputs = scan_inputs(batch, length, channels, states, (skip, gate, True))
    with FlopCounterMode(display=False) as counter:
        selective_scan(*inputs, delta_softplus=True)
    assert counter.get_total_flops() == 2 * batch * length * channels * (4 * states + 1 + skip + gate)
    with FlopCounterMode(display=False) as counter:
        causal_conv1d(draw(batch, length, channels), draw(channels, 4))
    assert counter.get_total_flops() == 2 * batch * length * channels * 4


class PeakBytes(TorchDispatchMode):
    """Most bytes that tensors made under it held at once, a storage counted once."""

    def __init__(self, given_tensors: list[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._outside = {x.untyped_storage().data_ptr() for x in given_tensors}
        self._alive: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._alive[id(x)] = weakref.ref(x)
        self._alive = {k: ref for k, ref in self._alive.items() if ref() is not None}
        storages = {}
        for ref in self._alive.values():
            x = ref()
            if x is not None:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(n for place, n in storages.items() if place not in self._outside))
        return out


def test_states_of_the_whole_sequence_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length, channels, states = 16, 32, 16, 32
    monkeypatch.setattr(reference, "_STEP_ELEMENTS", 2 * channels * states)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 8 * channels * states)
    inputs = [x.float() for x in scan_inputs(batch, length, channels, states)]
    all_states = 4 * batch * length * channels * states
    with torch.no_grad(), PeakBytes(inputs) as forward:
        y, state = reference.selective_scan(ScanInputs(*inputs, True, False))
    assert y.nbytes <= forward.peak < all_states / 10
    with torch.no_grad(), PeakBytes([*inputs, y]) as backward:
        grads = reference.selective_scan_backward(y, ScanInputs(*inputs, True, False), state)
    results = sum(g.nbytes for g in grads)
    assert results <= backward.peak < results + all_states / 5


def test_the_forward_scan_keeps_only_its_inputs() -> None:
    inputs = [x.float().requires_grad_() for x in scan_inputs(2, 32, 4, 16)]
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        selective_scan(*inputs, delta_softplus=True)
    assert sum(x.nbytes for x in kept) <= sum(x.nbytes for x in inputs)
