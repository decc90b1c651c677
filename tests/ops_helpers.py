"""Help the tests of the ops: inputs, backends, and comparisons with a reference."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import cuda_emulator
import naive
import pytest
import torch
from extension_stand_ins import forget_caches, use_stand_ins
from hypothesis import settings
from torch import Tensor

from famba.ops import add_rms_norm, availability, causal_conv1d, registry, selective_scan, use_backend
from famba.ops.availability import triton_obstacle
from famba.ops.cuda.launch import Launch
from famba.ops.native import library

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
Op = Callable[..., Any]
LAYOUTS = ("contiguous", "transposed", "strided", "expanded")


def draw(*shape: int, layout: str = "contiguous", dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers in memory of some layout."""
    if layout == "transposed" and len(shape) > 1:
        return torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=torch.float64).to(dtype).transpose(-1, -2)
    if layout == "strided":
        return torch.randn(*shape[:-1], 2 * shape[-1] + 1, dtype=torch.float64).to(dtype)[..., 1::2]
    if layout == "expanded" and len(shape) > 1:
        return torch.randn(1, *shape[1:], dtype=torch.float64).to(dtype).expand(shape)
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "output", floor: float = 1e-3) -> None:
    """Within the tolerance, relative to the largest expected value, or to the floor where that is larger."""
    limit = tolerance * max(expected.abs().max().item() if expected.numel() else 0.0, floor)
    exact = {"rtol": 0, "atol": limit, "check_dtype": False}
    torch.testing.assert_close(actual, expected, **exact, msg=lambda text: f"{name}: {text}")


def compare(op: Op, oracle: Op, inputs: list[Tensor | None], tolerance: float, floor: float = 1e-3) -> None:
    """Outputs and gradients of all inputs under a random weighting of the outputs."""
    given_inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    exact_inputs = [None if x is None else x.detach().double().clone().requires_grad_() for x in inputs]
    outs, exact = ([x] if isinstance(x, Tensor) else x for x in (op(*given_inputs), oracle(*exact_inputs)))
    weights = [torch.randn(x.shape, dtype=torch.float64).to(x) for x in outs]
    for out, wanted in zip(outs, exact, strict=True):
        assert_close(out.detach(), wanted.detach(), tolerance, floor=floor)
    present, present_exact = ([x for x in given if x is not None] for given in (given_inputs, exact_inputs))
    grads = torch.autograd.grad(outs, present, weights)
    wide = [w.double() for w in weights]
    wanted_grads = torch.autograd.grad(exact, present_exact, wide, allow_unused=True, materialize_grads=True)
    for number, (x, grad, wanted) in enumerate(zip(present, grads, wanted_grads, strict=True)):
        assert grad.dtype == x.dtype
        assert_close(grad, wanted, tolerance, f"gradient {number}", floor)


def scan_inputs(
    batch: int,
    length: int,
    channels: int,
    states: int,
    optional: tuple[bool, bool, bool] = (True, True, True),
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float64,
) -> list[Tensor | None]:
    def make(*shape: int) -> Tensor:
        return draw(*shape, layout=layout, dtype=dtype)

    skip, gate, bias = optional
    return [
        make(batch, length, channels),
        make(batch, length, channels),
        -draw(channels, states, layout=layout).exp().to(dtype),
        make(batch, length, states),
        make(batch, length, states),
        make(channels) if skip else None,
        make(batch, length, channels) if gate else None,
        make(channels) if bias else None,
    ]


def every_op(u: Tensor, delta: Tensor, A: Tensor, *rest: Tensor) -> list[Tensor]:
    """Call the scan both ways, the convolution and the norm on the inputs of a scan."""
    scans = [selective_scan(u, delta, A, *rest, delta_softplus=True, reverse=reverse) for reverse in (False, True)]
    return [*scans, causal_conv1d(u, A, rest[2], activation="silu"), *add_rms_norm(u, delta, rest[2], 1e-5)]


