"""Nothing in a step on a GPU makes the host wait: shown on tensors that have no values to look at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")

from famba.fusion import schedule
from famba.models import Vim
from famba.ops import triton, use_backend
from famba.ops.availability import triton_obstacle
from famba.ops.triton.launch import noted

pytestmark = pytest.mark.skipif(triton_obstacle() is not None, reason=f"triton: {triton_obstacle()}")


@pytest.fixture
def valueless() -> Iterator[None]:
    """Tensors on a GPU that hold nothing: whatever asks for a value fails, and so does mixing in one of the host's."""
    with FakeTensorMode(), noted():
        yield


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def test_a_value_that_is_asked_for_would_show(valueless: None) -> None:
    with pytest.raises(DataDependentOutputException):
        on_gpu(3).sum().item()
    with pytest.raises(RuntimeError):
        on_gpu(3) + torch.empty(3)


@pytest.mark.parametrize("strategy", ["none", "all", "interleaved", "lower", "upper"])
@pytest.mark.parametrize("position", ["head", "middle", "none"])
def test_a_step_of_the_model_waits_for_nothing(valueless: None, strategy: str, position: str) -> None:
    counts = schedule(strategy, 4, 16 + (position != "none"), 6, protected=int(position != "none"))
    with torch.device("cuda"):
        model = Vim(
            img_size=8, patch_size=2, embed_dim=16, depth=4, num_classes=5, fusion=counts, cls_position=position,
            fusion_weighting="size" if position == "middle" else "mean", drop_path_rate=0.1,
        )  # fmt: skip
    images = on_gpu(2, 3, 8, 8)
    for backend in ("triton", "reference"):
        with use_backend(backend), torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(images)
        nn.functional.cross_entropy(logits.float(), torch.empty(2, dtype=torch.int64, device="cuda")).backward()
        assert logits.device.type == "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_of_the_backend_wait_for_nothing(valueless: None, dtype: torch.dtype) -> None:
    batch, length, d_model, d, n, rank = 2, 17, 8, 16, 4, 3
    x = on_gpu(batch, length, d, dtype=dtype)
    A, B, D = on_gpu(d, n), on_gpu(batch, length, n, dtype=dtype), on_gpu(d)
    y, state = triton.selective_scan(x, x, A, B, B, D, x, D, True, True)
    triton.selective_scan_backward(y, x, x, A, B, B, D, x, D, True, True, state)
    weight = on_gpu(d, 4)
    triton.causal_conv1d_backward(triton.causal_conv1d(x, weight, D, True, False), x, weight, D, True, False)
    normed, total = triton.add_rms_norm(x, None, D, 1e-5)
    triton.add_rms_norm_backward(normed, total, total, D, 1e-5)
    for guarded in (None, torch.empty(batch, 1, dtype=torch.int64, device="cuda")):
        places, weights, _ = triton.match_tokens(x, int(guarded is None), guarded, None, 5, "sequence")
        fused = triton.fuse_tokens(x, places, weights, length - 5)
        triton.fuse_tokens_backward(fused, places, weights)
    direction = [weight, D, on_gpu(rank + 2 * n, d, dtype=dtype), on_gpu(d, rank, dtype=dtype), D, A, D]
    tokens, into = on_gpu(batch, length, d_model, dtype=dtype), on_gpu(2 * d, d_model, dtype=dtype)
    out_weight = on_gpu(d_model, d, dtype=dtype)
    out, *kept = triton.mixer(tokens, into, direction, direction, out_weight)
    triton.mixer_backward(out, tokens, into, direction, direction, out_weight, kept)
