"""Training in half precision on extreme inputs: everything stays finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from famba.fusion import schedule
from famba.models import Vim
from famba.ops import use_backend
from famba.ops.availability import triton_obstacle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["auto", "reference"]
BACKENDS += [pytest.param("triton", marks=pytest.mark.slow)] if triton_obstacle() is None else []  # type: ignore[list-item]


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighting", ["mean", "size"])
def test_training_on_extremes_stays_finite(backend: str, dtype: torch.dtype, weighting: str) -> None:
    # A step of one layer takes seconds in Triton's interpreter.
    interpreted = backend == "triton" and DEVICE == "cpu"
    depth, patch, steps = (1, 4, 2) if interpreted else (3, 2, 12)
    torch.manual_seed(0)
    how = {
        "fusion": schedule("all", depth, (8 // patch) ** 2 + 1, 5 if patch == 2 else 1),
        "fusion_weighting": weighting,
    }
    model = Vim(img_size=8, patch_size=patch, embed_dim=16, depth=depth, num_classes=5, d_state=4, **how).to(DEVICE)
    push_to_extremes(model)
    # Black, white, a single bright pixel, noise far beyond normalised pixels, next to nothing, and ordinary ones.
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6, device=DEVICE) % 5
    images[:3] = torch.tensor([0.0, 30.0, 0.0])[:, None, None, None]
    images[2, :, 3, 3] = 1000.0
    images = (images * torch.tensor([1, 1, 1, 300, 1e-6, 1])[:, None, None, None]).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16, init_scale=2.0**12)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with use_backend(backend), torch.autocast(DEVICE, dtype=dtype):
            logits = model(images)
        losses.append(nn.functional.cross_entropy(logits.float(), labels))
        scaler.scale(losses[-1]).backward()
        scaler.unscale_(optimizer)
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert all(x.isfinite().all() for x in (*losses, *model.parameters()))
    assert losses[-1] < losses[0]
