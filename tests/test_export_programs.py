"""Exported programs run where famba is not, at other batch sizes than they were traced with, and compute the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
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

BATCHES = (1, 5)
ROOT = Path(__file__).parents[1]


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
    "head": (lambda: vim(fusion=(7, 4)), (3, 16, 24)),
    "middle": (lambda: vim(fusion=(7, 4), **MIDDLE), (3, 16, 24)),
    "no class token": (lambda: vim(fusion=(7, 4), cls_position="none", fusion_weighting="size"), (3, 16, 24)),
    "prune": (lambda: vim(fusion=(7, 4), cls_position="middle", fusion_mode="prune"), (3, 16, 24)),
    **{
        rule: (lambda rule=rule: vim(fusion=(8, 4), **OTHER_RULES[rule], fusion_rule=rule), (3, 16, 24))
        for rule in ("r_meeto", "neighbours", "grid", "delta", "output")
    },
    "transformer": (vit, (3, 12, 16)),
    "ties": (Fusing, (12, 6)),
}

FRESH = """
import sys
for name in {blocked}:
    sys.modules[name] = None
import numpy as np
{setup}
folder = sys.argv[1]
for name in {names}:
    given = np.load(f"{{folder}}/{{name}}.npz")
    run = load(f"{{folder}}/{{name}}.{suffix}")
    np.savez(f"{{folder}}/{{name}}.{suffix}.npz", **{{key: run(given[key]) for key in given}})
assert not [name for name, module in sys.modules.items() if name.split(".")[0] in {blocked} and module is not None]
"""
SETUPS = {
    "pt2": """
import torch
def load(file):
    program = torch.export.load(file).module()
    return lambda x: program(torch.from_numpy(x)).detach().numpy()
""",
    "onnx": """
import onnxruntime
def load(file):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x: session.run(["logits"], {"images": x})[0]
""",
}


def inputs(name: str) -> list[Tensor]:
    """Random images; or tokens among which many are equal, whose cosines are 0 or 1 in every runtime."""
    generator = torch.Generator().manual_seed(len(name))
    shape = MODELS[name][1]
    if name == "ties":
        return [torch.eye(6)[torch.randint(0, 6, (batch, 12), generator=generator)] for batch in BATCHES]
    return [torch.randn(batch, *shape, generator=generator) for batch in BATCHES]


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: make().eval() for name, (make, _) in MODELS.items()}


@pytest.fixture(scope="module")
def programs(models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(models, "pt2", tmp_path_factory.mktemp("pt2"))


@pytest.fixture(scope="module")
def graphs(models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(models, "onnx", tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module", params=["programs", "graphs"])
def outputs(request: pytest.FixtureRequest) -> tuple[Path, str]:
    """The folder of every model in one format, and how its files end."""
    return request.getfixturevalue(request.param), {"programs": "pt2", "graphs": "onnx"}[request.param]


def written(models: dict[str, nn.Module], suffix: str, folder: Path) -> Path:
    """Write every model in one format, and run all in one fresh process."""
    write = program.write if suffix == "pt2" else onnx_graph.write
    with as_users_run_it():
        for name, model in models.items():
            write(model, MODELS[name][1], folder / f"{name}.{suffix}", "{}")
            np.savez(folder / f"{name}.npz", **{f"b{len(x)}": x.numpy() for x in inputs(name)})
    blocked = ["famba", "timm"] if suffix == "pt2" else ["famba", "timm", "torch"]
    code = FRESH.format(blocked=blocked, setup=SETUPS[suffix], names=list(models), suffix=suffix)
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_process_computes_what_the_model_does(
    outputs: tuple[Path, str], models: dict[str, nn.Module], name: str
) -> None:
    folder, suffix = outputs
    found = np.load(folder / f"{name}.{suffix}.npz")
    for x in inputs(name):
        with torch.no_grad(), ops.use_backend("reference"):
            expected = models[name](x)
        torch.testing.assert_close(torch.from_numpy(found[f"b{len(x)}"]), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_graphs_are_of_standard_operators(graphs: Path) -> None:
    for name in MODELS:
        message = onnx.load(graphs / f"{name}.onnx")
        onnx.checker.check_model(message, full_check=True)
        assert [(one.domain, one.version) for one in message.opset_import] == [("", OPSET)]
        assert not message.functions
        kinds = [node.op_type for node in message.graph.node]
        assert kinds.count("Scan") == (0 if name in ("ties", "transformer") else 4)
        # Protected places that are not at the head are sorted too; two orders share one matching.
        if name not in OTHER_RULES:
            assert kinds.count("TopK") == {"none": 0, "middle": 4, "prune": 4, "ties": 1}.get(name, 2)
        (given,), (made,) = message.graph.input, message.graph.output
        assert (given.name, made.name) == ("images", "logits")
        assert given.type.tensor_type.shape.dim[0].dim_param == made.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_decays_that_vanish_leave_what_is_new() -> None:
    ones = torch.ones(1, 9, 1)
    y = chunked(1e4 * ones, ones, -torch.ones(1, 1), ones, ones, reverse=False)
    torch.testing.assert_close(y, ones, rtol=0, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length", [1, 2, 17, 65])
def test_scans_and_convolutions_have_their_meaning(length: int, reverse: bool, gated: bool) -> None:
    """Also in chunks, the last of which is shorter."""
    torch.manual_seed(0)
    u, delta, z = (torch.randn(2, length, 3) for _ in range(3))
    B, C = torch.randn(2, length, 4), torch.randn(2, length, 4)
    A, weight, D, bias = -torch.rand(3, 4), torch.randn(3, 4), torch.randn(3), torch.randn(3)
    gate: dict[str, Any] = {"D": D, "z": z, "delta_bias": bias, "delta_softplus": True} if gated else {}

    def outputs() -> list[Tensor]:
        return [
            ops.selective_scan(u, delta if gated else delta.abs(), A, B, C, **gate, reverse=reverse),
            ops.causal_conv1d(u, weight, bias if gated else None, "silu" if gated else None, reverse),
        ]

    with ops.use_backend("reference"):
        expected = outputs()
        with PlainOps(chunked):
            found = outputs()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_model_that_is_not_ready_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="training mode"):
        trace_program(model, (2,))
    with pytest.raises(ConfigError, match="weights are torch.bfloat16 on cpu; expected float32"):
        trace_program(model.eval().bfloat16(), (2,))


def test_what_cannot_be_traced_is_said_in_one_line() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"cannot trace the model: [^\n]+$"):
        trace_program(Branching().eval(), (2,))
