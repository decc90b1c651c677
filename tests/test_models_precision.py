"""Training in half precision on extreme inputs: everything stays finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from famba.fusion import schedule
from famba.models import Vim
from famba.ops import use_backend
from famba.ops.availability import triton_obstacle

HALF = [torch.bfloat16, torch.float16]
BACKENDS = [
    "auto",
    "reference",
    *([pytest.param("triton", marks=pytest.mark.slow)] if triton_obstacle() is None else []),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(depth: int = 3, patch_size: int = 2, **options: object) -> Vim:
    torch.manual_seed(0)
    tokens = (8 // patch_size) ** 2 + 1
    counts = schedule("all", depth, tokens, tokens // 3)
    shape = {"img_size": 8, "patch_size": patch_size, "embed_dim": 16, "depth": depth, "num_classes": 5}
    return Vim(**shape, fusion=counts, **options).to(DEVICE)


def extreme_images() -> Tensor:
    """Black, white, a single bright pixel, noise far beyond normalised pixels, and ordinary ones."""
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[:3] = torch.tensor([0.0, 30.0, 0.0])[:, None, None, None]
    images[2, :, 3, 3] = 1000.0
    return (images * torch.tensor([1, 1, 1, 300, 1e-6, 1])[:, None, None, None]).to(DEVICE)


def push_to_extremes(model: Vim) -> None:
    """Steps near nothing and far above what training reaches, decays at once and never."""
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            for projection in (layer.mixer.dt_proj, layer.mixer.dt_proj_b):
                projection.bias[0::4] = 30.0
                projection.bias[1::4] = -30.0
                projection.weight[2::4] *= 100
            layer.mixer.A_log[number::5] = 6.0
            layer.mixer.A_b_log[number::5] = -20.0


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighting", ["mean", "size"])
def test_training_on_extremes_stays_finite(backend: str, dtype: torch.dtype, weighting: str) -> None:
    # A step of one layer takes seconds in Triton's interpreter.
    interpreted = backend == "triton" and DEVICE == "cpu"
    model = make(1, 4, d_state=2, fusion_weighting=weighting) if interpreted else make(fusion_weighting=weighting)
    push_to_extremes(model)
    images, labels = extreme_images(), torch.arange(6, device=DEVICE) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16, init_scale=2.0**12)
    losses = []
    with use_backend(backend):
        for _ in range(2 if interpreted else 12):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, dtype=dtype):
                logits = model(images)
            loss = nn.functional.cross_entropy(logits.float(), labels)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            grads = {name: parameter.grad for name, parameter in model.named_parameters()}
            assert not [name for name, g in grads.items() if g.dtype != torch.float32 or not g.isfinite().all()]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    assert all(torch.tensor(losses).isfinite())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert losses[-1] < losses[0]
