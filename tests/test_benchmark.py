"""Test what `famba benchmark` times and makes of the times, with a stand-in for a GPU where it needs one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from famba.analysis.benchmark import command, ops, timing
from famba.analysis.benchmark.command import Contestant
from famba.analysis.benchmark.timing import Race
from famba.cli import main as famba

Patch, Printed = pytest.MonkeyPatch, pytest.CaptureFixture[str]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = ("model.depth=2", "model.embed_dim=16", "model.d_state=2")


def found(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Return what a command wrote as JSON."""
    file = tmp_path / "found.json"
    assert famba(["benchmark", *arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.fixture
def tiny(monkeypatch: Patch) -> None:
    """Let every contestant be a tiny model on small images."""
    config, less = Contestant.config, {"v": TINY, "d": TINY[:1]}
    small = ("data.image_size=32", "fusion.budget=2")
    monkeypatch.setattr(
        Contestant, "config", lambda one, at: config(one._replace(more=(*one.more, *less[one.model[0]], *small)), at)
    )


def test_contestants_take_turns_and_the_warm_up_does_not_count(monkeypatch: Patch) -> None:
    now, calls, race = [0.0], list[str](), Race("race", torch.device("cpu"))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def contestant(name: str, *seconds: float) -> Callable[[], None]:
        left = iter(seconds)
        return lambda: (calls.append(name), now.append(now.pop() + next(left)))[1]

    race.enter("a", [contestant("a", 9.0, 0.001, 0.003, 0.100)])
    race.enter("b", [contestant("b", 9.0, 0.010, 0.020, 0.040)])
    race.run(3)
    assert calls == ["a", "a", "b", "b", "a", "b", "a", "b"]
    assert race.samples["a"]["ms"] == pytest.approx([1, 3, 100])
    assert race.entries("a")["ms"] == pytest.approx(3), "one slow round does not move the median"


def test_ops_are_timed_on_every_usable_backend(tmp_path: Path, capsys: Printed) -> None:
    told = found(tmp_path, "ops", "--batch", "2", "--length", "9", "--rounds", "2", "--precision", "fp32", "bf16")
    rows = told["tables"]["Ops"]
    by_reference = {(r["op"], r["precision"], r["mode"]) for r in rows if r["contestant"] == "reference"}
    both = {(op, dtype, mode) for op in ops.OPS for dtype in ("fp32", "bf16") for mode in ("forward", "both")}
    assert by_reference == {case for case in both if case[::2] != ("match_tokens", "both")}
    assert all(len(row["ms_samples"]) == 2 and row["of_fastest"] >= 1 for row in rows)
    out, progress = capsys.readouterr()
    assert "mamba_ssm" in told["left_out"]
    assert "Left out: mamba_ssm: " in out
    assert "selective_scan 2 9 384 16 fp32: reference, both" in progress


@pytest.mark.usefixtures("tiny")
def test_strategies_are_told_against_none(tmp_path: Path) -> None:
    asked = ["--batch", "2", "--rounds", "2", "--precision", "fp32", "--model", "vim_tiny_patch16_224"]
    (rows,) = found(tmp_path, "model", *asked)["tables"].values()
    by = {row["contestant"]: row for row in rows}
    assert list(by) == ["none", "all", "interleaved", "lower", "upper", "deit_tiny_patch16_224"]
    none, upper = by["none"], by["upper"]
    assert upper["of_none"] == pytest.approx(upper["ms"] / none["ms"])
    assert upper["images_per_s"] == pytest.approx(2000 / upper["ms"])
    # Of 4 patches and a class token one goes in each layer.
    assert (none["token_layers"], upper["token_layers"]) == (1, pytest.approx((4 + 3) / 10))
    assert upper["saved_bytes_per_image"] < none["saved_bytes_per_image"]


@pytest.mark.usefixtures("tiny")
def test_one_command_measures_a_gpu_in_time_and_prints_tables_for_a_page(
    tmp_path: Path, capsys: Printed, monkeypatch: Patch
) -> None:
    # A CPU that is taken for a GPU, and smaller sizes.
    monkeypatch.setattr(command, "check", lambda device: None)
    monkeypatch.setattr(command, "cases", lambda: [ops.Case("causal_conv1d", 2, 9, 6, 3, "fp32")])
    asked = [Contestant(s, "vim_tiny_patch16_224", s, 2, 32, "fp32") for s in ("none", "upper")]
    broken = Contestant("broken", "vim_tiny_patch16_224", "none", 3, 32, "fp32")
    monkeypatch.setattr(command, "blocks", lambda device: [("Vim-Ti", [*asked, broken]), ("Ops", [])])
    told = found(tmp_path, "gpu", "--device", "cpu", "--rounds", "1")
    none, upper = told["tables"]["Vim-Ti, 2 images of 32 pixels"]
    assert upper["of_none"] == pytest.approx(upper["ms"] / none["ms"])
    (reason,) = [reason for name, reason in told["left_out"].items() if "broken" in name]
    assert "mixup and cutmix pair the images" in reason, "what fails does not keep the rest from being measured"
    assert {row["op"] for row in told["tables"]["Ops"]} == {"causal_conv1d"}
    assert told["tables"]["Augmentation, 128 images of 224 pixels"][0]["ms"] > 0
    text = capsys.readouterr().out
    assert text.startswith("`famba benchmark gpu` on ")
    assert "| none " in text

    now = iter(range(0, 10_000, 50))
    monkeypatch.setattr(command.time, "monotonic", lambda: float(next(now)))
    told = found(tmp_path, "gpu", "--device", "cpu", "--rounds", "1", "--minutes", "3")
    assert [row["contestant"] for row in told["tables"]["Vim-Ti, 2 images of 32 pixels"]] == ["none"]
    assert told["left_out"]["causal_conv1d"] == "no time was left of --minutes 3"


def test_the_tables_of_a_gpu_are_those_of_the_documents() -> None:
    titles = [title for title, _ in command.blocks(CPU)]
    assert titles == ["Vim-Ti", "timm's DeiT-Ti", "Ops", "Vim-Ti, patches of 4", "Vim-Ti, 785 tokens", "Vim-S"]
    for _, contestants in command.blocks(CPU):
        for one in contestants:
            one._replace(precision="fp32").config(CPU)
