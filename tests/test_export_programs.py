"""Exported programs and graphs compute what the model does, at other batch sizes than they were traced with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from naive import as_users_run_it
from torch import Tensor, nn

from famba import ops
from famba.errors import ConfigError
from famba.export import onnx_graph, program
from famba.export.check import ExportError
from famba.export.onnx_graph import OPSET
from famba.export.program import PlainOps, chunked, trace_program
from famba.fusion import match
from famba.models import Vim, apply_tome


class Fusing(nn.Module):
    """Tokens (b, l, c) fuse, in each of two orders."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([match(x, 5, order=order).fuse(x) for order in ("sequence", "tome")], dim=1)


def vim(**options: Any) -> nn.Module:
    """Twenty-four patches, of an image that is no square."""
    return Vim(img_size=(16, 24), patch_size=4, num_classes=3, embed_dim=8, depth=2, d_state=2, **options)


def vit() -> nn.Module:
    """Five patches more than registers, class and distillation tokens."""
    arguments = {"img_size": (12, 16), "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
    return apply_tome(timm.create_model("vit_tiny_patch16_224", reg_tokens=2, **arguments), (4, 2))


MIDDLE = {"cls_position": "middle", "fusion_order": "tome", "fusion_weighting": "size", "fusion_place": "after_scan"}
OTHER_RULES: dict[str, dict[str, str]] = {
    "r_meeto": {"fusion_weighting": "size"},
    "neighbours": {"cls_position": "middle"},
    "grid": {"cls_position": "middle", "fusion_weighting": "size"},
    "delta": {"fusion_place": "after_scan", "fusion_mode": "prune"},
    "output": {"fusion_place": "after_scan", "cls_position": "none"},
}
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "none": (vim, (3, 16, 24)),
    "middle": (lambda: vim(fusion=(7, 4), **MIDDLE), (3, 16, 24)),
    "no class token": (lambda: vim(fusion=(7, 4), cls_position="none", fusion_mode="prune"), (3, 16, 24)),
    **{
        rule: (lambda rule=rule: vim(fusion=(8, 4), **OTHER_RULES[rule], fusion_rule=rule), (3, 16, 24))
        for rule in ("r_meeto", "neighbours", "grid", "delta", "output")
    },
    "transformer": (vit, (3, 12, 16)),
    "ties": (Fusing, (12, 6)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_programs_and_graphs_compute_what_the_model_does(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    (make, shape), (pt2, graph) = MODELS[name], (tmp_path / "model.pt2", tmp_path / "model.onnx")
    model = make().eval()
    with as_users_run_it():
        program.write(model, shape, pt2, "{}")
        onnx_graph.write(model, shape, graph, "{}")
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = torch.randn(batch, *shape)
        if name == "ties":  # many tokens are equal, and their cosines are 0 or 1 in every runtime
            x = torch.eye(6)[torch.randint(0, 6, (batch, 12))]
        with torch.no_grad(), ops.use_backend("reference"):
            expected = model(x)
        by_graph = torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
        for found in (torch.export.load(pt2).module()(x), by_graph):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    message = onnx.load(graph)
    onnx.checker.check_model(message, full_check=True)
    assert [(one.domain, one.version) for one in message.opset_import] == [("", OPSET)], "no operators but ONNX's own"
    scans = [node.op_type for node in message.graph.node].count("Scan")
    assert scans == (0 if name in ("ties", "transformer") else 4), "a loop each, not its steps"


def test_decays_that_vanish_leave_what_is_new() -> None:
    ones = torch.ones(1, 9, 1)
    y = chunked(1e4 * ones, ones, -torch.ones(1, 1), ones, ones, reverse=False)
    torch.testing.assert_close(y, ones, rtol=0, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 17, 65])
def test_scans_and_convolutions_have_their_meaning(length: int, reverse: bool) -> None:
    """Also in chunks, the last of which is shorter."""
    torch.manual_seed(0)
    u, delta, z = (torch.randn(2, length, 3) for _ in range(3))
    B, C = torch.randn(2, length, 4), torch.randn(2, length, 4)
    A, D, bias = -torch.rand(3, 4), torch.randn(3), torch.randn(3)
    scan = partial(ops.selective_scan, u, delta, A, B, C, D, z, bias, delta_softplus=True, reverse=reverse)
    conv = partial(ops.causal_conv1d, u, torch.randn(3, 4), bias, "silu", reverse)
    with ops.use_backend("reference"):
        for op in (scan, conv):
            expected = op()
            with PlainOps(chunked):
                torch.testing.assert_close(op(), expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_is_not_ready_or_cannot_be_traced_is_refused_in_one_line() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="training mode"):
        trace_program(model, (2,))
    with pytest.raises(ConfigError, match="weights are torch.bfloat16 on cpu; expected float32"):
        trace_program(model.eval().bfloat16(), (2,))

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"cannot trace the model: [^\n]+$"):
        trace_program(Branching().eval(), (2,))
