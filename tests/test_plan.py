"""`famba plan` counts beforehand what a run counts and measures afterwards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from runs import check_command

from famba.analysis.plan import cost, plan
from famba.cli import main
from famba.errors import ConfigError
from famba.models import create_network
from famba.ops import backends, use_backend
from famba.training.build import build_model
from famba.training.compose import compose
from famba.training.measure import macs_per_image, saved_bytes_per_image
from famba.training.setup import prepare

Printed = pytest.CaptureFixture[str]
USABLE = [name for name in ("native", "reference") if backends()[name] is None]
MODELS = [
    ["model=vim_micro", f"model.cls_position={position}", f"fusion.place={place}", f"fusion.weighting={weighting}"]
    for position, place, weighting in (("middle", "before_mixer", "mean"), ("none", "after_scan", "size"))
]
MODELS.append(["model=vit_micro"])


@pytest.mark.parametrize(("backend", "precision"), [(USABLE[0], "fp32"), ("reference", "bf16")])
@pytest.mark.parametrize("model", MODELS, ids=" ".join)
def test_plans_are_what_a_run_counts_and_keeps(model: list[str], precision: str, backend: str) -> None:
    shape = ["model.depth=2", "model.embed_dim=32", "data=digits", "data.image_size=32", "fusion=none,upper"]
    target = ["trainer.device=cpu", f"trainer.precision={precision}", "recipe=quick", "fusion.budget=40"]
    autocast = torch.bfloat16 if precision == "bf16" else None
    for one in plan([*model, *shape, *target, f"ops.backend={backend}"]):
        network = build_model(one.config.model.name, one.setup.model_arguments)
        with use_backend(backend):
            assert one.cost.macs == macs_per_image(network, 32)
            assert one.cost.saved_bytes == saved_bytes_per_image(network, 32, autocast)
            assert one.cost == cost(network, autocast)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: Printed) -> None:
    assert main(["plan", "model=vim_micro", "fusion=all,lower", "--out", str(tmp_path / "plan")]) == 0
    printed = capsys.readouterr().out
    assert "Tokens after each layer" in printed
    written = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert [row["name"] for row in written] == ["none", "all", "lower"]
    assert written[1]["step_time_of_none_predicted"] == written[1]["macs_per_image"] / written[0]["macs_per_image"]
    assert [layer["leaving"] for layer in written[2]["layers"]][-1] == 10
    assert len((tmp_path / "plan" / "plan.csv").read_text().splitlines()) == 4
    assert main(["plan", "-m", "model=vim_micro", "fusion=all,lower"]) == 0
    assert printed.startswith(capsys.readouterr().out), "-m is taken as train.py takes it"


@pytest.mark.parametrize("more", [[], ["fusion.place=after_scan"], ["fusion.order=sequence"], ["fusion.guard=1"]])
def test_a_rule_that_cannot_serve_the_model_is_the_first_error(more: list[str]) -> None:
    asked = ["model=vit_micro", "fusion=all", "fusion.rule=delta", *more]
    refused = (
        "needs step_sizes of the tokens, which a vision transformer does not have; choose one of bipartite, grid, "
    )
    for refuse in (
        lambda: prepare(compose(asked)),
        lambda: check_command(["-m", *asked, "fusion.budget=4,8"]),
        lambda: plan(asked),
        lambda: create_network("vit_micro_patch4_32", fusion="all", fusion_rule="delta"),
    ):
        with pytest.raises(ConfigError, match=refused):
            refuse()


def test_a_run_for_a_gpu_is_planned_where_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    overrides = ["model=vim_micro", "fusion=upper", "trainer.device=cuda"]
    none, upper = plan([*overrides, "trainer.precision=auto"])
    assert (upper.setup.device.type, upper.setup.dtype, upper.backend) == ("cuda", torch.bfloat16, "cuda")
    assert none.cost.layers[0] == none.cost.layers[-1]
    assert main(["plan", *overrides, "trainer.precision=auto"]) == 0
    assert f"computed in bfloat16 by {upper.backend}" in capsys.readouterr().out


def test_cpu_table_is_thirty_runs_of_equal_budgets() -> None:
    asked = check_command(["-m", "experiment=cpu_table"])
    counts = Counter(config.fusion.strategy for config in asked)
    assert counts == dict.fromkeys(("none", "all", "interleaved", "lower", "upper", "adaptive"), 5)
    assert {sum(prepare(one).schedule) for one in asked if one.fusion.strategy != "none" and one.seed == 0} == {55}
    with pytest.raises(ConfigError, match="add -m"):
        check_command(["experiment=cpu_table"])
