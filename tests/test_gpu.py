"""Test what only a GPU can show, by `make test-gpu`; the arithmetic of the kernels is tested without one, elsewhere.

Steps as CUDA graphs are in tests/test_training_graph.py, whose tests run on either device.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ops_helpers import Op, assert_close, compare, draw, loop_conv, loop_norm, loop_scan
from runs import python
from torch import Tensor, nn

from famba.fusion import match, schedule
from famba.models import Vim
from famba.ops import backends, bidirectional_mixer, use_backend
from famba.ops.bidirectional_mixer import Direction

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def gpu_backends() -> list[object]:
    """mamba_ssm, triton and cuda, each skipped with its reason where it cannot be used."""
    found = backends()
    return [
        pytest.param(name, marks=pytest.mark.skipif(found[name] is not None, reason=f"{name}: {found[name]}"))
        for name in ("mamba_ssm", "triton", "cuda")
    ]


each_backend = pytest.mark.parametrize("backend", gpu_backends())


def check(backend: str, run: Op, inputs: list[Tensor], dtype: torch.dtype, roundings: int = 1) -> None:
    """Compare a backend on the GPU with the reference in float64 on the same numbers, outputs and all gradients."""

    def by(name: str) -> Op:
        def chosen(*given: Tensor) -> Any:
            with use_backend(name):
                return run(*given)

        return chosen

    compare(by(backend), by("reference"), [x.cuda() for x in inputs], roundings * TOLERANCE[dtype], floor=0.1)


def scan_inputs(length: int, channels: int, states: int, dtype: torch.dtype) -> list[Tensor]:
    wide = [draw(8, length, channels, dtype=dtype) for _ in range(3)]
    B, C = (draw(8, length, states, dtype=dtype) for _ in range(2))
    A, D, bias = -draw(channels, states).exp().float(), draw(channels).float(), draw(channels).float() - 2
    return [wide[0], wide[1], A, B, C, D, wide[2], bias]


# Each kernel and dtype is compiled and tuned, which takes seconds: not every combination has its turn.
SCANS = [
    (torch.float32, False, 197, 384, 16),
    (torch.float32, True, 197, 384, 16),
    (torch.float32, True, 1, 384, 16),
    (torch.float32, False, 50, 24, 1),
    (torch.bfloat16, True, 197, 384, 16),
    (torch.bfloat16, True, 2049, 384, 16),
    (torch.float16, False, 785, 384, 16),
]


@each_backend
@pytest.mark.parametrize(("dtype", "reverse", "length", "channels", "states"), SCANS, ids=str)
def test_scan(backend: str, dtype: torch.dtype, reverse: bool, length: int, channels: int, states: int) -> None:
    torch.manual_seed(0)
    check(backend, loop_scan(True, reverse)[0], scan_inputs(length, channels, states, dtype), dtype)


@each_backend
@pytest.mark.parametrize(("dtype", "reverse"), list(zip(DTYPES, [False, True, False], strict=True)), ids=str)
def test_convolution_and_norm(backend: str, dtype: torch.dtype, reverse: bool) -> None:
    torch.manual_seed(0)
    inputs = [draw(8, 197, 384, dtype=dtype), draw(384, 4).float(), draw(384).float()]
    check(backend, loop_conv(True, reverse)[0], inputs, dtype)
    inputs = [draw(8, 197, 192, dtype=dtype), draw(8, 197, 192).float(), draw(192).float()]
    check(backend, loop_norm()[0], inputs, dtype)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixer(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    d_model, d, n, rank = 192, 384, 16, 12
    inputs = [draw(8, 197, d_model), draw(2 * d, d_model) / d_model**0.5, draw(d_model, d) / d**0.5]
    for _ in range(2):
        inputs += [draw(d, 4) / 2, draw(d), draw(rank + 2 * n, d) / d**0.5, draw(d, rank) / rank, draw(d) - 2]
        inputs += [-draw(d, n).exp(), draw(d)]
    # Matrix products in the activations' dtype; what is worked out in float32 stays so.
    halves = {0, 1, 2, 5, 6, 12, 13}
    inputs = [x.to(dtype if i in halves else torch.float32) for i, x in enumerate(inputs)]

    def run(x, into, out, *weights):  # type: ignore[no-untyped-def]
        return bidirectional_mixer(x, into, Direction(*weights[:7]), Direction(*weights[7:]), out)

    def measures(name: str, given: list[Tensor]) -> Any:
        sides = Direction(*given[3:10]), Direction(*given[10:])
        with use_backend(name):
            return bidirectional_mixer(*given[:2], *sides, given[2], measure=True)[1]

    on_gpu = [x.to("cuda") for x in inputs]
    torch.set_float32_matmul_precision("highest")  # what ran before may have allowed TF32
    check(backend, run, inputs, dtype, roundings=6)
    found, wanted = measures(backend, on_gpu), measures("reference", [x.double() for x in on_gpu])
    for name, x, y in zip(found._fields, found, wanted, strict=True):
        assert_close(x.cpu(), y.cpu(), 6 * TOLERANCE[dtype], name)


@each_backend
@pytest.mark.parametrize("order", ["sequence", "tome"])
@pytest.mark.parametrize(("length", "r", "protected"), [(197, 7, 0), (197, 98, 0), (785, 40, 392), (64, 32, None)])
def test_matching_and_fusing(backend: str, order: str, length: int, r: int, protected: int | None) -> None:
    torch.manual_seed(0)
    metric, x = draw(8, length, 192).float(), draw(8, length, 192).float()
    sizes = torch.randint(1, 4, (8, length)).float()
    with use_backend("reference"):
        wanted = match(metric, r, protected, order, sizes)
    with use_backend(backend):
        found = match(metric.cuda(), r, protected, order, sizes.cuda())
        fused = found.fuse(x.cuda(), found.shares.sizes)
    assert torch.equal(found.places.cpu(), wanted.places)
    assert_close(fused.cpu(), wanted.fuse(x.double(), sizes.double()), 1e-5)


# mamba-ssm's backward adds in whatever order threads arrive.
@pytest.mark.parametrize("backend", gpu_backends()[1:])
def test_the_same_input_gives_the_same_bits(backend: str) -> None:
    torch.manual_seed(0)
    model, images = vim("upper"), torch.randn(4, 3, 64, 64, device="cuda")

    def run() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model(images).float().square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    with use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
        finally:
            torch.use_deterministic_algorithms(False)


@each_backend
@pytest.mark.parametrize("strategy", ["none", "all", "interleaved", "lower", "upper"])
def test_a_step_never_makes_the_host_wait(backend: str, strategy: str) -> None:
    model, images, labels = vim(strategy), torch.randn(4, 3, 64, 64, device="cuda"), torch.arange(4, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    with use_backend(backend):
        step()  # compiles and tunes, which waits
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
            torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@each_backend
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"], ids=["compiled", "CUDA graphs"])
def test_compiled_in_one_graph(backend: str, mode: str) -> None:
    script = SCRIPT.format(backend=backend, mode=mode)
    done = python("-c", script)
    assert done.returncode == 0, done.stderr[-4000:]


# In a process of its own: the checks of shapes in signatures are Python that a compiler cannot see through.
SCRIPT = """
import torch
from famba.fusion import schedule
from famba.models import Vim
from famba.ops import use_backend

