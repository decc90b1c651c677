"""Steps that a GPU replays as graphs; on a CPU without graphs, but by the same code, at the same places in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from runs import TINY, last_checkpoint, metrics, run, weights
from torch import Tensor

from famba.errors import BackendError, TrainingError
from famba.training import graph, step, trainer
from famba.training.checkpoint import TrainedOn, load
from famba.training.compose import compose
from famba.training.distributed import Process
from famba.training.graph import obstacle
from famba.training.interrupts import Interrupted
from famba.training.setup import prepare

EVERYTHING = ("recipe.mixup=0.8", "recipe.cutmix=1.0", "recipe.ema_decay=0.9", "recipe.clip_grad=1.0",
              "recipe.warmup_epochs=1", "model.drop_path=0.2", "fusion=upper", "fusion.budget=4",
              "data.val_fraction=0.25", "trainer.batch_size=12", "trainer.epochs=3")  # fmt: skip
WITHOUT_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, WITHOUT_GPU])])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each device; the CPU takes the way of a GPU."""
    monkeypatch.setattr(graph, "_DEVICES", ["cuda", "cpu"])
    if request.param == "cpu":  # which needs no warming up, but goes through it
        monkeypatch.setattr(graph, "_WARM_UPS", 1)
    return request.param


def everything(device: str, *more: str) -> list[str]:
    return [*EVERYTHING, f"trainer.device={device}", *more]


def last(folder: Path) -> dict[str, Any]:
    return load(last_checkpoint(folder))


