"""What `famba benchmark` does on a CUDA device, as far as stand-ins for one show it, and the floors under its times."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch

from famba.analysis.benchmark import (
    command,
    contestants,
    gpu,
    gpu_tables,
    machine,
    memory,
    model,
    steps,
    timing,
    traffic,
)
from famba.analysis.benchmark.cases import OPS, Case, inputs, passes
from famba.analysis.benchmark.gpu_tables import BEGIN, END, filled
from famba.analysis.benchmark.memory import Peak
from famba.analysis.benchmark.peaks import _BOARDS, A100, H100, Peaks, peaks
from famba.analysis.benchmark.products import step_linears
from famba.analysis.benchmark.report import Report
from famba.analysis.benchmark.steps import Step, Subject
from famba.analysis.benchmark.timing import EventClock, HostClock, Race, clock_for
from famba.analysis.benchmark.traffic import (
    Work,
    floor_ms,
    forward_and_step,
    selective_scan,
    total_bytes,
)
from famba.cli import main as famba
from famba.fusion import tokens_per_layer
from famba.ops import reference, use_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DOCS = Path(__file__).parents[1] / "docs" / "performance.md"
H100_FOUND = DOCS.parent / "results" / "gpu" / "h100.json"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")


class Event:
    """A CUDA event whose time is known once the host has waited for the device."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.at: float | None = None
        self.waited = False

    def record(self, stream: object) -> None:
        assert stream is self._cuda.stream
        self.at = self._cuda.now
        self._cuda.pending.append(self)

    def elapsed_time(self, end: Event) -> float:
        assert all(event.waited for event in (self, end)), "an event's time is not known before the device is done"
        assert self.at is not None
        assert end.at is not None
        return end.at - self.at


