"""Test what `famba benchmark` times and makes of the times, with a stand-in for a GPU where it needs one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from famba.analysis.benchmark import floors, gpu, models, ops, timing
from famba.analysis.benchmark.floors import Work, floor_ms
from famba.analysis.benchmark.report import BEGIN, END, Report, filled, table
from famba.analysis.benchmark.steps import Contestant, TimedStep, loop_ms
from famba.analysis.benchmark.timing import Race
from famba.cli import main as famba
from famba.ops import use_backend
from famba.training import graph
from famba.training.trainer import Training

Patch, Printed = pytest.MonkeyPatch, pytest.CaptureFixture[str]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DOCS = Path(__file__).parents[1] / "docs" / "performance.md"
OPS = ["ops", "--batch", "2", "--length", "9", "--channels", "6", "--states", "3", "--rounds", "2", "--dtype", "fp32"]
SMALL = ["--image-size", "32", "--rounds", "2", "--precision", "fp32"]
TINY = ("model.depth=2", "model.embed_dim=16", "model.d_state=2")
aten = torch.ops.aten


def found(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Return what a command wrote as JSON."""
    file = tmp_path / "found.json"
    assert famba(["benchmark", *arguments, "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.fixture
def tiny(monkeypatch: Patch) -> None:
    """Let every contestant be a tiny model."""
    config, less = Contestant.config, {"v": TINY, "d": TINY[:1]}
    monkeypatch.setattr(
        Contestant, "config", lambda one, at: config(one._replace(more=one.more + less[one.model[0]]), at)
    )


class Clock:
    """A host and a device whose time contestants set forward; the device falls behind unless it is waited for."""

    def __init__(self, monkeypatch: Patch) -> None:
        self.host = self.device = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(timing, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "Event", self.event)

    def wait(self, device: torch.device) -> None:
        self.host = self.device = max(self.host, self.device)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        made = SimpleNamespace(elapsed_time=lambda end: 1000 * (end.at - made.at))
        made.record = lambda: setattr(made, "at", max(self.host, self.device))
        return made

    def contestant(self, name: str, launch: Iterator[float], work: float = 0.0) -> Callable[[], None]:
        """Take the host so many seconds to launch, call by call, and the device so many to work."""

        def run() -> None:
            self.calls.append(name)
            self.host += next(launch)
            self.device = max(self.host, self.device) + work

        return run


def test_contestants_take_turns_and_the_warm_up_does_not_count(monkeypatch: Patch) -> None:
    clock = Clock(monkeypatch)
    race = Race("race", CPU)
    race.enter("a", [clock.contestant("a", iter([9.0, 0.001, 0.003, 0.100]))])
    race.enter("b", [clock.contestant("b", iter([9.0, 0.010, 0.020, 0.040]))])
    race.run(3)
    assert clock.calls == ["a", "a", "b", "b", "a", "b", "a", "b"]
    assert race.samples["a"]["ms"] == pytest.approx([1, 3, 100])
    assert race.entries("a")["ms"] == pytest.approx(3), "one slow round does not move the median"
    assert race.entries("b", "step_")["step_ms"] == pytest.approx(20)


def test_on_cuda_kernels_calls_and_launches_are_told_apart(monkeypatch: Patch) -> None:
    """An op whose kernels take 1 ms and whose launch takes 4 ms, on three copies of its inputs."""
    clock = Clock(monkeypatch)
    forever = iter(lambda: 0.004, None)
    calls = [clock.contestant("eager", forever, work=0.001) for _ in range(3)]
    replay = clock.contestant("graph", iter(lambda: 0.0001, None), work=0.003)
    monkeypatch.setattr(timing, "captured", lambda function, memory: replay)
    monkeypatch.setattr(timing, "graph_memory", lambda device: None)
    monkeypatch.setattr(timing, "_kernels", lambda call, device: {"scan": (0.7, 2), "copy": (0.3, 1)})
    race = Race("race", CUDA)
    race.enter("op", calls)
    race.run(2)
    row = race.entries("op")
    assert row["ms"] == pytest.approx(1, rel=0.1), "a replay holds one call for each copy"
    assert row["eager_ms"] == pytest.approx(4, rel=0.1), "between two calls the device waits for the host"
    assert row["host_ms"] == pytest.approx(4), "which does not wait for the device"
    assert (row["kernels_ms"], row["launches"]) == (1.0, 3)
    race.enter("step", calls[:1], graph=clock.contestant("step", iter(lambda: 0.0, None), work=0.002))
    assert race.entries("step")["ms"] == pytest.approx(2), "a graph that is given is not captured anew"


def test_inputs_rotate_among_copies_that_exceed_the_cache(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=10_000))
    tensors = [torch.randn(100, requires_grad=True), torch.randn(150)]
    copies = ops._copies(tensors, CUDA)
    assert len(copies) * 1000 > 2 * 10_000
    assert len({copy[0].data_ptr() for copy in copies}) == len(copies)
    assert all(copy[0].requires_grad and not copy[1].requires_grad for copy in copies)
    assert len(ops._copies([torch.randn(1)], CUDA)) == 256


def test_kernels_are_grouped_by_their_names() -> None:
    names = {
        "scans": ["scan_backward", "void selective_scan_fwd_kernel<Selective_Scan_fwd_kernel_traits<128, 8>>"],
        "convolutions": ["_conv_forward", "_conv_sums"],
        "matrix products": ["nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT", "sm90_xmma_fprop_implicit_gemm_bf16"],
        "matching and fusing": ["_closest_partners", "_places", "_fuse_backward"],
        "norms": ["_norm_backward"],
        "optimizer, clipping": ["void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>"],
        "reductions": ["void at::native::reduce_kernel<512, 1>"],
        "casts, copies, elementwise": ["void at::native::vectorized_elementwise_kernel<4>", "Memcpy DtoD"],
        "other": ["something"],
    }
    race = Race("race", CUDA)
    race.kernels["none"] = {name: (1.0, 2) for group in names.values() for name in group}
    rows = {row["part"]: (row["none_ms"], row["none_launches"]) for row in gpu.grouped(race)}
    assert rows == {part: (len(group), 2 * len(group)) for part, group in names.items()}


def test_ops_are_timed_on_every_usable_backend(tmp_path: Path, capsys: Printed) -> None:
    told = found(tmp_path, *OPS, "--op", *ops.OPS, "--dtype", "fp32", "bf16")
    rows = told["tables"]["Ops"]
    by_reference = {(r["op"], r["precision"], r["mode"]) for r in rows if r["contestant"] == "reference"}
    both = {(op, dtype, mode) for op in ops.OPS for dtype in ("fp32", "bf16") for mode in ("forward", "both")}
    assert by_reference == {case for case in both if case[::2] != ("match_tokens", "both")}
    assert all(len(row["ms_samples"]) == 2 and row["of_fastest"] >= 1 for row in rows)
    out, progress = capsys.readouterr()
    assert "mamba_ssm" in told["left_out"]
    assert "Left out: mamba_ssm: " in out
    assert "selective_scan 2 9 6 3 fp32: reference, both" in progress


def test_what_differs_from_the_reference_is_not_timed(tmp_path: Path, monkeypatch: Patch) -> None:
    by = ops._by
    monkeypatch.setattr(ops.ops, "backends", lambda: {"reference": None, "wrong": None})
    monkeypatch.setattr(ops, "obstacle", lambda *asked: None)

    def wrong(name: str, run: Callable[..., Any], *given: Tensor) -> tuple[Tensor, ...]:
        return tuple((1.01 if name == "wrong" else 1) * y for y in by("reference", run, *given))

    monkeypatch.setattr(ops, "_by", wrong)
    told = found(tmp_path, *OPS, "--op", "selective_scan")
    assert {row["contestant"] for row in told["tables"]["Ops"]} == {"reference"}
    assert "its relative error is 1.0e-02" in told["left_out"]["wrong"]


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (torch.OutOfMemoryError("out of memory: tried 9 GiB"), 2)]
)
def test_what_ends_it_loses_nothing(
    error: BaseException, status: int, tmp_path: Path, monkeypatch: Patch, capsys: Printed
) -> None:
    monkeypatch.setitem(ops.OPS, "causal_conv1d", Mock(side_effect=error))
    file = tmp_path / "found.json"
    assert famba(["benchmark", *OPS, "--json", str(file)]) == status
    told = json.loads(file.read_text())
    assert not told["complete"]
    assert {row["op"] for row in told["tables"]["Ops"]} == {"selective_scan"}
    out, err = capsys.readouterr()
    assert "Stopped before the end" in out
    assert status == 130 or "tried 9 GiB" in err


