"""The native kernels beside threads, forks and wrong arguments; and that they are there at all."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ops_helpers import USABLE_ISAS, every_op, native, needs_kernels, results, scan_inputs, threads
from runs import python
from torch import Tensor

from famba.errors import BackendError
from famba.ops import backends, registry, use_backend
from famba.ops.inputs import ScanInputs
from famba.ops.native import kernels, library

ALLOW_FORK = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def inputs_of(batch: int = 3, length: int = 70, channels: int = 37) -> list[Tensor]:
    """A scan's inputs, drawn with a fixed seed; some also serve as weight and bias elsewhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [x.float() for x in scan_inputs(batch, length, channels, 5) if x is not None]


def run_all(inputs: list[Tensor]) -> list[Tensor]:
    """Results and gradients of the ops."""
    return results(every_op, inputs, lambda x: x.square().sum())


def forward(inputs: list[Tensor]) -> list[Tensor]:
    """Results of the kernels, and the scan's gradients, without the machinery of autograd, which forks badly."""
    u, delta, A, *_, D, _, _ = inputs
    y, state = kernels.selective_scan(ScanInputs(*inputs, True, False))
    grads = kernels.selective_scan_backward(y, ScanInputs(*inputs, True, False), state)
    conv = kernels.causal_conv1d(u, A, D, True, False)
    return [y, *grads, conv, *kernels.add_rms_norm(u, delta, D, 1e-5)]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_kernels_are_built_where_there_is_a_compiler() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler {compiler!r} on this machine")
    assert backends()["native"] is None, "run `make setup`"
    assert registry.resolve("cpu") == "native" or os.environ.get("FAMBA_BACKEND")


@needs_kernels
def test_equal_input_gives_equal_bits_on_any_number_of_threads() -> None:
    for batch in (1, 3, 17):
        inputs = inputs_of(batch)
        for isa in USABLE_ISAS:
            with native(isa):
                with threads(1):
                    alone = run_all(inputs)
                for count in (1, 2, 5):
                    with threads(count):
                        assert same_bits(run_all(inputs), alone), f"{isa}, {count} threads"


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    inputs = inputs_of(3)
    expected = run_all(inputs)
    torch.set_default_dtype(dtype)
    try:
        assert same_bits(run_all(inputs), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@needs_kernels
@pytest.mark.parametrize("per_call", [1, 2])
def test_calls_from_two_threads_at_once(per_call: int) -> None:
    both = [inputs_of(batch=2), inputs_of(batch=3, length=41)]
    start = threading.Barrier(2)
    with native(), threads(per_call):
        wanted = [run_all(inputs) for inputs in both]

        def work(inputs: list[Tensor], expected: list[Tensor]) -> bool:
            # A new thread has torch's own number of threads.
            torch.set_num_threads(per_call)
            start.wait(timeout=60)
            return all(same_bits(run_all(inputs), expected) for _ in range(10))

        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(work, both, wanted, timeout=120))


def passes_in_forked_child(check: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)  # a child that hangs is killed
            status = 0 if check() else 1
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


@ALLOW_FORK
@needs_kernels
def test_a_forked_child_computes_the_same() -> None:
    inputs = inputs_of()
    with threads(2), native():
        wanted = forward(inputs)

        def check() -> bool:
            return same_bits(forward(inputs), wanted)

        assert passes_in_forked_child(check)
        assert check(), "the parent goes on"
        assert passes_in_forked_child(lambda: passes_in_forked_child(check)), "a child's child"


FIRST_CALL_AFTER_FORK = """
import os, signal, torch
torch.set_num_threads(2)
numbers = torch.randn(400, 400)
(numbers @ numbers).exp().sum()  # torch's threads are there, the kernels not yet loaded
from famba.ops.native import kernels
child = os.fork()
if child == 0:
    signal.alarm(30)
    kernels.causal_conv1d(torch.ones(8, 50, 64), torch.ones(64, 3), None, True, False)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "hangs"
"""


@needs_kernels
def test_a_forked_child_may_be_the_first_to_call() -> None:
    done = python("-W", "ignore", "-c", FIRST_CALL_AFTER_FORK)
    assert done.returncode == 0, done.stderr


@needs_kernels
def test_inputs_are_never_written_to() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        # Views of larger arrays, of which nothing outside may change either.
        whole = [torch.randn(*(n + 2 for n in x.shape)).to(dtype) for x in inputs_of(2, 11, 9)]
        inner = [x[tuple(slice(1, -1) for _ in x.shape)] for x in whole]
        before = [x.clone() for x in whole]
        for isa in USABLE_ISAS:
            with native(isa):
                run_all(inner)
        assert same_bits(whole, before)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_dtypes_that_are_not_served_go_to_the_reference_or_are_refused(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in inputs_of(1, 5, 3)]
    named = f"'native' does not serve {str(dtype).removeprefix('torch.')} .*only float32 and bfloat16; use 'auto'"
    with native(), pytest.raises(BackendError, match=named):
        every_op(*inputs)
    with use_backend("auto"):
        found = every_op(*inputs)
    with use_backend("reference"):
        assert same_bits(found, every_op(*inputs))


@needs_kernels
def test_instruction_sets_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = library.isas()
    assert usable[0] == "portable"
    try:
        for name in usable:
            library.use_isa(name)
            assert library.isa() == name
        monkeypatch.setenv("FAMBA_ISA", "portable")
        library.use_isa(None)
        assert library.isa() == "portable"
        monkeypatch.setenv("FAMBA_ISA", "avx3")
        library.use_isa(None)
        with native(), pytest.raises(BackendError, match=r"'avx3', did you mean 'avx2'.*usable: portable"):
            run_all(inputs_of(1, 5, 3))
        with pytest.raises(BackendError, match="is unknown; usable"):
            library.use_isa("neon")
    finally:
        monkeypatch.undo()
        library.use_isa(None)