def results(op: Op, inputs: Sequence[Tensor], weight: Callable[[Tensor], Tensor] = torch.sum) -> list[Tensor]:
    """Outputs, and the gradients of their weighted sum."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outs = op(*leaves)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    grads = torch.autograd.grad([weight(x) for x in outs], leaves)
    return [x.detach() for x in (*outs, *grads)]


needs_kernels = pytest.mark.skipif(library.obstacle() is not None, reason=f"native kernels: {library.obstacle()}")


# Instruction sets to test; none where the kernels were not built.
USABLE_ISAS = [] if library.obstacle() else library.isas()


@contextmanager
def native(isa: str | None = None) -> Iterator[None]:
    """The ops by the native kernels, of the given instruction set or the best."""
    library.use_isa(isa)
    try:
        with use_backend("native"):
            yield
    finally:
        library.use_isa(None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """As many threads, until the end of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Backend:
    """A backend as the tests of all backends run it, with the sizes and the effort that suit it.

    tiles: settings, by their dotted names, under which it cuts its work into pieces of other sizes. isa: an instruction
    set of the native kernels. release: of causal-conv1d, whose functions have other names since 1.5.1.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    examples: int
    lengths: tuple[int, ...] = (0, 1, 2, 3, 15, 16, 17, 31, 33, 50)
    channels: tuple[int, ...] = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33)
    states: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 16, 17, 32)
    widths: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    tiles: tuple[dict[str, int], ...] = ({},)
    isa: str | None = None
    release: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.isa or self.release}".strip()

    @property
    def device(self) -> str:
        return "cuda" if self.name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"

    def place(self, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if x is None else x.to(self.device) for x in inputs]

    def skip_where_it_cannot_run(self) -> None:
        if self.name == "mamba_ssm" and torch.cuda.is_available():
            pytest.skip("where there is a GPU the real extensions are tested: make test-gpu")
        if self.name == "mamba_ssm" and importlib.util.find_spec("triton") is None:
            pytest.skip("mamba-ssm needs Triton, which is for Linux alone")
        if self.name == "cuda" and self.device == "cpu" and cuda_emulator.obstacle is not None:
            pytest.skip(cuda_emulator.obstacle)
        on_gpu = availability.cuda_obstacle if self.device == "cuda" else triton_obstacle
        obstacles = {"native": library.obstacle, "triton": triton_obstacle, "cuda": on_gpu}
        obstacle = obstacles.get(self.name, lambda: None)()
        if obstacle is not None:
            pytest.skip(f"{self.name}: {obstacle}")

    @contextmanager
    def running(self, tile: dict[str, int] | None = None) -> Iterator[None]:
        """Let it serve all ops."""
        with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
            if self.name == "mamba_ssm":
                use_stand_ins(patch, self.release)
            if self.name == "cuda" and self.device == "cpu":
                patch.setattr(Launch, "run", cuda_emulator.run)
                served = replace(registry._BACKENDS["cuda"], devices=("cpu",), obstacle=lambda: None)
                patch.setitem(registry._BACKENDS, "cuda", served)
            for name, value in (tile or {}).items():
                patch.setattr(name, value)
            stack.enter_context(native(self.isa) if self.name == "native" else use_backend(self.name))
            yield
        if self.name == "mamba_ssm":
            forget_caches()

    def check(self, op: Op, loop: Op, inputs: list[Tensor | None], tile: Any = None, tolerance: Any = None) -> None:
        """Compare an op with a loop in float64, outputs and all gradients."""
        assert inputs[0] is not None
        # Sums of terms of size 1 that happen to cancel are as exact as their terms.
        floor = 1e-3 if inputs[0].dtype == torch.float64 else 0.1
        with self.running(tile):
            compare(op, loop, self.place(inputs), tolerance or TOLERANCE[inputs[0].dtype], floor)


HALF = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE = Backend(
    "reference",
    (torch.float64, torch.float32, torch.bfloat16),
    40,
    lengths=(0, 1, 2, 3, 4, 5, 7, 16, 23),
    channels=(1, 2, 3, 4),
    states=(0, 1, 2, 3, 4),
    tiles=tuple(
        {"famba.ops.reference._STEP_ELEMENTS": step, "famba.ops.reference._CHUNK_ELEMENTS": chunk}
        for step, chunk in ((1, 1), (8, 24), (16, 100), (2**17, 2**19))
    ),
)
NATIVE = [
    Backend(
        "native",
        (torch.float32, torch.bfloat16),
        40,
        tiles=tuple({"famba.ops.native.kernels._CHUNK": chunk} for chunk in (1, 4, 16, 33, 384)),
        isa=isa,
    )
    for isa in USABLE_ISAS
]
# Its interpreter takes a while for each state of each tile of steps.
TRITON = Backend(
    "triton",
    HALF,
    8,
    lengths=(0, 1, 2, 5, 9),
    channels=(1, 5, 8, 33),
    states=(0, 1, 3, 4),
    tiles=tuple({"famba.ops.triton.scan._TILE": tile} for tile in (2, 4, 8)),
)
# Each dtype, and each size of what it holds in registers, is compiled once.
CUDA = Backend(
    "cuda",
    HALF,
    15,
    lengths=(0, 1, 3, 4, 5, 15, 16, 17, 33),
    channels=(1, 5, 32, 33),
    states=(1, 3, 8, 16),
    widths=(1, 3, 4),
)
MAMBA_SSM = [
    Backend(
        "mamba_ssm",
        HALF,
        20,
        lengths=(0, 1, 2, 17, 33, 128),
        channels=(1, 5, 8, 17),
        states=(1, 3, 16),
        widths=(2, 3, 4),
        release=release,
    )
    for release in ("1.4.0", "1.6.1")
]
BACKENDS = [REFERENCE, *NATIVE, TRITON, CUDA, *MAMBA_SSM]


def all_backends(*names: str, slow: str | None = None) -> Any:
    """Run a test for each backend, or for those of these names; for the one named `slow` it is a slow test."""
    chosen = [
        pytest.param(backend, marks=[pytest.mark.slow] if backend.name == slow else [], id=str(backend))
        for backend in BACKENDS
        if not names or backend.name in names
    ]

    def decorate(test: Any) -> Any:
        @functools.wraps(test)
        def run(backend: Backend, **arguments: Any) -> None:
            backend.skip_where_it_cannot_run()
            torch.manual_seed(0)
            test(backend=backend, **arguments)

        # numpy says so where Triton's interpreter meets infinity.
        quiet = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
        return pytest.mark.parametrize("backend", chosen)(quiet(run))

    return decorate


def examples(backend: Backend, share: float = 1.0) -> Any:
    """Settings with the number of examples that a backend is fast enough for."""
    return settings(max_examples=max(1, round(share * backend.examples)), deadline=None)


def loop_scan(softplus: bool = True, reverse: bool = False) -> tuple[Op, Op]:
    """The op, and the loop that it is compared with."""
    return (
        lambda *x: selective_scan(*x, delta_softplus=softplus, reverse=reverse),
        lambda *x: naive.scan(*x, softplus=softplus, reverse=reverse),
    )


def loop_conv(silu: bool = True, reverse: bool = False) -> tuple[Op, Op]:
    return (
        lambda *x: causal_conv1d(*x, activation="silu" if silu else None, reverse=reverse),
        lambda *x: naive.conv(*x, silu=silu, reverse=reverse),
    )


def loop_norm(eps: float = 1e-5) -> tuple[Op, Op]:
    return lambda *x: add_rms_norm(*x, eps), lambda *x: naive.add_rms_norm(*x, eps)