@pytest.mark.usefixtures("tiny")
def test_strategies_are_told_against_none_products_and_transformer(tmp_path: Path) -> None:
    told = found(tmp_path, "model", "--batch", "2", *SMALL, "--model", "vim_tiny_patch16_224", "--fusion", "upper")
    (rows,) = told["tables"].values()
    by = {row["contestant"]: row for row in rows}
    assert list(by) == ["none", "upper", "deit_tiny_patch16_224", models.PRODUCTS]
    none, upper, products = by["none"], by["upper"], by[models.PRODUCTS]
    assert none["of_products"] == pytest.approx(none["ms"] / products["ms"])
    assert upper["inference_of_none"] == pytest.approx(upper["inference_ms"] / none["inference_ms"])
    assert products["inference_of_none"] is None
    # Of 4 patches and a class token 2 go in the first layer and 1 in the second.
    assert (none["token_layers"], upper["token_layers"]) == (1, pytest.approx((3 + 2) / 10))
    assert upper["saved_of_none"] == pytest.approx(upper["saved_bytes_per_image"] / none["saved_bytes_per_image"])
    assert upper["saved_of_none"] < 1


@pytest.mark.usefixtures("tiny")
def test_growth_is_told_by_the_token(tmp_path: Path) -> None:
    told = found(tmp_path, "length", "--image-size", "32", "64", *SMALL[2:], "--tokens", "34")
    for title, rows in told["tables"].items():
        assert title.startswith(("vim_tiny_patch16_224", "deit_tiny_patch16_224"))
        assert [(row["tokens"], row["batch"]) for row in rows] == [(5, 6), (17, 2)], "mixing pairs images"
        assert [row["time_of_base"] for row in rows] == [1, rows[1]["us_per_token"] / rows[0]["us_per_token"]]
        assert rows[1]["us_per_token"] == pytest.approx(1000 * rows[1]["ms"] / 34)
    assert next(iter(told["tables"].values()))[1]["saved_of_base"] == pytest.approx(1, abs=0.2), "a Vim is linear"