torch.manual_seed(0)
counts = schedule("upper", 4, 17, 6)
model = Vim(img_size=64, patch_size=16, embed_dim=64, depth=4, num_classes=10, fusion=counts).cuda()
compiled = torch.compile(model, fullgraph=True, dynamic=False, mode="{mode}")
with use_backend("{backend}"):
    for number in range(4):
        images = torch.randn(8, 3, 64, 64, device="cuda")
        grads = []
        for run in (compiled, model):
            torch.compiler.cudagraph_mark_step_begin()
            model.zero_grad()
            logits = run(images)
            logits.square().sum().backward()
            grads.append([logits.detach().clone(), *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
"""


@each_backend
@pytest.mark.parametrize(
    "options", [("fp16",), ("bf16", "trainer.compile=true", "trainer.cuda_graphs=true")], ids=" ".join
)
def test_training_learns(backend: str, options: tuple[str, ...], tmp_path: Path) -> None:
    precision, *more = options
    settings = [f"ops.backend={backend}", "fusion=upper", "trainer.epochs=2", f"run_dir={tmp_path / 'run'}", *more]
    settings += [f"trainer.precision={precision}", "trainer.device=cuda"]
    done = python("train.py", "experiment=demo", *settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"ops by {backend}" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["top1"] > 20, "digits have ten classes"


def vim(strategy: str) -> Vim:
    torch.manual_seed(0)
    counts = schedule(strategy, 4, 17, 6)
    return Vim(img_size=64, patch_size=16, embed_dim=64, depth=4, num_classes=10, fusion=counts).cuda()