def assert_same_state(found: Path, expected: Path) -> None:
    """Weights, averages and the optimizer's state are equal to rounding."""
    mine, theirs = last(found), last(expected)
    assert mine["step"] == theirs["step"]
    for part in ("model", "ema"):
        torch.testing.assert_close(mine[part], theirs[part], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(mine["optimizer"]["state"], theirs["optimizer"]["state"], rtol=1e-2, atol=1e-5)


def assert_same_run(found: Path, expected: Path) -> None:
    """The state is, and so are the losses, gradient norms and evaluations on the way."""
    assert_same_state(found, expected)
    for one, other in zip(metrics(found), metrics(expected), strict=True):
        assert one.pop("kind") == other.pop("kind")
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize(
    "options", [(), ("trainer.accumulation=2",), ("trainer.precision=fp16",)], ids=["one graph", "accumulation", "fp16"]
)
def test_steps_are_those_of_the_usual_way(device: str, tmp_path: Path, options: tuple[str, ...]) -> None:
    if device == "cuda" and "trainer.precision=fp16" in options:
        pytest.skip("over several steps the rounding of float16 grows")
    # A GPU may compute a product in another order in a graph, and another partner for a token is no rounding.
    settings = everything(device, *(["fusion=none"] if device == "cuda" else []), *options)
    assert run(tmp_path / "graphed", *settings)["steps"] == 12
    run(tmp_path / "eager", "trainer.cuda_graphs=false", *settings)
    assert_same_run(tmp_path / "graphed", tmp_path / "eager")


def test_a_schedule_that_adapts(device: str, tmp_path: Path) -> None:
    options = everything(device, "trainer.epochs=2", "fusion=adaptive")
    summary = run(tmp_path / "graphed", *options)
    expected = run(tmp_path / "eager", "trainer.cuda_graphs=false", *options)
    kinds = [[line["kind"] for line in metrics(tmp_path / name)] for name in ("graphed", "eager")]
    assert kinds[0] == kinds[1]
    if device == "cpu":
        assert summary["schedule"] == expected["schedule"]
        assert_same_run(tmp_path / "graphed", tmp_path / "eager")


def test_stopped_and_resumed_is_bit_equal(device: str, tmp_path: Path, stop_after: Any) -> None:
    run(tmp_path / "whole", *everything(device))
    stop_after(9)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", *everything(device))
    stop_after(-1)
    run(tmp_path / "parts", *everything(device))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_a_checkpoint_goes_on_on_either_kind_of_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run does that begins on a GPU, continues on a CPU, and ends on a GPU."""
    for devices, options in ((["cpu"], ("trainer.max_steps=3",)), ([], ("trainer.max_steps=7",)), (["cpu"], ())):
        monkeypatch.setattr(graph, "_DEVICES", devices)
        run(tmp_path / "mixed", *everything("cpu"), *options)
        groups = last(tmp_path / "mixed")["optimizer"]["param_groups"]
        assert all(isinstance(group["lr"], float) and not group["fused"] for group in groups)
    monkeypatch.setattr(graph, "_DEVICES", [])
    run(tmp_path / "whole", *everything("cpu"))
    assert_same_state(tmp_path / "mixed", tmp_path / "whole")


def broken_at(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """Let the images of a step be no numbers: a graph reads images, where the code of a step is not run again."""
    original = step.Step.next_batch

    def next_batch(self: step.Step, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        images, labels = original(self, batches)
        return images * (float("nan") if self.state.step + 1 == bad else 1), labels

    monkeypatch.setattr(step.Step, "next_batch", next_batch)


@pytest.mark.parametrize("more", [("trainer.accumulation=2",), ("fusion=adaptive", "fusion.adapt_at=[0.5]")])
def test_a_loss_that_is_not_finite_leaves_the_state_of_the_step_before(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """Though the host looks some steps later, and a schedule would be measured in between."""
    usual = [*everything(device, *more), "trainer.epochs=2", "data.val_fraction=0", "trainer.log_every=9"]
    run(tmp_path / "four", *usual, "trainer.max_steps=4")
    broken_at(monkeypatch, 5)
    begun, started = [], trainer.Training.__init__

    def start(self: trainer.Training, *arguments: Any) -> None:
        begun.append(self)
        started(self, *arguments)

    monkeypatch.setattr(trainer.Training, "__init__", start)
    with pytest.raises(TrainingError, match="the loss is nan at step 5 "):
        run(tmp_path / "broken", *usual)
    state, expected = begun[0].state.content(), last(tmp_path / "four")
    assert state["schedule"] == expected["schedule"]
    assert not state["totals"]["schedules"]
    found, wanted = ((one["model"], one["ema"], one["optimizer"]["state"]) for one in (state, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, check_device=False)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("not permitted when capturing"), r"\(not permitted .*\); use trainer\.cuda_graphs=false"),
        (BackendError("conv.cu does not compile; use 'triton'"), "^conv.cu does not compile; use 'triton'$"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "Less memory: trainer.accumulation=2"),
    ],
)
def test_a_failed_capture_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, error: Exception, said: str
) -> None:
    calls, warm_up = [], graph.warm_up
    monkeypatch.setattr(graph, "reset_peak_memory", lambda device: calls.append("peak"))
    monkeypatch.setattr(graph, "warm_up", lambda *given: calls.append("warm-up") or warm_up(*given))
    monkeypatch.setattr(graph, "captured", Mock(side_effect=error))
    with pytest.raises((BackendError, TrainingError), match=said):
        run(tmp_path, *everything(device))
    assert calls == ["warm-up", "peak", "warm-up"], "tuning takes memory that is not part of the peak"


def test_what_fails_in_a_capture_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def capture(*_: Any, **__: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("the end fails, too")

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Mock)
    with pytest.raises(BackendError, match=r"^conv\.cu$"):
        graph.captured(Mock(side_effect=BackendError("conv.cu")), Mock(__iter__=lambda _: iter("ab")))


@pytest.mark.parametrize(
    ("overrides", "processes", "backend", "reason"),
    [
        (("trainer.cuda_graphs=false",), 1, "triton", "trainer.cuda_graphs=false"),
        ((), 4, "triton", "4 processes exchange"),
        (("recipe.optimizer=lamb",), 1, "triton", "recipe.optimizer=lamb looks at numbers on the host"),
        ((), 1, "reference", "by the reference"),
        ((), 1, "triton", None),
    ],
)
def test_what_is_no_graph_says_why(
    overrides: tuple[str, ...], processes: int, backend: str, reason: str | None
) -> None:
    config = compose(["model=vim_micro", "recipe=quick", "run_dir=unused", *overrides])
    found = obstacle(config, torch.device("cuda"), processes, backend)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_a_new_schedule_is_evaluated_by_a_new_graph(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "captured", lambda function, memory: function)
    config = compose([*TINY, "run_dir=unused", f"trainer.device={device}"])
    state = trainer.new_state(config, prepare(config), TrainedOn(10, None, {}), torch.device(device), fused=True)
    steps = graph.GraphStep(config, state, state.model, Process(0, 1, torch.device(device)), None)
    before = steps.infer(state.model)
    assert steps.infer(state.model) is before
    steps.schedule_changes()
    assert steps.infer(state.model) is not before
