"""The ops on CPUs by compiled kernels; `famba.ops.reference` says what each means."""

from __future__ import annotations

import torch
from torch import Tensor

from famba.errors import ConfigError
from famba.ops.native.library import Array, Conv, Fuse, Norm, Scan, call, dtype_code, threads

# The scan keeps the states that enter each chunk of at most this many steps; shorter sequences keep none.
# A chunk's states then fit a processor's second-level cache in the backward.
_CHUNK = 384


def scan_chunk(length: int) -> int:
    """Steps between two kept states: chunks as equal as can be."""
    chunks = max(1, -(-length // _CHUNK))
    return max(1, -(-length // chunks))


def scan_state_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Shape of the states that the forward scan keeps for its backward."""
    chunks = max(1, -(-length // scan_chunk(length)))
    return (batch, chunks - 1, channels, states)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return y and the states that enter the later chunks."""
    batch, length, channels = u.shape
    dtype = u.dtype
    u = u.to(_common_dtype(u, delta, B, C, z))
    y = torch.empty(u.shape, dtype=u.dtype)
    state = torch.empty(scan_state_shape(batch, length, channels, A.shape[1]))
    scan = ScanArguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, state)
    scan.forward(y)
    return y.to(dtype), state


def selective_scan_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the inputs, each in its input's dtype."""
    dtype = u.dtype
    u = u.to(_common_dtype(u, delta, B, C, z))
    scan = ScanArguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, state.contiguous())
    du, ddelta, dB, dC = (torch.empty(x.shape, dtype=u.dtype) for x in (u, delta, B, C))
    dz = None if z is None else torch.empty(z.shape, dtype=u.dtype)
    dA, dD, dbias = scan.backward(dy, du, ddelta, dB, dC, dz)
    return (
        du.to(dtype),
        ddelta.to(delta.dtype),
        dA.to(A.dtype),
        dB.to(B.dtype),
        dC.to(C.dtype),
        None if D is None else dD.to(D.dtype),
        None if z is None or dz is None else dz.to(z.dtype),
        None if delta_bias is None else dbias.to(delta_bias.dtype),
    )


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Return y."""
    y = torch.empty(x.shape, dtype=x.dtype)
    ConvArguments(x, weight, bias, silu, reverse).forward(y)
    return y


def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias, each in its input's dtype."""
    dx = torch.empty(x.shape, dtype=x.dtype)
    dweight, dbias = ConvArguments(x, weight, bias, silu, reverse).backward(dy, dx)
    return dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normed sum and the sum."""
    x, residual, weight = x.contiguous(), _parameter(residual), parameter(weight)
    normed, total = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape)
    norm = Norm(rows=x.shape[0] * x.shape[1], channels=x.shape[2], dtype=dtype_code(x.dtype), eps=eps)
    norm.threads, norm.x, norm.residual = threads(), x.data_ptr(), address(residual)
    norm.weight, norm.normed, norm.total = weight.data_ptr(), normed.data_ptr(), total.data_ptr()
    call("norm_forward", norm)
    return normed, total


def add_rms_norm_backward(
    dnormed: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum and of weight."""
    dnormed, dtotal, weights, total = dnormed.contiguous(), parameter(dtotal), parameter(weight), parameter(total)
    grad, dweight = torch.empty(total.shape), torch.empty(weight.shape)
    norm = Norm(rows=total.shape[0] * total.shape[1], channels=total.shape[2], dtype=dtype_code(dnormed.dtype), eps=eps)
    norm.threads, norm.dnormed, norm.dtotal = threads(), dnormed.data_ptr(), dtotal.data_ptr()
    norm.total, norm.weight = total.data_ptr(), weights.data_ptr()
    norm.grad, norm.dweight = grad.data_ptr(), dweight.data_ptr()
    call("norm_backward", norm)
    return grad, dweight.to(weight.dtype)


def fuse_tokens(x: Tensor, places: Tensor, weights: Tensor, length: int) -> Tensor:
    """Return the fused tokens (b, length, c)."""
    x = activation(x, x.dtype)
    y = torch.empty(x.shape[0], length, x.shape[2], dtype=x.dtype)
    _fuse("fuse_forward", x, y, places, weights)
    return y


def fuse_tokens_backward(dy: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the tokens."""
    dy = activation(dy, dy.dtype)
    dx = torch.empty(*places.shape, dy.shape[2], dtype=dy.dtype)
    _fuse("fuse_backward", dx, dy, places, weights)
    return dx


def _fuse(kernel: str, tokens: Tensor, fused: Tensor, places: Tensor, weights: Tensor) -> None:
    places, weights = places.contiguous(), parameter(weights)
    length = fused.shape[1]
    # A place outside would be written to outside.
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < length:
        raise ConfigError(f"fuse_tokens: places from {places.min()} to {places.max()}, expected 0 to {length - 1}")
    fuse = Fuse(tokens.shape[0], tokens.shape[1], length, tokens.shape[2], dtype_code(tokens.dtype))
    fuse.threads, fuse.x, fuse.y = threads(), Array.of(tokens), Array.of(fused)
    fuse.places, fuse.weights = places.data_ptr(), weights.data_ptr()
    call(kernel, fuse)


def parameter(x: Tensor) -> Tensor:
    """As the kernels read what is no activation: float32 and contiguous."""
    return x.to(torch.float32).contiguous()


def _parameter(x: Tensor | None) -> Tensor | None:
    return None if x is None else parameter(x)


def _common_dtype(*activations: Tensor | None) -> torch.dtype:
    """The dtype of all, or float32 where they differ: nothing is rounded to the coarsest."""
    dtypes = {x.dtype for x in activations if x is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def activation(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As the kernels read activations: of one dtype, channels adjacent."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _activation(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else activation(x, dtype)


def address(x: Tensor | None) -> int | None:
    """Where a tensor's numbers lie."""
    return None if x is None else x.data_ptr()


class ScanArguments:
    """A scan whose inputs are as the kernels read them; it keeps them alive for its calls."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        reverse: bool,
        state: Tensor,
        scale: float = 1.0,
        accumulate: bool = False,
    ) -> None:
        self._dtype = u.dtype
        arrays = {"u": u, "delta": delta, "B": B, "C": C, "z": z}
        self._arrays = {name: _activation(x, u.dtype) for name, x in arrays.items()}
        self._parameters = {
            "A": parameter(A),
            "D": _parameter(D),
            "delta_bias": _parameter(delta_bias),
            "state": state,
        }
        self._scan = Scan(
            *u.shape,
            A.shape[1],
            scan_chunk(u.shape[1]),
            dtype_code(u.dtype),
            softplus=delta_softplus,
            reverse=reverse,
            accumulate=accumulate,
            scale=scale,
            **{name: Array.of(x) for name, x in self._arrays.items()},
            **{name: address(x) for name, x in self._parameters.items()},
        )

    def forward(self, y: Tensor) -> None:
        """Write the result, and the states that enter later chunks."""
        self._scan.threads = threads()
        self._scan.y = Array.of(y)
        call("scan_forward", self._scan)

    def backward(
        self,
        dy: Tensor,
        du: Tensor,
        ddelta: Tensor,
        dB: Tensor,
        dC: Tensor,
        dz: Tensor | None,
        y: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write the activations' gradients (and y again, where asked for); return those of A, D and delta_bias."""
        scan = self._scan
        dy = activation(dy, self._dtype)
        written = {"dy": dy, "du": du, "ddelta": ddelta, "dB": dB, "dC": dC, "dz": dz, "y": y}
        for name, x in written.items():
            setattr(scan, name, Array.of(x))
        A = self._parameters["A"]
        assert A is not None
        dA, dD, dbias = torch.empty(A.shape), torch.empty(A.shape[0]), torch.empty(A.shape[0])
        scan.dA, scan.dD, scan.ddelta_bias = dA.data_ptr(), dD.data_ptr(), dbias.data_ptr()
        scan.threads = threads()
        call("scan_backward", scan)
        return dA, dD, dbias


class ConvArguments:
    """A convolution whose inputs are as the kernels read them; it keeps them alive for its calls."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        reverse: bool,
        accumulate: bool = False,
    ) -> None:
        self._x, self._weight, self._bias = activation(x, x.dtype), parameter(weight), _parameter(bias)
        self._conv = Conv(
            *x.shape,
            weight.shape[1],
            dtype_code(x.dtype),
            silu=silu,
            reverse=reverse,
            accumulate=accumulate,
            x=Array.of(self._x),
            weight=self._weight.data_ptr(),
            bias=address(self._bias),
        )

    def forward(self, y: Tensor) -> None:
        """Write the result."""
        self._conv.threads = threads()
        self._conv.y = Array.of(y)
        call("conv_forward", self._conv)

    def backward(self, dy: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        """Write the input's gradient; return those of weight and bias."""
        dy = activation(dy, self._x.dtype)
        dweight, dbias = torch.empty(self._weight.shape), torch.empty(self._weight.shape[0])
        self._conv.threads = threads()
        self._conv.dy, self._conv.dx = Array.of(dy), Array.of(dx)
        self._conv.dweight, self._conv.dbias = dweight.data_ptr(), dbias.data_ptr()
        call("conv_backward", self._conv)
        return dweight, dbias
