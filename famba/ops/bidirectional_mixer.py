"""Define Vim's mixer from its input to its output projection, as one op where a backend has it so.

One autograd node keeps less than a third of what its parts would keep: of the inner tensors the small projections, and
what else a backend finds too dear to work out again; the rest is worked out again in the backward from the tokens. The
weights go in as they are: a backend casts them for its products, all at once, and keeps what it has cast.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, overload, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from famba.errors import ConfigError
from famba.ops.causal_conv1d import causal_conv1d
from famba.ops.definition import check_shapes, define, differentiate, fresh
from famba.ops.inputs import Direction, MixerInputs, TokenMeasures
from famba.ops.reference import compute_dtype
from famba.ops.registry import backend_of, kernels
from famba.ops.selective_scan import scan_macs, selective_scan


@runtime_checkable
class MixerKernels(Protocol):
    """List what a backend's module provides besides `Kernels` if it has the mixer as one op.

    Products are in x's dtype, weights and their gradients each in a dtype of its own. `mixer` returns the result, the
    measures (2, 2, b, l) in float32, of steps and of outputs in both directions, or None where they are not asked for,
    and up to five tensors for the backward, of the shapes `mixer_kept_shapes`: first those of x's dtype, then those of
    float32. `mixer_backward` returns the gradients in the places of the inputs, each in its input's dtype.
    """

    mixer_kept_shapes: Callable[[MixerInputs], tuple[list[tuple[int, ...]], list[tuple[int, ...]]]]
    mixer: Callable[[MixerInputs, bool], tuple[Tensor | None, ...]]
    mixer_backward: Callable[[Tensor, MixerInputs, Sequence[Tensor]], MixerInputs]


@overload
def bidirectional_mixer(
    x: Tensor, in_weight: Tensor, forward: Direction, backward: Direction, out_weight: Tensor | None = None
) -> Tensor: ...


@overload
def bidirectional_mixer(
    x: Tensor,
    in_weight: Tensor,
    forward: Direction,
    backward: Direction,
    out_weight: Tensor | None = None,
    *,
    measure: Literal[True],
) -> tuple[Tensor, TokenMeasures]: ...


def bidirectional_mixer(
    x: Float[Tensor, "b l d_model"],
    in_weight: Float[Tensor, "two_d d_model"],
    forward: Direction,
    backward: Direction,
    out_weight: Float[Tensor, "d_out d"] | None = None,
    measure: bool = False,
) -> Float[Tensor, "b l d_out"] | tuple[Float[Tensor, "b l d_out"], TokenMeasures]:
    """Mix tokens by a scan in each direction (Zhu et al. 2024, arXiv 2401.09417, Algorithm 1).

    u, z = x in_weight^T. For each direction: u' = silu(conv(u)); dt, B, C = u' x_weight^T; y = the selective scan of u'
    with step sizes softplus(dt dt_weight^T + dt_bias), gated by silu(z). The mean of both y, times out_weight^T.
    Matrix products follow autocast; everything else is worked out in float32.

    Args:
        x: tokens (b, l, d_model).
        in_weight: (2 d, d_model), the rows of u before those of z.
        forward: weights of the scan from the first token to the last.
        backward: weights of the scan from the last token to the first.
        out_weight: (d_out, d); None for no output projection.
        measure: also return what the scans did with each token; no gradient flows through that.

    Returns:
        (b, l, d_out), or (b, l, d) without `out_weight`, in the dtype of the matrix products; with `measure` that and
        the `TokenMeasures`.

    Raises:
        ConfigError: a shape, dtype or device does not fit.
        BackendError: the chosen backend does not serve x's device.
    """
    _check(x, in_weight, forward, backward, out_weight)
    dtype = _product_dtype(x)
    backend = backend_of(x, dtype)
    if not _is_fused(backend):
        return compose_mixer(x, in_weight, forward, backward, out_weight, measure)
    out, measures, *_ = _mixer(x.to(dtype), in_weight, *forward, *backward, out_weight, measure, backend)
    return (out, TokenMeasures.of(measures)) if measure else out


def compose_mixer(
    x: Tensor,
    in_weight: Tensor,
    forward: Direction,
    backward: Direction,
    out_weight: Tensor | None = None,
    measure: bool = False,
) -> Any:
    """Run the parts of `bidirectional_mixer` one after the other, which is its meaning, each with its own backward."""
    u, z = F.linear(x, in_weight).chunk(2, dim=-1)
    measures: list[Tensor] | None = [] if measure else None
    results = []
    for weights, reverse in ((forward, False), (backward, True)):
        v = causal_conv1d(u, weights.conv_weight, weights.conv_bias, activation="silu", reverse=reverse)
        states = weights.A.shape[1]
        dt, B, C = F.linear(v, weights.x_weight).split([weights.dt_weight.shape[1], states, states], dim=-1)
        # The bias enters inside the scan, in float32, so that small steps survive bf16.
        delta = F.linear(dt, weights.dt_weight)
        results.append(gated_scan(v, delta, weights.A, B, C, weights.D, z, weights.dt_bias, reverse, measures))
    y = (results[0] + results[1]) / 2
    out = y if out_weight is None else F.linear(y, out_weight)
    return out if measures is None else (out, TokenMeasures.of(torch.stack(measures, dim=1)))


def gated_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor | None,
    reverse: bool,
    measures: list[Tensor] | None,
) -> Tensor:
    """Scan with a gate, and append the measures (2, b, l) where there is a list for them."""
    how: dict[str, Any] = {"delta_bias": delta_bias, "delta_softplus": True, "reverse": reverse}
    if measures is None:
        return selective_scan(u, delta, A, B, C, D, z, **how)
    # The gate behind the scan instead of in it, in the scan's precision: the same numbers.
    wide = compute_dtype(u)
    y = selective_scan(u.to(wide), delta, A, B, C, D, **how)
    raw = delta.detach().to(wide)
    steps = F.softplus(raw if delta_bias is None else raw + delta_bias.detach().to(wide))
    measures.append(torch.stack([steps.mean(-1), y.detach().relu().sum(-1)]))
    return (y * F.silu(z.to(wide))).to(u.dtype)


@torch.compiler.assume_constant_result
def _is_fused(backend: str) -> bool:
    """Return whether a backend has the mixer as one op; not traced by torch.compile, since it imports the backend."""
    return hasattr(kernels(backend), "mixer")


@torch.compiler.assume_constant_result
def _has_autocast(kind: str) -> bool:
    """Return whether a kind of device knows autocast; torch 2.11, for one, cannot trace the question."""
    return torch.amp.is_autocast_available(kind)


def _product_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    if _has_autocast(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _check(x: Tensor, in_weight: Tensor, forward: Direction, backward: Direction, out_weight: Tensor | None) -> None:
    op = "bidirectional_mixer"
    given = {"x": (x, "b l d_model"), "in_weight": (in_weight, "rows d_model")}
    for side, weights in (("forward", forward), ("backward", backward)):
        axes = (f"d width_{side}", "d", f"columns_{side} d", f"d r_{side}", "d", f"d n_{side}", "d")
        for field, weight, named in zip(Direction._fields, weights, axes, strict=True):
            given[f"{side}.{field}"] = (weight, named)
    sizes = check_shapes(op, **given, out_weight=(out_weight, "d_out d"))
    if sizes["rows"] != 2 * sizes["d"]:
        raise ConfigError(f"{op}: in_weight has {sizes['rows']} rows, expected {2 * sizes['d']}: 2 d, an even number")
    for side in ("forward", "backward"):
        columns, wanted = sizes[f"columns_{side}"], sizes[f"r_{side}"] + 2 * sizes[f"n_{side}"]
        if columns != wanted:
            raise ConfigError(f"{op}: {side}.x_weight has {columns} rows, expected {wanted}: r + 2 n")
        if sizes[f"width_{side}"] == 0:
            raise ConfigError(f"{op}: {side}.conv_weight has shape ({sizes['d']}, 0), expected a width of at least 1")


_KEPT = 5
_SIDES = [f"Tensor {side}_{field}" for side in ("forward", "backward") for field in Direction._fields]
_TENSORS = ["Tensor x", "Tensor in_weight", *_SIDES, "Tensor? out_weight"]
_INPUTS = f"{', '.join(_TENSORS)}, bool measure"
_OTHERS = ", ".join(["Tensor measures", *(f"Tensor kept{i}" for i in range(_KEPT))])


def _shape(kernels: MixerKernels, *given: Any) -> tuple[Tensor | None, ...]:
    *tensors, measure = given
    inputs = MixerInputs.of(tensors)
    x, out_weight = inputs.x, inputs.out_weight
    shapes, float_shapes = kernels.mixer_kept_shapes(inputs)
    out = x.new_empty(*x.shape[:2], len(inputs.forward.A if out_weight is None else out_weight))
    measures = x.new_empty(2, 2, *x.shape[:2], dtype=torch.float32) if measure else None
    kept = [x.new_empty(shape) for shape in shapes]
    return _filled_up(out, measures, *kept, *(x.new_empty(shape, dtype=torch.float32) for shape in float_shapes))


def _filled_up(*results: Tensor | None) -> tuple[Tensor | None, ...]:
    """Add what a backend does not keep: an op returns the same number of tensors whatever the backend."""
    return *results, *[None] * (2 + _KEPT - len(results))


_mixer = define(
    "bidirectional_mixer",
    _INPUTS,
    f"({', '.join(['Tensor'] * (2 + _KEPT))})",
    run=lambda kernels, *given: _filled_up(*kernels.mixer(MixerInputs.of(given[:-1]), given[-1])),
    fake=_shape,
)
_mixer_backward = define(
    "bidirectional_mixer_backward",
    f"Tensor dout, {_INPUTS}, {_OTHERS}",
    f"({', '.join(['Tensor'] * len(_TENSORS))})",
    run=lambda kernels, dout, *rest: kernels.mixer_backward(
        dout, MixerInputs.of(rest[: len(_TENSORS)]), rest[-_KEPT:]
    ).flat(),
    fake=lambda kernels, dout, *rest: [fresh(x) for x in rest[: len(_TENSORS)]],
)
differentiate(_mixer, _mixer_backward, len(_TENSORS))


@register_flop_formula(torch.ops.famba.bidirectional_mixer)
def _mixer_flops(*given, **kwargs) -> int:  # type: ignore[no-untyped-def]
    shapes: Any = MixerInputs.of(given[: len(_TENSORS)])
    (batch, length, d_model), (rows, _), out = shapes.x, shapes.in_weight, shapes.out_weight
    d_inner = rows // 2
    macs = rows * d_model + (0 if out is None else out[0] * d_inner)
    for side in shapes.directions:
        macs += d_inner * (side.conv_weight[1] + side.x_weight[0] + side.dt_weight[1])
        macs += scan_macs(1, 1, d_inner, side.A[1], skip=True, gate=True)
    return 2 * batch * length * macs
