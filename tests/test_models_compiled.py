"""The model under torch.compile and torch.export, in a process of its own.

The checks of shapes in signatures, on in this process, are Python that a compiler cannot see through and that users
do not have.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import ROOT, python

SETUP = """
import warnings
import torch
from famba.fusion import schedule
from timm.models.vision_transformer import VisionTransformer
from famba.models import Vim, apply_tome
warnings.simplefilter("ignore")

def make(fusion=None, depth=3, **options):
    torch.manual_seed(0)
    return Vim(img_size=8, patch_size=2, embed_dim=16, depth=depth, num_classes=3, d_state=4, fusion=fusion, **options)

def images(batch=2):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))

def agrees(run, model, x, plain=None):
    outs, grads = [], []
    for f in (run, plain or model):
        model.zero_grad()
        logits = f(x)
        logits.square().sum().backward()
        outs.append(logits.detach())
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
"""


def run(script: str, tmp_path: Path) -> str:
    """Return what a script prints; the test fails with its errors where it ends badly."""
    path = tmp_path / "script.py"
    path.write_text(SETUP + script)
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "FAMBA_BACKEND": "auto"}
    done = python(str(path), **variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_compiled_models_agree_with_eager_ones(tmp_path: Path) -> None:
    script = """
cases = {"none": "head", "all": "middle", "interleaved": "none"}  # no layer, each, and some
for strategy, position in cases.items():
    protected = int(position != "none")
    counts = schedule(strategy, 2, 16 + protected, 5, None, protected)
    model = make(counts, depth=2, cls_position=position, fusion_weighting="size")
    torch._dynamo.reset()
    # Without the last step to machine code, which takes a minute.
    agrees(torch.compile(model, fullgraph=True, backend="aot_eager"), model, images())
    print(strategy)
"""
    assert run(script, tmp_path).split() == ["none", "all", "interleaved"]


@pytest.mark.slow
def test_features_and_transformers_that_fuse_are_one_graph_too(tmp_path: Path) -> None:
    script = """
torch._dynamo.config.error_on_recompile = True
for position, fusion in (("head", None), ("middle", (2, 3)), ("none", (0, 3))):
    torch._dynamo.reset()
    model = make(fusion, depth=2, cls_position=position)

    def features(x):
        final, pairs = model.forward_intermediates(x, [-2, 1], return_prefix_tokens=True, norm=True, stop_early=True)
        found = torch.utils._pytree.tree_leaves([model.forward_features(x), final, *pairs])
        return torch.cat([x.flatten(1) for x in found], dim=1) + model(x).sum()

    compiled = torch.compile(features, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5):
        agrees(compiled, model, images(batch), features)
    print(position)

shape = dict(img_size=8, patch_size=2, embed_dim=16, depth=3, num_heads=2, num_classes=3)
for way in ({}, {"mode": "prune"}, {"order": "sequence", "weighting": "mean", "proportional": False}):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = apply_tome(VisionTransformer(**shape), (4, 0, 3), **way)
    agrees(torch.compile(model, fullgraph=True), model, images())
"""
    assert run(script, tmp_path).split() == ["head", "middle", "none"]


@pytest.mark.slow
def test_every_rule_is_traced_as_a_whole(tmp_path: Path) -> None:
    script = """
warnings.simplefilter("error", UserWarning)
for rule in ("r_meeto", "neighbours", "grid", "delta", "output"):
    torch._dynamo.reset()
    way = {"fusion_rule": rule, "fusion_place": "after_scan", "fusion_weighting": "size", "cls_position": "middle"}
    model = make((4, 0, 3), **way)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    agrees(compiled, model, images())
    agrees(compiled, model, images(3))
    print(rule)
"""
    assert run(script, tmp_path).split() == ["r_meeto", "neighbours", "grid", "delta", "output"]
