"""Nothing in a step on a GPU makes the host wait: shown on tensors that have no values to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")

from famba.fusion import schedule
from famba.models import Vim
from famba.ops import triton, use_backend
from famba.ops.availability import triton_obstacle
from famba.ops.cuda import backend as cuda
from famba.ops.cuda.launch import Launch
from famba.ops.inputs import Direction, MixerInputs, ScanInputs
from famba.ops.triton.launch import noted

pytestmark = pytest.mark.skipif(triton_obstacle() is not None, reason=f"triton: {triton_obstacle()}")


@pytest.fixture
def valueless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on a GPU that hold nothing: whatever asks for a value fails, and so does mixing in one of the host's."""
    monkeypatch.setattr(Launch, "run", lambda self: None)
    with FakeTensorMode(), noted():
        yield


@contextmanager
def autocast() -> Iterator[None]:
    """Turn on what torch.autocast turns on; torch.autocast itself refuses without a GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def make(device: str, strategy: str, position: str) -> Vim:
    guards = int(position != "none")
    fusion = schedule(strategy, 4, 16 + guards, 6, protected=guards)
    weighting = "size" if position == "middle" else "mean"
    how: dict[str, Any] = {"cls_position": position, "fusion_weighting": weighting, "drop_path_rate": 0.1}
    with torch.device(device):
        return Vim(img_size=8, patch_size=2, embed_dim=16, depth=4, num_classes=5, fusion=fusion, **how)


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def test_a_value_that_is_asked_for_would_show(valueless: None) -> None:
    with pytest.raises(DataDependentOutputException):
        on_gpu(3).sum().item()
    with pytest.raises(RuntimeError):
        on_gpu(3) + torch.empty(3)


@pytest.mark.parametrize("strategy", ["none", "all", "interleaved", "lower", "upper"])
@pytest.mark.parametrize("position", ["head", "middle", "none"])
def test_a_forward_of_the_model_waits_for_nothing(valueless: None, strategy: str, position: str) -> None:
    model = make("cuda", strategy, position)
    for backend in ("triton", "reference"):
        with use_backend(backend), autocast():
            logits = model(on_gpu(2, 3, 8, 8))
        assert (logits.device.type, logits.dtype) == ("cuda", torch.bfloat16)


@pytest.mark.parametrize("kernels", [triton, cuda], ids=["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_of_a_backend_wait_for_nothing(valueless: None, kernels: Any, dtype: torch.dtype) -> None:
    batch, length, d_model, d, n, rank = 2, 17, 8, 16, 4, 3
    x = on_gpu(batch, length, d, dtype=dtype)
    A, B, D = on_gpu(d, n), on_gpu(batch, length, n, dtype=dtype), on_gpu(d)
    scan = ScanInputs(x, x, A, B, B, D, x, D, True, True)
    y, state = kernels.selective_scan(scan)
    kernels.selective_scan_backward(y, scan, state)
    weight = on_gpu(d, 4)
    kernels.causal_conv1d_backward(kernels.causal_conv1d(x, weight, D, True, False), x, weight, D, True, False)
    normed, total = kernels.add_rms_norm(x, None, D, 1e-5)
    kernels.add_rms_norm_backward(normed, total, total, D, 1e-5)
    for protected in (None, torch.empty(batch, 1, dtype=torch.int64, device="cuda")):
        places, weights, _ = kernels.match_tokens(x, int(protected is None), protected, None, 5, "sequence")
        fused = kernels.fuse_tokens(x, places, weights, length - 5)
        kernels.fuse_tokens_backward(fused, places, weights)
    direction = Direction(weight, D, on_gpu(rank + 2 * n, d, dtype=dtype), on_gpu(d, rank, dtype=dtype), D, A, D)
    tokens, into = on_gpu(batch, length, d_model, dtype=dtype), on_gpu(2 * d, d_model, dtype=dtype)
    out_weight = on_gpu(d_model, d, dtype=dtype)
    inputs = MixerInputs(tokens, into, direction, direction, out_weight)
    out, _, *kept = kernels.mixer(inputs, True)
    kernels.mixer_backward(out, inputs, kept)
