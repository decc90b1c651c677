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

from famba.analysis.benchmark import gpu, ops, timing
from famba.analysis.benchmark.report import BEGIN, END, filled, table
from famba.analysis.benchmark.steps import Contestant, TimedStep, loop_ms
from famba.analysis.benchmark.timing import Race
from famba.cli import main as famba
from famba.training import graph
from famba.training.trainer import Training

Patch, Printed = pytest.MonkeyPatch, pytest.CaptureFixture[str]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DOCS = Path(__file__).parents[1] / "docs" / "performance.md"
OPS = ["ops", "--batch", "2", "--length", "9", "--rounds", "2", "--precision", "fp32"]
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


def test_a_floor_is_the_bytes_or_the_exponentials(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setitem(ops.BOARDS, "H100 80GB HBM3", (1e6, 1e3))
    x = torch.randn(250, requires_grad=True)  # 1,000 bytes
    square = ops.Built(torch.square, [x], [])
    assert ops._floors_ms(square, [x], CUDA) == pytest.approx({"forward": 2, "both": 2 + 3})
    assert ops._floors_ms(square._replace(exponentials=7), [x], CUDA) == pytest.approx({"forward": 7, "both": 14})
    assert ops._floors_ms(square, [x], CPU) is None
    assert ops.Case("selective_scan", 2, 3, 5, 7).built().exponentials == 2 * 3 * 5 * 7


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
    told = found(tmp_path, *OPS, "--precision", "fp32", "bf16")
    rows = told["tables"]["Ops"]
    by_reference = {(r["op"], r["precision"], r["mode"]) for r in rows if r["contestant"] == "reference"}
    both = {(op, dtype, mode) for op in ops.OPS for dtype in ("fp32", "bf16") for mode in ("forward", "both")}
    assert by_reference == {case for case in both if case[::2] != ("match_tokens", "both")}
    assert all(len(row["ms_samples"]) == 2 and row["of_fastest"] >= 1 for row in rows)
    out, progress = capsys.readouterr()
    assert "mamba_ssm" in told["left_out"]
    assert "Left out: mamba_ssm: " in out
    assert "selective_scan 2 9 384 16 fp32: reference, both" in progress


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


def small(*more: str) -> Contestant:
    return Contestant("none", "vim_micro_patch4_32", "upper", 4, 32, "fp32", (*TINY, "fusion.budget=4", *more))


def test_a_replay_does_the_step_once_more(monkeypatch: Patch) -> None:
    monkeypatch.setattr(graph, "_DEVICES", ["cuda", "cpu"])
    once, twice = (TimedStep(small("recipe.mixup=0", "model.drop_path=0").config(CPU)) for _ in range(2))
    before = [p.detach().clone() for p in once.model.parameters()]
    once.train()
    twice.train()
    assert not any(torch.equal(p, q) for p, q in zip(once.model.parameters(), before, strict=True)), "it learns"
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
    assert none["images_per_s"] == pytest.approx(2000 / none["loop_ms"])
    assert none["reserved_MiB"] == 8
    (reason,) = [reason for name, reason in told["left_out"].items() if "broken" in name]
    assert "mixup and cutmix pair the images" in reason, "what fails does not keep the rest from being measured"
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


def test_the_tables_of_a_gpu_are_those_of_the_documents() -> None:
    titles = [title for title, _ in gpu.blocks(CPU)]
    assert titles == [gpu.TITLE, "timm's DeiT-Ti", "Ops", "Vim-Ti, patches of 4", "Vim-Ti, 785 tokens", "Vim-S"]
    for _, contestants in gpu.blocks(CPU):
        for one in contestants:
            one._replace(precision="fp32").config(CPU)
    filled(DOCS, "")


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_a_page_without_the_markers_is_left_alone(text: str, tmp_path: Path, capsys: Printed) -> None:
    file = tmp_path / "page.md"
    file.write_text(text)
    assert famba(["benchmark", "gpu", "--from", "found.json", "--fill", str(file)]) == 2
    assert f"expected one line {BEGIN} and below it one line {END}" in capsys.readouterr().err
    assert file.read_text() == text


def test_a_table_leaves_out_what_no_row_has() -> None:
    rows = [{"name": "a", "ms": 12.345, "ms_samples": [1.0, 2.0], "n": 1234567}, {"name": "b", "ms": 1234.5, "x": None}]
    lines = [line.split() for line in table(rows, "simple").splitlines()]
    assert lines == [["name", "ms", "n"], lines[1], ["a", "12.3", "1,234,567"], ["b", "1,234", "-"]]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("ops --rounds 0", "argument --rounds: 0; allowed: whole numbers from 1"),
        ("ops --op selective_scam", "invalid choice: 'selective_scam'"),
        ("ops --precision fp16 --device cpu", "error: fp16 is timed on CUDA devices alone, this is a cpu device"),
        ("ops --length 2", "error: --length is 2; match_tokens and fuse_tokens need 3 tokens"),
        ("model --device tpu", "error: unknown --device 'tpu'"),
        ("model --json /nowhere/found.json", "error: --json /nowhere/found.json cannot be written"),
        ("gpu --from README.md", "error: --from README.md is not what famba benchmark gpu --json writes"),
        ("gpu --fill /nowhere.md", "error: --fill /nowhere.md cannot be read"),
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
