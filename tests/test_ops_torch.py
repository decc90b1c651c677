"""The ops as torch sees them: dtypes, autocast, kinds of derivatives, fakes, operations counted, memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import naive
import pytest
import torch
from ops_helpers import Backend, all_backends, draw, every_op, results, scan_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from famba.errors import ConfigError
from famba.models import Vim
from famba.ops import add_rms_norm, causal_conv1d, reference, selective_scan, use_backend
from famba.ops.inputs import ScanInputs


def test_results_have_the_dtypes_that_are_promised() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        total = torch.float64 if dtype == torch.float64 else torch.float32
        outs = every_op(*scan_inputs(1, 3, 2, 2, dtype=dtype))
        assert [x.dtype for x in outs] == [dtype] * 4 + [total]
        again = add_rms_norm(draw(1, 3, 2, dtype=dtype), outs[-1], torch.ones(2), 1e-5)
        assert [x.dtype for x in again] == [dtype, total]


def test_autocast_changes_nothing() -> None:
    inputs = [x.float() for x in scan_inputs(2, 11, 8, 8)]
    plain = results(every_op, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, plain, results(every_op, inputs)))


# Entering forward-mode makes torch script functions of its own.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward_mode_and_second_derivatives_are_refused(backend: str) -> None:
    torch.manual_seed(0)
    model = Vim(img_size=8, patch_size=2, embed_dim=16, depth=2, num_classes=3, d_state=4, fusion=(3, 2))
    x, names = torch.randn(2, 3, 8, 8), list(dict(model.named_parameters()))

    def loss(x: Tensor) -> Tensor:
        return model(x).square().sum()

    def by_weight(name: str) -> Any:
        weight = model.get_parameter(name).detach()
        return torch.func.jvp(lambda w: torch.func.functional_call(model, {name: w}, x), (weight,), (weight,))

    def twice() -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    with naive.as_users_run_it(), use_backend(backend):
        ways: list[Callable[[], Any]] = [lambda: torch.func.jvp(loss, (x,), (x,)), lambda: torch.func.jacfwd(model)(x)]
        for ask in [*ways, *(partial(by_weight, name) for name in names if name.startswith("layers.1"))]:
            with pytest.raises(
                ConfigError, match=r"carries a tangent.*forward-mode .* is not supported.*autograd.grad"
            ):
                ask()
        for ask in (twice, lambda: torch.func.hessian(loss)(x)):
            with pytest.raises((RuntimeError, ConfigError)):
                ask()
        # The remedy that the message names.
        rows = torch.autograd.functional.jacobian(model, x)
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(rows[1, 2], torch.autograd.grad(model(leaf)[1, 2], leaf)[0])


def operator_calls(backend: Backend, state: Tensor) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    ops = torch.ops.famba

    def leaf(*shape: int) -> Tensor:
        return draw(*shape, dtype=torch.float32).to(backend.device).requires_grad_()

    def scan(optional: bool = True, layout: str = "contiguous") -> list[Tensor | None]:
        drawn = backend.place(scan_inputs(2, 5, 3, 2, (optional,) * 3, layout, torch.float32))
        return [None if x is None else x.requires_grad_() for x in drawn]

    full, x, half = scan(), leaf(2, 5, 3), leaf(2, 5, 3).detach().bfloat16().requires_grad_()
    detached, taps = [t.detach() for t in full if t is not None], leaf(3, 4).detach()
    return {
        "scan": (ops.selective_scan, (*full, True, False)),
        "scan, without options": (ops.selective_scan, (*scan(optional=False), False, True)),
        "scan, not contiguous": (ops.selective_scan, (*scan(layout="transposed"), True, False)),
        "scan backward": (ops.selective_scan_backward, (detached[0], *detached, True, False, state)),
        "conv": (ops.causal_conv1d, (x, leaf(3, 4), leaf(3), True, False)),
        "conv, without bias": (ops.causal_conv1d, (x, leaf(3, 4), None, False, True)),
        "conv backward": (ops.causal_conv1d_backward, (*detached[:1] * 2, taps, detached[5], True, False)),
        "norm": (ops.add_rms_norm, (x, leaf(2, 5, 3), leaf(3), 1e-5)),
        "norm, at the beginning": (ops.add_rms_norm, (half, None, leaf(3), 1e-5)),
        "fuse": (ops.fuse_tokens, (leaf(2, 4, 3), torch.tensor([[0, 1, 1, 2]] * 2), torch.rand(2, 4), 3)),
        "norm backward": (ops.add_rms_norm_backward, (*detached[:2], detached[0], detached[5], 1e-5)),
    }


@all_backends("reference", "native", "mamba_ssm")
def test_ops_keep_the_rules_of_custom_operators(backend: Backend) -> None:
    state = torch.empty((2, 0, 3, 2) if backend.name == "native" else 0)
    # Compiled alike for all backends.
    some = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    checks: Any = {} if backend.name == "reference" else some
    for name, (op, arguments) in operator_calls(backend, state).items():
        if backend.name == "mamba_ssm" and name.startswith(("norm", "fuse")):  # Triton's
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


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor made under it."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.most = max(
            self.most, *(x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, Tensor)), 0
        )
        return out


def test_states_of_the_whole_sequence_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length, channels, states = 16, 32, 16, 32
    monkeypatch.setattr(reference, "_STEP_ELEMENTS", 2 * channels * states)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 8 * channels * states)
    inputs = ScanInputs(*(x.float() for x in scan_inputs(batch, length, channels, states)), True, False)
    with torch.no_grad(), Largest() as found:
        y, state = reference.selective_scan(inputs)
        reference.selective_scan_backward(y, inputs, state)
    assert y.nbytes <= found.most < 4 * batch * length * channels * states / 10


def test_the_forward_scan_keeps_only_its_inputs() -> None:
    inputs = [x.float().requires_grad_() for x in scan_inputs(2, 32, 4, 16)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes), lambda _: None):
        selective_scan(*inputs, delta_softplus=True)
    assert sum(kept) <= sum(x.nbytes for x in inputs)