class FakeCuda:
    """What an EventClock needs of torch.cuda, with a device whose time contestants set forward."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stream = object()
        self.pending: list[Event] = []
        self.waits = 0

    def Event(self, enable_timing: bool) -> Event:  # noqa: N802 - torch's name
        assert enable_timing
        return Event(self)

    def current_stream(self, device: torch.device) -> object:
        assert device == CUDA
        return self.stream

    def synchronize(self, device: torch.device) -> None:
        self.waits += 1
        for event in self.pending:
            event.waited = True
        self.pending.clear()

    def work(self, *milliseconds: float) -> Callable[[], None]:
        """A contestant that takes so long, call by call, the last for ever after."""
        left = list(milliseconds)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_short_calls_are_timed_several_at_once_with_one_wait() -> None:
    cuda = FakeCuda()
    clock = EventClock(CUDA, cuda=cuda)
    contestant = cuda.work(5000.0, 0.3)
    assert clock.warm_up(contestant) == 4, "1.2 ms, the least that is more than one millisecond"
    cuda.waits = 0
    assert clock.time(contestant, 4) == pytest.approx(0.3)
    assert cuda.waits == 1
    assert clock.warm_up(cuda.work(7.0)) == 1
    assert clock.warm_up(cuda.work(0.0)) == 100, "nothing takes for ever"


def test_what_lies_between_calls_counts() -> None:
    cuda = FakeCuda()
    assert EventClock(CUDA, cuda=cuda).time(cuda.work(0.1, 0.1, 0.4, 0.2), 4) == pytest.approx(0.2)


def test_overwriting_the_cache_is_done_before_each_call_and_not_timed() -> None:
    cuda = FakeCuda()
    done: list[str] = []

    def overwrite() -> None:
        done.append("overwrite")
        cuda.now += 100

    def contestant() -> None:
        done.append("call")
        cuda.now += 0.5

    assert EventClock(CUDA, overwrite, cuda).time(contestant, 3) == pytest.approx(0.5)
    assert done == ["overwrite", "call"] * 3
    assert cuda.waits == 1


def test_a_race_by_events_leaves_tuning_out() -> None:
    cuda = FakeCuda()
    contestants = {"a": cuda.work(9000.0, 2.0), "b": cuda.work(8000.0, 70.0, 3.0)}
    race = Race("race", contestants, clock=EventClock(CUDA, cuda=cuda))
    race.run(3)
    assert race.times["a"].samples_ms == pytest.approx([2, 2, 2])
    assert race.times["b"].samples_ms == pytest.approx([3, 3, 3])


def test_devices_with_events_are_timed_by_them() -> None:
    assert isinstance(clock_for(CUDA), EventClock)
    assert isinstance(clock_for(CPU), HostClock)


def fake_device(name: str, **properties: int) -> Any:
    return SimpleNamespace(
        get_device_name=lambda device: name, get_device_properties=lambda device: SimpleNamespace(**properties)
    )


@pytest.mark.parametrize(
    ("name", "found", "gb_per_s"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB", 2039),
        ("A100-SXM4-40GB", "A100 SXM 40 GB", 1555),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80 GB", 1935),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 3350),
        ("NVIDIA H100 PCIe", "H100 PCIe", 2000),
    ],
)
def test_known_devices_are_found_by_their_names(name: str, found: str, gb_per_s: int) -> None:
    known = peaks(CUDA, cuda=fake_device(name))
    assert known is not None
    assert (known.name, known.bandwidth) == (found, gb_per_s * 1e9)
    asked = peaks(CUDA, 1000, fake_device(name))
    assert asked is not None
    assert (asked.bandwidth, asked.products) == (1e12, known.products)


def test_of_other_devices_is_known_what_torch_or_the_user_tells() -> None:
    # Clock and width of an A100 with 40 GB.
    told = peaks(CUDA, cuda=fake_device("NVIDIA B1", memory_clock_rate=1_215_000, memory_bus_width=5120))
    assert told == Peaks("NVIDIA B1", pytest.approx(1555.2e9))
    assert peaks(CUDA, cuda=fake_device("NVIDIA B1")) is None
    assert peaks(CUDA, 700, fake_device("NVIDIA B1")) == Peaks("NVIDIA B1", 7e11)
    assert peaks(CPU) is None
    assert peaks(CPU, 20) == Peaks("cpu", 2e10)


@pytest.mark.parametrize("name", _BOARDS)
def test_published_peaks_fit_one_another(name: str) -> None:
    board = _BOARDS[name]
    lanes = 64 if name.startswith("A100") else 128  # float32 lanes of a multiprocessor
    assert board.vector is not None
    assert board.special is not None
    assert board.vector / board.special == pytest.approx(lanes / 16, rel=0.01)
    assert board.products["bf16"] / board.products["fp32"] == pytest.approx(15.5, rel=0.05)


def test_the_slowest_unit_decides() -> None:
    device = Peaks("d", bandwidth=1e9, products={"bf16": 1e12}, vector=1e10, special=1e9)
    assert Work(3_000_000, 2_000_000_000, 20_000_000, 1_000_000).floor_ms(device, "bf16") == pytest.approx(3)
    assert Work(3_000_000, 5_000_000_000, 20_000_000, 1_000_000).floor_ms(device, "bf16") == pytest.approx(5)
    assert Work(3_000_000, 0, 70_000_000, 1_000_000).floor_ms(device, "bf16") == pytest.approx(7)
    assert Work(3_000_000, 0, 0, 9_000_000).floor_ms(device, "bf16") == pytest.approx(9)
    unknown = Peaks("d", bandwidth=1e9)
    assert Work(3_000_000, 10**12, 10**12, 10**12).floor_ms(unknown, "bf16") == pytest.approx(3)
    assert floor_ms([Work(1_000_000), Work(2_000_000)], unknown, "bf16") == pytest.approx(3)


def test_a_scan_by_hand() -> None:
    """2 images, 3 tokens, 5 channels, 7 states in bf16."""
    found = selective_scan(2, 3, 5, 7, item=2)
    u = 2 * 3 * 5 * 2  # bytes, and as many of delta, y and their gradients
    B = 2 * 3 * 7 * 2  # bytes, and as many of C and their gradients
    A, D = 5 * 7 * 4, 5 * 4
    assert total_bytes(found.forward) == 3 * u + 2 * B + A + D
    assert total_bytes(found.backward) == 5 * u + 4 * B + 2 * (A + D)
    assert found.forward[0].special == found.backward[0].special == 2 * 3 * 5 * 7
    gated = selective_scan(2, 3, 5, 7, item=2, inner=True, directions=2)
    assert total_bytes(gated.forward) == 6 * u + 4 * B + 2 * (A + 2 * D), "z is read and y written once for both"
    assert gated.forward[0].special == 2 * 2 * 3 * 5 * (7 + 4)


def tensors_of(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs and outputs of an op."""
    given = inputs(case, dtype, CPU)
    with torch.no_grad(), use_backend("reference"):
        results = OPS[case.op].run(*given)
    return given, list(results) if isinstance(results, tuple) else [results]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d", "add_rms_norm", "match_tokens", "fuse_tokens"])
