"""What `famba benchmark` times, and what it makes of the times."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from famba.analysis.benchmark import contestants, fusion, length, machine, memory, model
from famba.analysis.benchmark.cases import OPS as ALL_OPS
from famba.analysis.benchmark.cases import USUAL_OPS, Case, inputs
from famba.analysis.benchmark.memory import Peak, step_peak
from famba.analysis.benchmark.products import Linear, Products, step_linears
from famba.analysis.benchmark.report import Report, Table
from famba.analysis.benchmark.steps import Step, Subject
from famba.analysis.benchmark.timing import HostClock, Race, Times, ratio
from famba.cli import main as famba
from famba.errors import TrainingError
from famba.ops import use_backend

CPU = torch.device("cpu")
OPS = ["benchmark", "ops", "--batch", "2", "--length", "9", "--channels", "6", "--states", "3", "--rounds", "2"]
MODEL = ["benchmark", "model", "--batch", "2", "--image-size", "32", "--rounds", "2", "--precision", "fp32"]
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _no_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed here: importing these raises ImportError."""
    for name in ("mambapy", "mambapy.pscan", "mamba_ssm", "mamba_ssm.ops.selective_scan_interface"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.skipif(
    importlib.util.find_spec("mamba_ssm") is None,
    reason="mamba-ssm is not installed; scripts/install_extension_python.sh",
)
@pytest.mark.filterwarnings("ignore")  # of what mamba_ssm imports
def test_the_reference_of_mamba_ssm_takes_part_without_its_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mamba_ssm", "mamba_ssm.ops.selective_scan_interface"):
        monkeypatch.delitem(sys.modules, name)
    offered = contestants._mamba_ssm()
    assert isinstance(offered, contestants.Contestant), offered
    assert not {"mamba_ssm", "selective_scan_cuda", "causal_conv1d_cuda"} & set(sys.modules), "others see none of it"
    case = Case("selective_scan", 2, 7, 5, 3, "fp32")
    given = inputs(case, torch.float32, torch.device("cpu"))
    y = offered.restore(offered.run(*(offered.arrange(x) for x in given)))
    torch.testing.assert_close(y, ALL_OPS["selective_scan"].run(*given), rtol=1e-4, atol=1e-5)


@pytest.fixture
def two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of two layers, and memory that needs no process to measure."""
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=2))
    for module in (model, length):
        monkeypatch.setattr(module, "step_peak", lambda subject, threads: Peak(500.0, 20.0))


def found(arguments: list[str], tmp_path: Path) -> dict[str, Any]:
    """What a command wrote as JSON."""
    file = tmp_path / "found.json"
    assert famba([*arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


class Clock:
    """A clock that contestants set forward."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contestant(self, name: str, seconds: Iterator[float]) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now += next(seconds)

        return run


def test_contestants_take_turns_and_the_warm_up_does_not_count() -> None:
    clock = Clock()
    race = Race(
        "race",
        {
            "a": clock.contestant("a", iter([9.0, 0.001, 0.003, 0.002, 0.100])),
            "b": clock.contestant("b", iter([9.0, 0.010, 0.020, 0.040, 0.030])),
        },
        clock=HostClock(CPU, clock),
    )
    race.run(4)
    assert clock.calls == ["a", "b"] * 5
    assert race.times["a"].samples_ms == pytest.approx([1, 3, 2, 100])
    assert race.times["a"].median_ms == pytest.approx(2.5), "one slow round does not move the median"
    assert race.times["b"].median_ms == pytest.approx(25)
    assert race.times["b"].quartiles_ms == pytest.approx([17.5, 32.5])


def test_an_interrupted_race_keeps_what_it_has() -> None:
    clock = Clock()

    def interrupted(seconds: list[float]) -> Iterator[float]:
        yield from seconds
        raise KeyboardInterrupt

    race = Race(
        "race",
        {"a": clock.contestant("a", iter([1.0, 1.0, 2.0])), "b": clock.contestant("b", interrupted([1.0]))},
        clock=HostClock(CPU, clock),
    )
    with pytest.raises(KeyboardInterrupt):
        race.run(2)
    assert race.times == {"a": Times((1000.0,))}, "b has no sample yet"


def test_one_sample_is_its_own_quartiles_and_ratios_need_both() -> None:
    assert Times((3.0,)).quartiles_ms == (3.0, 3.0)
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(None, 2.0) is None
    assert ratio(3.0, None) is None


def test_tables_show_quartiles_and_leave_out_empty_columns() -> None:
    table = Table("Title", {"name": "name", "step ms": "step_ms", "bytes": "saved_bytes", "x": "of", "none": "absent"})
    table.rows = [
        {"name": "a", **Times((10.0, 20.0, 30.0)).entries("step_ms"), "saved_bytes": 1234567, "of": 0.5},
        {"name": "b", **Times((1234.5,)).entries("step_ms")},
    ]
    lines = table.text().splitlines()
    assert lines[2].split() == ["name", "step", "ms", "bytes", "x"]
    assert lines[4].split() == ["a", "20.0", "(15.0-25.0)", "1,234,567", "0.500"]
    assert lines[5].split() == ["b", "1234", "(1234-1234)", "-", "-"]


def test_reasons_are_said_once() -> None:
    report = Report("ops", {}, {})
    report.leave_out({"a": "no"})
    report.leave_out({"a": "no", "b": "no"})
    assert report.left_out == ["a: no", "b: no"]


@pytest.mark.parametrize(
    ("counts", "place"), [((0, 0), "before_mixer"), ((3, 2), "before_mixer"), ((3, 2), "after_scan")]
)
def test_products_are_those_that_a_step_computes(counts: tuple[int, ...], place: str) -> None:
    vim = timm.create_model(
        "vim_micro_patch4_32", img_size=16, embed_dim=32, depth=2, num_classes=7, fusion=counts, fusion_place=place
    )
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        vim(torch.randn(3, 3, 16, 16)).sum().backward()
    kinds = (aten.mm, aten.addmm, aten.convolution, aten.convolution_backward)
    seen = counter.get_flop_counts()["Global"]
    linears = step_linears(vim, batch=3)
    assert sum(one.flops for one in linears) == sum(seen.get(kind, 0) for kind in kinds)
    with FlopCounterMode(display=False) as counter:
        Products(linears, torch.float32, CPU)()
    assert counter.get_flop_counts()["Global"] == {aten.mm: sum(one.flops for one in linears)}


def test_products_are_forward_then_backward_into_memory_allocated_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    products = Products([Linear(5, 4, 3), Linear(2, 6, 7, needs_dx=False)], torch.float32, CPU)
    seen: list[tuple[tuple[int, ...], int]] = []
    multiply = torch.mm

    def mm(left: Tensor, right: Tensor, out: Tensor) -> None:
        multiply(left, right, out=out)
        torch.testing.assert_close(out, left @ right)
        seen.append(((*left.shape, right.shape[1]), out.data_ptr()))

    monkeypatch.setattr(torch, "mm", mm)
    products()
    products()
    assert [shape for shape, _ in seen[:5]] == [(5, 4, 3), (2, 6, 7), (7, 2, 6), (5, 3, 4), (3, 5, 4)]
    assert seen[5:] == seen[:5]


def test_ops_are_timed_on_every_usable_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = found([*OPS, "--dtype", "fp32", "bf16"], tmp_path)
    rows = told["ops"]
    assert {(r["op"], r["precision"]) for r in rows if r["contestant"] == "reference"} == {
        (op, precision) for op in USUAL_OPS for precision in ("fp32", "bf16")
    }
    for row in rows:
        assert len(row["forward_ms_samples"]) == len(row["both_ms_samples"]) == 2
        assert (row["batch"], row["length"], row["channels"]) == (2, 9, 6)
        assert row["forward_of_fastest"] >= 1
    for op in USUAL_OPS:
        assert min(r["both_of_fastest"] for r in rows if r["op"] == op) == 1
    assert told["complete"]
    assert told["benchmark"] == "ops"
    assert {"native_isa", "threads", "famba", "git_commit", "started", "device", "packages"} <= set(told["provenance"])
    out, progress = capsys.readouterr()
    assert "mamba.py: mambapy is not installed" in out
    assert "mamba-ssm reference: mamba_ssm.ops.selective_scan_interface.selective_scan_ref cannot be imported" in out
    assert f"torch {metadata.version('torch')}" in out
    assert "it/s" not in out
    assert "selective_scan fp32" in progress


def test_the_default_has_the_size_that_is_quoted() -> None:
    from famba.cli import _parser

    options = _parser().parse_args(["benchmark", "ops"])
    assert (8, 197, 384, 16) in {
        (b, n, options.channels, options.states) for b in options.batch for n in options.length
    }


def _scan(decay: Tensor, drive: Tensor) -> Tensor:
    """States after each step, (b, l, d, n)."""
    state, states = torch.zeros_like(drive[:, 0]), []
    for rate, more in zip(decay.unbind(1), drive.unbind(1), strict=True):
        state = rate * state + more
        states.append(state)
    return torch.stack(states, 1)


def _selective_scan_ref(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """As mamba-ssm has it: channels before length."""
    decay = torch.exp(torch.einsum("bdl,dn->bldn", delta, A))
    states = _scan(decay, torch.einsum("bdl,bnl,bdl->bldn", delta, B, u))
    return torch.einsum("bldn,bnl->bdl", states, C) + D[:, None] * u


def _install(monkeypatch: pytest.MonkeyPatch, module: str, name: str, function: Callable[..., Tensor]) -> None:
    stub = ModuleType(module)
    setattr(stub, name, function)
    monkeypatch.setitem(sys.modules, module.split(".")[0], ModuleType(module.split(".")[0]))
    if module.count(".") > 1:
        monkeypatch.setitem(sys.modules, module.rsplit(".", 1)[0], ModuleType(module.rsplit(".", 1)[0]))
    monkeypatch.setitem(sys.modules, module, stub)


def test_other_libraries_take_part_in_their_own_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "mambapy.pscan", "pscan", _scan)
    _install(monkeypatch, "mamba_ssm.ops.selective_scan_interface", "selective_scan_ref", _selective_scan_ref)
    told = found([*OPS, "--op", "selective_scan", "--dtype", "fp32"], tmp_path)
    assert {"reference", "mamba.py", "mamba-ssm reference"} <= {row["contestant"] for row in told["ops"]}
    assert not any("mamba.py" in line or "mamba-ssm" in line for line in told["left_out"])


def test_nothing_is_timed_where_results_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _install(monkeypatch, "mambapy.pscan", "pscan", lambda decay, drive: 1.01 * _scan(decay, drive))
    assert famba([*OPS, "--op", "selective_scan", "--dtype", "fp32"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "error: mamba.py and reference do not agree on selective_scan fp32 (2, 9, 6)" in err


def test_a_scan_that_needs_too_much_memory_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "mambapy.pscan", "pscan", _scan)
    monkeypatch.setattr(contestants, "memory_bytes", lambda device: 2**10)
    told = found([*OPS, "--op", "selective_scan", "--dtype", "fp32"], tmp_path)
    assert "mamba.py" not in {row["contestant"] for row in told["ops"]}
    assert any(line.startswith("mamba.py: keeps all states") and "(2, 9, 6)" in line for line in told["left_out"])


def test_ctrl_c_tells_what_has_been_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = iter(range(7))

    def time(self: HostClock, contestant: Callable[[], object], calls: int) -> float:
        contestant()
        if next(left, None) is None:
            raise KeyboardInterrupt
        return 5.0

    monkeypatch.setattr(HostClock, "time", time)
    file = tmp_path / "found.json"
    assert famba([*OPS, "--dtype", "fp32", "--json", str(file)]) == 130
    told = json.loads(file.read_text())
    assert not told["complete"]
    assert told["ops"][0]["forward_ms"] == 5.0
    out = capsys.readouterr().out
    assert "selective_scan" in out
    assert "Stopped before the end" in out


def test_memory_that_runs_out_is_an_error_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(*tensors: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory: tried to allocate 9 GiB")

    monkeypatch.setitem(ALL_OPS, "causal_conv1d", replace(ALL_OPS["causal_conv1d"], run=no_memory))
    assert famba([*OPS, "--op", "add_rms_norm", "causal_conv1d", "--dtype", "fp32"]) == 2
    out, err = capsys.readouterr()
    assert "add_rms_norm" in out
    assert "Stopped before the end" in out
    assert "error: out of memory (out of memory: tried to allocate 9 GiB); use a smaller batch or size" in err


@pytest.mark.usefixtures("two_layers")
def test_strategies_are_told_against_none_products_and_transformer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = found([*MODEL, "--model", "vim_tiny_patch16_224", "--fusion", "none", "upper"], tmp_path)
    rows = {row["contestant"]: row for row in told["times"]}
    assert list(rows) == ["none", "upper", "deit_tiny_patch16_224", "matrix products of none"]
    none, upper, products = rows["none"], rows["upper"], rows["matrix products of none"]
    assert none["step_of_none"] == 1
    assert upper["step_of_none"] == pytest.approx(upper["step_ms"] / none["step_ms"])
    assert none["step_of_products"] == pytest.approx(none["step_ms"] / products["step_ms"])
    assert upper["step_of_transformer"] == pytest.approx(upper["step_ms"] / rows["deit_tiny_patch16_224"]["step_ms"])
    assert none["images_per_s"] == pytest.approx(2000 / none["step_ms"])
    assert upper["inference_of_none"] == pytest.approx(upper["inference_ms"] / none["inference_ms"])
    assert "inference_ms" not in products
    # Of 4 patches and a class token 2 go in the first layer and 1 in the second.
    assert (none["token_layers"], upper["token_layers"]) == (1, pytest.approx((3 + 2) / 10))
    vim = timm.create_model("vim_tiny_patch16_224", img_size=32)
    assert products["flops"] == sum(one.flops for one in step_linears(vim, 2))

    kept = {row["contestant"]: row for row in told["memory"]}
    reference = kept["none, backend reference"]["saved_bytes"]
    assert kept["upper"]["saved_of_none"] == pytest.approx(kept["upper"]["saved_bytes"] / kept["none"]["saved_bytes"])
    assert kept["upper"]["saved_of_none"] < 1
    assert kept["none"]["saved_of_reference"] == pytest.approx(kept["none"]["saved_bytes"] / reference)
    assert (kept["none"]["peak_mib"], kept["none"]["step_mib"]) == (500, 20)
    out = capsys.readouterr().out
    for header in ("step ms", "x none", "x products", "x DeiT", "images/s", "token-layers", "saved per image", "peak"):
        assert header in out


@pytest.mark.usefixtures("two_layers")
def test_the_transformer_fuses_too_where_asked(tmp_path: Path) -> None:
    told = found([*MODEL, "--model", "vim_tiny_patch16_224", "--fusion", "upper", "--tome"], tmp_path)
    rows = {row["contestant"]: row for row in told["times"]}
    plain, fused = rows["deit_tiny_patch16_224"], rows["deit_tiny_patch16_224, upper"]
    assert fused["token_layers"] < plain["token_layers"] == 1
    assert fused["step_of_transformer"] == pytest.approx(fused["step_ms"] / plain["step_ms"])
    kept = {row["contestant"]: row["saved_bytes"] for row in told["memory"]}
    assert kept["deit_tiny_patch16_224, upper"] < kept["deit_tiny_patch16_224"]


@pytest.mark.usefixtures("two_layers")
def test_growth_is_told_by_the_token(tmp_path: Path) -> None:
    told = found(
        ["benchmark", "length", "--image-size", "32", "64", "--tokens", "34", "--rounds", "1", "--precision", "fp32"],
        tmp_path,
    )
    rows = {(row["model"], row["tokens"]): row for row in told["length"]}
    assert set(rows) == {(m, n) for m in ("vim_tiny_patch16_224", "deit_tiny_patch16_224") for n in (5, 17)}
    for (name, tokens), row in rows.items():
        assert row["batch"] == {5: 7, 17: 2}[tokens]
        assert row["step_us"] == pytest.approx(1000 * row["step_ms"] / (row["batch"] * tokens))
        assert row["step_growth"] == pytest.approx(row["step_us"] / rows[name, 5]["step_us"])
    vim = rows["vim_tiny_patch16_224", 17]
    assert vim["saved_growth"] == pytest.approx(1, abs=0.05), "a Vim keeps the same for each token"


def test_growth_is_told_by_197_tokens_where_they_are() -> None:
    plan = length.Plan("vim_tiny_patch16_224", (128, 224, 448, 896), 3152, ("fp32",), 1, 1, CPU)
    assert plan.base == 197
    assert [s.batch for (name, _), s in plan.subjects("fp32").items() if "vim" in name] == [48, 16, 4, 1]
    assert [length.tokens_of(s) for s in plan.image_sizes] == [65, 197, 785, 3137]


def test_fusing_is_a_share_of_the_layer(tmp_path: Path) -> None:
    arguments = ["--batch", "2", "--image-size", "96", "--rounds", "1", "--precision", "fp32", "bf16"]
    told = found(["benchmark", "fusion", *arguments], tmp_path)
    assert [row["r"] for row in told["fusion"]] == 2 * fusion.removed_in_a_layer("vim_tiny_patch16_224", 37)
    for row in told["fusion"]:
        assert row["share"] == pytest.approx(row["together_ms"] / row["layer_ms"])
        assert {"match_ms", "hidden_ms", "hidden_forward_ms", "residual_ms", "residual_forward_ms"} <= set(row)


def test_the_largest_counts_of_the_strategies() -> None:
    assert fusion.removed_in_a_layer("vim_tiny_patch16_224", 197) == [7, 10, 14]


def test_emulated_bfloat16_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_bf16", lambda device: False)
    assert machine.default_precisions(CPU) == ["fp32"]
    assert machine.precision_notes(["fp32"], CPU) == []
    assert "has no bfloat16 instructions; torch emulates them" in machine.precision_notes(["fp32", "bf16"], CPU)[0]
    monkeypatch.setattr(machine, "has_bf16", lambda device: True)
    assert machine.default_precisions(CPU) == ["fp32", "bf16"]
    assert machine.precision_notes(["fp32", "bf16"], CPU) == []


def test_a_step_learns_and_an_inference_does_not() -> None:
    step = Step(Subject("vim_micro_patch4_32", "upper", 2, 16, "bf16", "cpu"))
    before = [p.detach().clone() for p in step.model.parameters()]
    step.infer()
    assert all(torch.equal(p, q) for p, q in zip(step.model.parameters(), before, strict=True))
    step.train()
    learned = [not torch.equal(p, q) for p, q in zip(step.model.parameters(), before, strict=True)]
    assert sum(learned) > len(learned) / 2, "the rate is so small that ones stay ones"
    assert sum(step.model.fusion) == 14  # 6/7 of 16 patches


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    peak = step_peak(Subject("vim_micro_patch4_32", "none", 32, 32, "fp32", "cpu"), threads=1)
    assert peak is not None
    assert peak.peak_mib > peak.step_mib > 5


@pytest.mark.parametrize("exitcode", [-9, 1])
def test_a_measuring_process_that_dies(exitcode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver, process, context = Mock(), Mock(exitcode=exitcode), Mock()
    receiver.recv.side_effect = EOFError
    context.Pipe.return_value = receiver, Mock()
    context.Process.return_value = process
    monkeypatch.setattr(memory.multiprocessing, "get_context", lambda method: context)
    subject = Subject("vim_micro_patch4_32", "none", 32, 32, "fp32", "cpu")
    if exitcode == -9:
        assert step_peak(subject, 1) is None, "Linux ends so what wants more memory than there is"
    else:
        with pytest.raises(TrainingError, match="failed with status 1"):
            step_peak(subject, 1)


def test_quick_is_less_but_takes_what_is_asked_for(tmp_path: Path) -> None:
    small = ["--length", "7", "--op", "add_rms_norm", "--dtype", "fp32", "--quick"]
    told = found(["benchmark", "ops", "--channels", "4", *small], tmp_path)
    assert [told["settings"][name] for name in ("batch", "length", "rounds")] == [[8], [7], 3]


def test_threads_hold_for_the_benchmark_alone(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    told = found([*OPS, "--op", "add_rms_norm", "--dtype", "fp32", "--threads", "2"], tmp_path)
    assert told["provenance"]["threads"] == told["settings"]["threads"] == 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--rounds", "0"], "--rounds is 0; allowed: whole numbers from 1"),
        (["ops", "--length", "65", "-3"], "--length is -3; allowed: whole numbers from 1"),
        (["ops", "--op", "selective_scam"], "unknown op 'selective_scam', did you mean 'selective_scan'?"),
        (["model", "--model", "vim_tinny_patch16_224"], "did you mean 'vim_tiny_patch16_224'?"),
        (["model", "--fusion", "uper"], "unknown fusion 'uper', did you mean 'upper'?"),
        (["model", "--precision", "fp23"], "unknown precision 'fp23', did you mean 'fp32'?"),
        (["length", "--image-size", "100"], "--image-size is 100; allowed: multiples of 16"),
        (["length", "--tokens", "0"], "--tokens is 0"),
        (["fusion", "--threads", "0"], "--threads is 0"),
        (["fusion", "--device", "tpu"], "unknown --device 'tpu'"),
        (["fusion", "--json", "/nowhere/found.json"], "--json /nowhere/found.json cannot be written"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert famba(["benchmark", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