def test_fusing_is_a_share_of_the_layer(tmp_path: Path) -> None:
    told = found(tmp_path, "fusion", "--batch", "2", "--image-size", "224", "--rounds", "1", "--precision", "fp32")
    (rows,) = told["tables"].values()
    assert [row["r"] for row in rows] == [7, 10, 14]
    assert all(row["share"] == pytest.approx(row["all_ms"] / row["layer_ms"]) and row["match_ms"] > 0 for row in rows)


def small(*more: str) -> Contestant:
    return Contestant("none", "vim_micro_patch4_32", "upper", 4, 32, "fp32", (*TINY, "fusion.budget=4", *more))


def test_a_step_learns_and_an_inference_does_not() -> None:
    step = TimedStep(small().config(CPU))
    before = [p.detach().clone() for p in step.model.parameters()]
    step.infer()
    assert all(torch.equal(p, q) for p, q in zip(step.model.parameters(), before, strict=True))
    step.train()
    assert not any(torch.equal(p, q) for p, q in zip(step.model.parameters(), before, strict=True))
    assert sum(step.model.fusion) == 4


def test_a_replay_does_the_step_once_more(monkeypatch: Patch) -> None:
    monkeypatch.setattr(graph, "_DEVICES", ["cuda", "cpu"])
    once, twice = (TimedStep(small("recipe.mixup=0", "model.drop_path=0").config(CPU)) for _ in range(2))
    once.train()
    twice.train()
    assert all(torch.equal(p, q) for p, q in zip(once.model.parameters(), twice.model.parameters(), strict=True))
    once.train()
    twice.step.replay()
    assert all(torch.equal(p, q) for p, q in zip(once.model.parameters(), twice.model.parameters(), strict=True))