def test_a_forward_moves_its_inputs_and_outputs(op: str, precision: str) -> None:
    case = Case(op, 2, 30, 5, 3, precision)
    given, results = tensors_of(case, machine.DTYPES[precision])
    assert total_bytes(passes(case).forward) == sum(x.nbytes for x in (*given, *results))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d"])
def test_a_backward_moves_inputs_and_all_gradients(op: str, precision: str) -> None:
    case = Case(op, 2, 30, 5, 3, precision)
    given, results = tensors_of(case, machine.DTYPES[precision])
    assert total_bytes(passes(case).backward) == sum(x.nbytes for x in (*given, *given, *results))


@pytest.mark.parametrize("op", OPS)
def test_traffic_grows_with_the_batch_and_shrinks_with_the_dtype(op: str) -> None:
    def moved(batch: int, precision: str = "fp32") -> int:
        return total_bytes(passes(Case(op, batch, 197, 384, 16, precision)).both)

    assert moved(3) - moved(2) == moved(2) - moved(1) > 0, "all but the parameters is linear in the batch"
    # The residual, its sum and their gradients are float32 throughout.
    assert 0.49 < moved(32, "bf16") / moved(32) < (0.9 if op == "add_rms_norm" else 0.55)
    assert moved(32, "fp16") == moved(32, "bf16")


@pytest.mark.parametrize("op", [name for name in OPS if name != "match_tokens"])
def test_a_backward_moves_no_less_than_its_forward(op: str) -> None:
    found = passes(Case(op, 8, 197, 384, 16, "bf16"))
    assert total_bytes(found.backward) >= total_bytes(found.forward)


def vim(strategy: str, batch: int = 4) -> Any:
    with torch.device("meta"):
        return Subject("vim_tiny_patch16_224", strategy, batch, 224, "bf16", "meta").build()


def test_the_products_of_a_step_are_those_that_it_is_timed_against() -> None:
    built = vim("none")
    counted = sum(work.products for work in forward_and_step(built, 4, "bf16").both)
    assert counted == sum(linear.flops for linear in step_linears(built, 4))
    fused = vim("upper")
    counted = sum(work.products for work in forward_and_step(fused, 4, "bf16").both)
    assert counted == sum(linear.flops for linear in step_linears(fused, 4)), "similarities are no matrix products"


def test_similarities_are_counted_in_float32() -> None:
    (work,) = traffic.match_tokens(4, 197, 192, 14, 2).both
    assert work.products == 0
    assert work.vector == 4 * 98 * 98 * 192


@pytest.mark.parametrize("strategy", ["all", "interleaved", "lower", "upper"])
def test_a_strategy_saves_about_its_share_of_the_tokens(strategy: str) -> None:
    fused = vim(strategy)
    left = tokens_per_layer(fused.fusion, 197)
    share = sum(left) / (24 * 197)
    for board in (A100, H100):
        of_none, of_fused = (
            floor_ms(forward_and_step(one, 128, "bf16").both, board, "bf16") for one in (vim("none"), fused)
        )
        assert share < of_fused / of_none < share + 0.07


def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BATCH": 2, "LENGTH": 9, "CHANNELS": 6, "STATES": 3, "IMAGE_SIZE": 32}.items():
        monkeypatch.setattr(gpu_tables, name, value)


