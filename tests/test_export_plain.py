"""What exported programs are made of: famba's ops in torch's own, and what a check makes of near ties."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from naive import as_users_run_it
from torch import Tensor, nn

from famba import ops
from famba.errors import ConfigError
from famba.export import check
from famba.export.check import NEAR_TIE, TOLERANCE
from famba.export.errors import ExportError
from famba.export.margins import matching_margins
from famba.export.plain import PlainOps
from famba.export.recurrence import chunked
from famba.export.tracing import trace_program
from famba.fusion import match
from famba.models import Vim


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 65])
def test_chunks_are_the_recurrence(length: int, reverse: bool) -> None:
    torch.manual_seed(length)
    delta, gain = torch.rand(2, length, 3, dtype=torch.float64), torch.randn(2, length, 3, dtype=torch.float64)
    A = -torch.rand(3, 4, dtype=torch.float64)
    B, C = torch.randn(2, length, 4, dtype=torch.float64), torch.randn(2, length, 4, dtype=torch.float64)
    h, expected = torch.zeros(2, 3, 4, dtype=torch.float64), torch.zeros_like(gain)
    for t in reversed(range(length)) if reverse else range(length):
        h = torch.exp(delta[:, t, :, None] * A) * h + gain[:, t, :, None] * B[:, t, None, :]
        expected[:, t] = (h * C[:, t, None, :]).sum(2)
    torch.testing.assert_close(chunked(delta, gain, A, B, C, reverse), expected, rtol=1e-12, atol=1e-12)


def test_decays_that_vanish_leave_what_is_new() -> None:
    ones = torch.ones(1, 9, 1)
    y = chunked(1e4 * ones, ones, -torch.ones(1, 1), ones, ones, reverse=False)
    torch.testing.assert_close(y, ones, rtol=0, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_scans_and_convolutions_have_their_meaning(reverse: bool, gated: bool) -> None:
    torch.manual_seed(0)
    u, delta, z = (torch.randn(2, 7, 3) for _ in range(3))
    B, C = torch.randn(2, 7, 4), torch.randn(2, 7, 4)
    A, weight = -torch.rand(3, 4), torch.randn(3, 4)
    D, bias = torch.randn(3), torch.randn(3)

    def outputs() -> list[Tensor]:
        gate = {"D": D, "z": z, "delta_bias": bias, "delta_softplus": True} if gated else {}
        step = delta if gated else delta.abs()
        return [
            ops.selective_scan(u, step, A, B, C, **gate, reverse=reverse),  # type: ignore[arg-type]
            ops.causal_conv1d(u, weight, bias if gated else None, "silu" if gated else None, reverse),
        ]

    with ops.use_backend("reference"):
        expected = outputs()
        with PlainOps(chunked):
            found = outputs()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_model_that_is_not_ready_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="training mode"):
        trace_program(model, (2,))
    with pytest.raises(ConfigError, match="weight weight is bfloat16 on cpu"):
        trace_program(model.eval().bfloat16(), (2,))


def test_what_cannot_be_traced_is_said_in_one_line() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"cannot trace the model: [^\n]+$"):
        trace_program(Branching().eval(), (2,))


def test_ops_without_a_plain_form_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("famba.export.plain._forms", lambda recurrence: {})
    model = Vim(img_size=8, patch_size=4, num_classes=2, embed_dim=4, depth=1, d_state=1).eval()
    with as_users_run_it(), pytest.raises(ExportError, match=r"famba\.selective_scan.*no form"):
        trace_program(model, (3, 8, 8))


class Fusing(nn.Module):
    """Tokens (b, l, c) to the tokens that are left."""

    def __init__(self, r: int, protected: int | None = None) -> None:
        super().__init__()
        self.r, self.protected = r, protected

    def forward(self, x: Tensor) -> Tensor:
        return match(x, self.r, self.protected).fuse(x)


def test_margins_are_what_a_matching_turned_on() -> None:
    # A: tokens 0 and 2; B: 1 and 3. Cosines of 0: 0.8 and 0; of 2: 0.6 and 0.
    x = torch.tensor([[[1.0, 0, 0], [0.8, 0.6, 0], [0, 1.0, 0], [0, 0, 1.0]]])
    assert matching_margins(Fusing(1).eval(), x).tolist() == pytest.approx([0.2])
    assert matching_margins(Fusing(2).eval(), x).tolist() == pytest.approx([0.6])
    assert matching_margins(Fusing(0).eval(), x).tolist() == [float("inf")]
    # Behind a class token A and B change places: 1 and 3 are matched with 2 alone.
    assert matching_margins(Fusing(1, protected=0).eval(), x).tolist() == pytest.approx([0.6])
    both = torch.cat([x, torch.eye(4)[:, :3].unsqueeze(0)])
    assert matching_margins(Fusing(1).eval(), both).tolist() == pytest.approx([0.2, 0.0])


def judged(found: list[float], margins: list[float]) -> check.Check:
    expected = torch.ones(len(found), 2)
    return check._judged(
        Path("m.onnx"), "onnxruntime 1", expected + torch.tensor(found)[:, None], expected, torch.tensor(margins)
    )


def test_a_check_reports_near_ties_and_fails_on_anything_else() -> None:
    inf = float("inf")
    assert judged([0, 1e-5, 0], [inf] * 3).difference == pytest.approx(1e-5, rel=0.1)
    assert "near" not in str(judged([0, 1e-5, 0], [0.0] * 3))
    tied = judged([0, 1e-5, 0.5], [inf, inf, NEAR_TIE / 2])
    assert (tied.ties, tied.tied_difference, tied.images) == (1, 0.5, 3)
    assert tied.difference < TOLERANCE
    assert "1 of them differ by up to 5.0e-01" in str(tied)
    for found, margins in (([0, 0, 0.5], [0, 0, 1.0]), ([0, 0.5, 0.5], [0, 0, 0]), ([0, 0, float("nan")], [inf] * 3)):
        with pytest.raises(ExportError, match="differs from the model"):
            judged(found, margins)