def test_the_loop_is_that_of_a_run(monkeypatch: Patch) -> None:
    runs = []
    run = Training.run
    monkeypatch.setattr(Training, "run", lambda self: runs.append(self) or run(self))
    milliseconds = loop_ms(small().config(CPU))
    (training,) = runs
    assert training.state.step == 40
    totals = training.state.totals
    assert milliseconds == pytest.approx(1000 * (totals.epoch_step_s + totals.epoch_data_s) / 20)
    assert milliseconds < 1000 * totals.step_s / 20, "the first epoch, which compiles and captures, does not count"
    assert not training.folder.path.exists()


def test_the_slowest_unit_decides(monkeypatch: Patch) -> None:
    board = Work(1e9, 1e12, 1e10, 1e9)
    assert floor_ms([Work(3_000_000, 2_000_000_000, 20_000_000, 1_000_000)], board, "bf16") == pytest.approx(3)
    assert floor_ms([Work(3_000_000, 5_000_000_000, 20_000_000, 1_000_000)], board, "bf16") == pytest.approx(5)
    assert floor_ms([Work(3_000_000, 0, 70_000_000, 1_000_000)], board, "bf16") == pytest.approx(7)
    assert floor_ms([Work(0, 0, 0, 9_000_000), Work(1_000_000)], board, "bf16") == pytest.approx(10)
    assert floor_ms([Work(0, 10**9)], board, "fp32") == pytest.approx(50), "without tensor cores"
    assert floors.floor_here([Work(1)], CPU, "bf16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert floors.floor_here([Work(3_350_000_000)], CUDA, "bf16") == pytest.approx(1)
    assert floors.scan(2, 3, 5, 7, item=2)[0].special == 2 * 3 * 5 * 7, "exponentials"
    assert floors.scan(2, 3, 5, 7, item=2, inner=True, k=2)[0].special == 2 * 2 * 3 * 5 * (7 + 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("op", [name for name in ops.OPS if name != "bidirectional_mixer"])
def test_the_floor_counts_what_goes_in_and_out(op: str, precision: str) -> None:
    built = ops.Case(op, 2, 30, 5, 3, precision).built()
    with torch.no_grad(), use_backend("reference"):
        results = ops._by("reference", built.run, *built.learned, *built.fixed)
    given = sum(x.nbytes for x in (*built.learned, *built.fixed))
    out = sum(x.nbytes for x in results)
    assert [work.bytes for work in built.passes if not work.backward] == [given + out]
    if op in ("selective_scan", "causal_conv1d"):
        assert [work.bytes for work in built.passes if work.backward] == [2 * given + out], "inputs and all gradients"


def test_products_are_those_that_a_step_computes() -> None:
    vim = models.vim("vim_micro_patch4_32", "upper", img_size=32, embed_dim=32, depth=4, num_classes=7)
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        vim(torch.randn(3, 3, 32, 32)).sum().backward()
    seen = counter.get_flop_counts()["Global"]
    passes, linears = floors.step(vim, 3, 4)
    counted = sum(work.products for work in passes)
    kinds = (aten.mm, aten.addmm, aten.convolution, aten.convolution_backward)
    assert counted == sum(seen.get(kind, 0) for kind in kinds)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        models.products(linears, torch.float32, CPU)()
    assert counter.get_flop_counts()["Global"] == {aten.mm: counted}


def page(tmp_path: Path) -> Path:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return file


@pytest.fixture
def stand_in(monkeypatch: Patch, tiny: None) -> None:
    """A CPU that is taken for a GPU, and smaller sizes."""
    monkeypatch.setattr(gpu, "check", lambda device: None)
    monkeypatch.setattr(gpu, "cases", lambda: [ops.Case("causal_conv1d", 2, 9, 6, 3, "fp32")])
    asked = [Contestant(s, "vim_tiny_patch16_224", s, 2, 32, "fp32") for s in ("none", "upper")]
    broken = Contestant("broken", "vim_tiny_patch16_224", "none", 3, 32, "fp32")
    monkeypatch.setattr(gpu, "blocks", lambda device: [(gpu.TITLE, [*asked, broken]), ("Ops", [])])
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    for name, value in {"memory_reserved": 2**20, "max_memory_reserved": 9 * 2**20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)


@pytest.mark.usefixtures("stand_in")
def test_one_command_measures_a_gpu_and_fills_the_page(tmp_path: Path, capsys: Printed) -> None:
    file = page(tmp_path)
    told = found(tmp_path, "gpu", "--device", "cpu", "--rounds", "1", "--fill", str(file))
    none, upper = told["tables"]["Vim-Ti, 2 images of 32 pixels"]
    assert upper["of_none"] == pytest.approx(upper["loop_ms"] / none["loop_ms"])
    assert none["of_graph"] == pytest.approx(none["loop_ms"] / none["ms"])
    assert none["images_per_s"] == pytest.approx(2000 / none["loop_ms"])
    assert none["reserved_MiB"] == 8
    (reason,) = [reason for name, reason in told["left_out"].items() if "broken" in name]
    assert "mixup and cutmix pair the images" in reason, "what fails does not keep the rest from being measured"
    targets = {row["target"]: row for row in told["tables"]["Vim-Ti, targets"]}
    assert targets["upper, of_none"]["measured"] == upper["of_none"]
    assert targets["upper, of_none"]["met"] == "holds for H100"
    assert targets["all, of_none"]["met"] == "not measured"
    assert {row["op"] for row in told["tables"]["Ops"]} == {"causal_conv1d"}
    text = file.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\n`famba benchmark gpu` on ")
    assert text.endswith(f"{END}\nafter\n")
    assert "| none " in text
    capsys.readouterr()
    other = page(tmp_path)
    assert famba(["benchmark", "gpu", "--from", str(tmp_path / "found.json"), "--fill", str(other)]) == 0
    assert other.read_text() == text, "what one machine measured is shown on another as it was"


@pytest.mark.usefixtures("stand_in")
def test_a_gpu_is_measured_for_as_long_as_is_asked(tmp_path: Path, monkeypatch: Patch) -> None:
    now = iter(range(0, 10_000, 50))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(gpu, "loop_ms", lambda config: 1.0)
    told = found(tmp_path, "gpu", "--device", "cpu", "--rounds", "1", "--minutes", "3")
    assert [row["contestant"] for row in told["tables"]["Vim-Ti, 2 images of 32 pixels"]] == ["none"]
    assert told["left_out"]["causal_conv1d"] == "no time was left of --minutes 3"


@pytest.mark.parametrize(("device", "met"), [("NVIDIA H100 80GB HBM3", "True"), ("NVIDIA A100", "holds for H100")])
def test_targets_hold_for_one_gpu(device: str, met: str) -> None:
    rows = [{"contestant": "none", "ms": 70.0, "of_graph": 1.2}]
    told = [row["met"] for row in gpu.checked(rows, Report("gpu", {"device": device}, {}))]
    assert told[:2] == [met, met.replace("True", "False")]


def test_the_tables_of_a_gpu_are_those_of_the_documents() -> None:
    titles = [title for title, _ in gpu.blocks(CPU)]
    assert titles == [gpu.TITLE, "timm's DeiT-Ti", "Ops", "Vim-Ti, patches of 4", "Vim-Ti, 785 tokens", "Vim-S"]
    for _, contestants in gpu.blocks(CPU):
        for one in contestants:
            one._replace(precision="fp32").config(CPU)
    filled(DOCS, "")


def test_floors_are_filled_in_without_a_gpu(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(gpu, "cases", lambda: [ops.Case("causal_conv1d", 2, 9, 6, 3, "bf16")])
    file = page(tmp_path)
    assert famba(["benchmark", "gpu", "--floors", "--fill", str(file)]) == 0
    (row,) = [line for line in file.read_text().splitlines() if "vim_tiny_patch16_224, none" in line]
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["22.0", "10.4"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"benchmark": "gpu"}'])
def test_a_file_that_holds_no_report_is_refused(content: str | None, tmp_path: Path, capsys: Printed) -> None:
    file = tmp_path / "found.json"
    file.write_text(content) if content is not None else None
    assert famba(["benchmark", "gpu", "--from", str(file)]) == 2
    assert "is not what famba benchmark gpu --json writes" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_a_page_without_the_markers_is_left_alone(text: str, tmp_path: Path, capsys: Printed) -> None:
    file = tmp_path / "page.md"
    file.write_text(text)
    assert famba(["benchmark", "gpu", "--floors", "--fill", str(file)]) == 2
    assert f"expected one line {BEGIN} and below it one line {END}" in capsys.readouterr().err
    assert file.read_text() == text


def test_a_table_leaves_out_what_no_row_has() -> None:
    rows = [{"name": "a", "ms": 12.345, "ms_samples": [1.0, 2.0], "n": 1234567}, {"name": "b", "ms": 1234.5, "x": None}]
    lines = [line.split() for line in table("Title", rows, "simple").splitlines()]
    assert lines[2:] == [["name", "ms", "n"], lines[3], ["a", "12.3", "1,234,567"], ["b", "1,234", "-"]]


def test_quick_is_less_but_takes_what_is_asked_for(tmp_path: Path) -> None:
    asked = ["--channels", "4", "--length", "7", "--op", "add_rms_norm", "--dtype", "fp32", "--quick"]
    told = found(tmp_path, "ops", *asked)["settings"]
    assert [told[name] for name in ("batch", "length", "rounds")] == [[8], [7], 3]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("ops --rounds 0", "argument --rounds: 0; allowed: whole numbers from 1"),
        ("ops --op selective_scam", "invalid choice: 'selective_scam'"),
        ("model --fusion uper", "invalid choice: 'uper'"),
        ("length --image-size 100", "argument --image-size: 100; allowed: multiples of 16"),
        ("gpu --minutes 0.5", "argument --minutes: 0.5; allowed: whole numbers from 1"),
        ("ops --dtype fp16 --device cpu", "error: fp16 is timed on CUDA devices alone, this is a cpu device"),
        ("ops --op match_tokens --length 2", "error: --length is 2; match_tokens and fuse_tokens need 3 tokens"),
        ("fusion --device tpu", "error: unknown --device 'tpu'"),
        ("fusion --json /nowhere/found.json", "error: --json /nowhere/found.json cannot be written"),
        ("gpu --floors --json found.json", "error: --floors and --from measure nothing: leave out --json"),
        ("gpu --floors --from found.json", "error: --floors and --from measure nothing"),
        ("gpu --floors --fill /nowhere.md", "error: --fill /nowhere.md cannot be read"),
        ("gpu --device cpu", "error: famba benchmark gpu measures a CUDA device, and was given cpu"),
    ],
)
def test_what_cannot_be_is_said(command: str, message: str, capsys: Printed) -> None:
    try:
        status = famba(["benchmark", *command.split()])
    except SystemExit as error:  # of the parser
        status = error.code  # type: ignore[assignment]
    err = capsys.readouterr().err
    assert (status, err.count("\n") == 1) == (2, message.startswith("error: "))
    assert message in err