def cells(text: str, *row: str) -> dict[str, str]:
    """The row of a Markdown table that begins so, by its headers."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    place = next(n for n, line in enumerate(lines) if tuple(line[: len(row)]) == row)
    header = max(n for n in range(place) if set("".join(lines[n + 1])) <= {":", "-"})
    return dict(zip(lines[header], lines[place], strict=True))


def page(tmp_path: Path) -> Path:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return file


def test_the_tables_in_the_documentation_are_what_the_command_writes(capsys: pytest.CaptureFixture[str]) -> None:
    text = DOCS.read_text()
    assert famba(["benchmark", "gpu", "--from", str(H100_FOUND)]) == 0
    tables = capsys.readouterr().out.strip()
    assert filled(text, tables) == text, f"famba benchmark gpu --from {H100_FOUND} --fill docs/performance.md"
    found = {(row["op"], row["contestant"]): row for row in json.loads(H100_FOUND.read_text())["ops"]}
    scan = cells(text, "selective_scan", "forward")
    assert float(scan["triton"]) == pytest.approx(found["selective_scan", "triton"]["forward_ms"], rel=0.01)
    assert "stopped before the end" in tables
    assert cells(text, "vim_tiny", "none")["step"] == "not measured"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ('{"benchmark": "ops"}', "was not written by"),
        ('{"benchmark": "gpu"}', "or not in whole"),
    ],
)
def test_what_cannot_be_shown_again_is_said(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    if content is not None:
        file.write_text(content)
    assert famba(["benchmark", "gpu", "--from", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_floors_are_filled_in_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tables(monkeypatch)
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=4))
    file = page(tmp_path)
    assert famba(["benchmark", "gpu", "--floors", "--fill", str(file)]) == 0
    text = file.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "old" not in text
    assert "Floors alone, nothing measured" in text
    row = cells(text, "selective_scan", "forward")
    expected = passes(Case("selective_scan", 2, 9, 6, 3, "bf16")).forward[0].floor_ms(A100, "bf16")
    assert float(row["floor, A100 SXM 80 GB"]) == pytest.approx(expected, abs=1e-4)
    assert row["triton"] == row["mamba_ssm"] == "not measured"
    assert cells(text, "vim_small", "deit_small_patch16_224")["step"] == "not measured"
    assert famba(["benchmark", "gpu", "--floors", "--fill", str(file)]) == 0
    assert file.read_text() == text


@without_gpu
def test_without_a_gpu_nothing_is_measured_and_said_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = page(tmp_path)
    before = file.read_text()
    assert famba(["benchmark", "gpu", "--fill", str(file)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: famba benchmark gpu measures a CUDA device, and was given cpu")
    assert "--floors, which needs none" in err
    assert file.read_text() == before


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_a_file_without_the_markers_is_left_alone(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "page.md"
    file.write_text(text)
    assert famba(["benchmark", "gpu", "--floors", "--fill", str(file)]) == 2
    assert f"expected one line {BEGIN} and behind it one line {END}" in capsys.readouterr().err
    assert file.read_text() == text


class Stopwatch(HostClock):
    """An EventClock's stand-in on a CPU."""

    def __init__(self, device: torch.device, before: object = None) -> None:
        super().__init__(device)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is taken for an A100, small sizes, and models of four layers."""
    small_tables(monkeypatch)
    monkeypatch.setattr(gpu, "check_cuda", lambda device: None)
    monkeypatch.setattr(gpu, "EventClock", Stopwatch)
    monkeypatch.setattr(gpu, "overwriting_cache", lambda device: None)
    monkeypatch.setattr(command, "peaks", lambda device, gb_per_s: A100)
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=4))
    monkeypatch.setattr(model, "step_peak", lambda subject, threads: Peak(500.0, 20.0))
    for name in ("_mamba_ssm", "_mamba_py"):
        monkeypatch.setattr(contestants, name, lambda: "not asked")


@pytest.mark.usefixtures("stand_in")
def test_one_command_measures_and_fills_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, found = page(tmp_path), tmp_path / "found.json"
    command = ["benchmark", "gpu", "--device", "cpu", "--rounds", "1", "--fill", str(file), "--json", str(found)]
    assert famba(command) == 0
    told, text = json.loads(found.read_text()), file.read_text()
    assert {row["op"] for row in told["ops"]} == set(OPS)
    scan = next(r for r in told["ops"] if (r["op"], r["contestant"]) == ("selective_scan", "reference"))
    work = passes(Case("selective_scan", 2, 9, 6, 3, "bf16"))
    assert scan["both_bytes"] == total_bytes(work.both)
    assert scan["both_of_floor"] == pytest.approx(scan["both_ms"] / floor_ms(work.both, A100, "bf16"))
    moved = total_bytes(work.forward) / (scan["forward_ms"] / 1000)
    assert scan["forward_of_bandwidth"] == pytest.approx(moved / 2039e9)
    rows = {row["contestant"]: row for row in told["times"] if row["model"] == "vim_tiny_patch16_224"}
    none = rows["none"]
    flops = sum(linear.flops for linear in step_linears(timm.create_model("vim_tiny_patch16_224", img_size=32), 2))
    assert none["step_of_peak"] == pytest.approx(flops / (none["step_ms"] / 1000) / 312e12)
    assert none["step_of_floor"] == pytest.approx(none["step_ms"] / none["step_floor_ms"])
    assert none["inference_floor_ms"] < none["step_floor_ms"] < none["step_ms"]
    assert "step_floor_ms" not in rows["deit_tiny_patch16_224"]

    assert "nothing measured" not in text
    assert "stopped before the end" not in text
    assert "not measured" not in text
    assert f"Measured on {told['provenance']['device']}" in text
    assert f"commit {told['provenance']['git_commit']}" in text
    assert "Left out: " in text
    assert "none, backend triton" not in rows
    assert float(cells(text, "selective_scan", "forward")["reference"]) == pytest.approx(scan["forward_ms"], rel=0.01)
    assert cells(text, "selective_scan", "forward")["mamba_ssm"] == ""
    assert float(cells(text, "vim_tiny", "none")["step"]) == pytest.approx(none["step_ms"], rel=0.01)
    assert cells(text, "vim_tiny", "none")["peak MiB"] == "500"
    assert "of matmul peak" in capsys.readouterr().out


@pytest.mark.usefixtures("stand_in")
def test_what_is_interrupted_fills_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(plan: object, report: Report) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "benchmark_model", interrupted)
    file = page(tmp_path)
    before = file.read_text()
    assert famba(["benchmark", "gpu", "--device", "cpu", "--rounds", "1", "--fill", str(file)]) == 130
    assert file.read_text() == before


def test_backends_compete_on_the_unfused_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=2))
    monkeypatch.setattr(model, "step_peak", lambda subject, threads: Peak(500.0, 20.0))
    file = tmp_path / "found.json"
    sizes = ["--batch", "2", "--image-size", "32", "--rounds", "1", "--precision", "fp32", "--fusion", "none"]
    arguments = [*sizes, "--model", "vim_tiny_patch16_224", "--backend", "reference", "--json", str(file)]
    assert famba(["benchmark", "model", *arguments]) == 0
    told = json.loads(file.read_text())
    names = ["none", "none, backend reference", "deit_tiny_patch16_224", "matrix products of none"]
    assert [row["contestant"] for row in told["times"]] == names
    assert [row["contestant"] for row in told["memory"]] == names[:3]
    assert not any("floor" in key or "peak" in key for row in told["times"] for key in row), "a CPU's peaks are unknown"


def test_a_subject_is_computed_by_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    scan, scan_backward = reference.selective_scan, reference.selective_scan_backward
    monkeypatch.setattr(reference, "selective_scan", lambda *given: (called.append("forward"), scan(*given))[1])
    monkeypatch.setattr(
        reference, "selective_scan_backward", lambda *given: (called.append("backward"), scan_backward(*given))[1]
    )
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=1))
    step = Step(Subject("vim_micro_patch4_32", "none", 1, 16, "fp32", "cpu", backend="reference"))
    step.train()
    assert called == ["forward"] * 2 + ["backward"] * 2
    step.infer()
    assert called[4:] == ["forward"] * 2


def test_a_compiled_subject_is_one_graph_of_fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def compiled(built: torch.nn.Module, **options: object) -> torch.nn.Module:
        asked.append(options)
        return built

    monkeypatch.setattr(steps.torch, "compile", compiled)
    before = torch._dynamo.config.cache_size_limit
    try:
        Step(Subject("vim_micro_patch4_32", "none", 1, 16, "fp32", "cpu", compiled=True)).infer()
        assert torch._dynamo.config.cache_size_limit >= 2 * 9, "each contestant, training and not, is another graph"
    finally:
        torch._dynamo.config.cache_size_limit = before
    assert asked == [{"fullgraph": True, "dynamic": False}]


def test_peak_memory_on_cuda_is_that_of_a_step_after_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    step = Mock()
    step.train.side_effect = lambda: said.append("step")
    step.allocate.side_effect = lambda: said.append("allocate")
    memory_used = iter([100.0, 350.0])
    monkeypatch.setattr(memory, "Step", lambda subject: step)
    monkeypatch.setattr(memory, "return_freed_memory", lambda: None)
    monkeypatch.setattr(memory, "reset_peak_memory", lambda device: said.append("reset"))
    monkeypatch.setattr(memory, "peak_memory_mib", lambda device: next(memory_used))
    monkeypatch.setattr(memory, "synchronize", lambda device: said.append("wait"))
    assert memory.measure(Subject("any", "none", 1, 32, "bf16", "cuda")) == Peak(350, 250)
    assert said == ["step", "allocate", "reset", "step", "wait"]


def test_a_report_of_a_cuda_device_names_its_software() -> None:
    provenance = {
        "device": "NVIDIA A100-SXM4-80GB",
        "cuda": "13.2",
        "backend": "triton",
        "native_isa": "avx2",
        "famba": "1",
        "git_commit": "abc",
        "python": "3.11",
        "packages": {"torch": "2.9", "triton": "3.5", "causal-conv1d": "1.7"},
        "started": "now",
    }
    text = Report("ops", provenance, {}).text()
    assert text.startswith("NVIDIA A100-SXM4-80GB, CUDA 13.2, backend: triton\n")
    assert "torch 2.9, triton 3.5, causal-conv1d 1.7" in text
    on_cpu = Report("ops", provenance | {"device": "a CPU", "cuda": None}, {}).text()
    assert on_cpu.startswith("a CPU, native kernels: avx2\n")
    assert "triton" not in on_cpu


def test_notes_and_precisions_of_a_cuda_device() -> None:
    machine.check_precisions(["fp32", "bf16", "fp16"], CUDA)
    assert any("TF32" in note for note in machine.precision_notes(["fp32"], CUDA))
    assert any("loss scaler" in note for note in machine.precision_notes(["fp16"], CUDA))
    assert machine.precision_notes(["bf16"], CUDA) == []
    assert "overwritten" in timing.cache_note(cold=True)
    assert "may be found there" in timing.cache_note(cold=False)


def test_an_interpreted_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    entered, missing = contestants.contestants(Case("add_rms_norm", 1, 3, 4, 1, "fp32"), torch.float32, CPU)
    assert "triton" not in entered
    assert "triton" in missing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--dtype", "fp16"], "fp16 is timed on CUDA devices alone, this is a cpu device; use fp32 or bf16"),
        (["ops", "--bandwidth", "0"], "--bandwidth is 0; allowed: numbers above 0, in GB/s"),
        (["ops", "--cache", "hot"], "unknown cache 'hot'; allowed: cold, warm"),
        (["ops", "--op", "match_tokens", "--length", "2"], "--length is 2; match_tokens and fuse_tokens need 3 tokens"),
        (["model", "--backend", "tritonn"], "unknown backend 'tritonn', did you mean 'triton'?"),
        (["gpu", "--floors", "--json", "found.json"], "--json writes what was measured, and --floors measures nothing"),
        (["gpu", "--floors", "--quick", "--rounds", "3"], "--floors measures nothing, so --rounds, --quick would do"),
        (["gpu", "--from", "found.json", "--bandwidth", "900"], "--from measures nothing, so --bandwidth would do"),
        (["gpu", "--floors", "--from", "found.json"], "--floors shows floors alone, and --from what was measured too"),
        (["gpu", "--floors", "--fill", "/nowhere.md"], "--fill /nowhere.md cannot be read"),
        (["gpu", "--rounds", "0", "--device", "tpu"], "unknown --device 'tpu'"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    device = [] if "gpu" in arguments else ["--device", "cpu"]
    assert famba(["benchmark", *arguments, *device]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_ops_and_a_model_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    sizes = ["--batch", "2", "--length", "33", "--channels", "64", "--rounds", "3", "--json", str(file)]
    assert famba(["benchmark", "ops", "--device", "cuda", "--op", *OPS, "--dtype", "bf16", "fp16", *sizes]) == 0
    rows = json.loads(file.read_text())["ops"]
    assert {row["op"] for row in rows} == set(OPS)
    assert all(row["forward_ms"] > 0 for row in rows)
    sizes = ["--batch", "2", "--image-size", "32", "--rounds", "2", "--json", str(file)]
    chosen = ["--model", "vim_tiny_patch16_224", "--fusion", "none", "upper", "--precision", "bf16"]
    assert famba(["benchmark", "model", "--device", "cuda", *chosen, "--backend", "reference", *sizes]) == 0
    told = json.loads(file.read_text())
    assert all(row["step_ms"] > 0 for row in told["times"])
    assert all(row["peak_mib"] > 0 for row in told["memory"])
