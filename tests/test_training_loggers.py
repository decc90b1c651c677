"""Metrics reach their files whole, and a logger that fails ends no run."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from runs import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from famba.training import app
from famba.training import logging as logging_of_runs
from famba.training.interrupts import Interrupted
from famba.training.logging import Progress


def test_tensorboard_has_the_metrics_and_an_interruption_leaves_no_gap(tmp_path: Path, stop_after: Any) -> None:
    stop_after(4, signal.SIGTERM)
    with pytest.raises(Interrupted):
        run(tmp_path, "logger=tensorboard")
    stop_after(-1)
    run(tmp_path, "logger=tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("epoch/test_top1")] == [3, 6]
    assert "WARNING" not in (tmp_path / "train.log").read_text().replace("WARNING SIGTERM", "")


def test_wandb_runs_offline_without_key_or_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run(tmp_path, "logger=wandb", "trainer.max_steps=1")
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert "WARNING" not in (tmp_path / "train.log").read_text(), "nothing went wrong"


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """A stand-in for wandb.init, which returns one and the same run."""
    stand_in = Mock(return_value=Mock(summary={}))
    monkeypatch.setattr("wandb.init", stand_in)
    return stand_in


def test_a_failing_logger_never_ends_a_run(tmp_path: Path, begin: Mock) -> None:
    begin.return_value.log.side_effect = [None, None, OSError("no space left")]
    assert run(tmp_path, "logger=wandb")["status"] == "finished"
    assert begin.call_args.kwargs["mode"] == "offline"
    assert begin.call_args.kwargs["config"]["recipe"]["lr"] == 0.004
    first, _, _ = begin.return_value.log.call_args_list
    assert "train/loss" in first.args[0]
    assert first.kwargs == {"step": 1}
    assert "wandb failed to log (no space left)" in (tmp_path / "train.log").read_text()


def test_wandb_goes_on_under_the_same_id_and_runs_of_a_sweep_are_one_group(tmp_path: Path, begin: Mock) -> None:
    online = ("logger=wandb", "logger.mode=online")
    sweep = tmp_path / "strategies"
    sweep.mkdir()
    (sweep / "sweep.json").write_text("{}")
    run(tmp_path / "alone", *online, "trainer.max_steps=1")
    run(tmp_path / "alone", *online, "trainer.max_steps=2")
    run(sweep / "first", *online, "trainer.max_steps=1")
    ids, resumed, groups = ([one.kwargs[name] for one in begin.call_args_list] for name in ("id", "resume", "group"))
    assert ids[0] == ids[1] != ids[2]
    assert (resumed, groups) == (["allow"] * 3, [None, None, "strategies"])
    assert (begin.return_value.finish.call_count, begin.return_value.summary["status"]) == (3, "finished")


def test_the_first_step_and_the_time_left_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging_of_runs, "_SOON_S", 0.0)
    now = iter([0.0, 0.0, 50.0, 50.0, 80.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    caplog.set_level("INFO")
    progress = Progress(1002, 0, True, 1.5)
    steps = progress.watched(iter([1, 2]))
    next(steps)
    assert "the first step begins" in caplog.text
    progress.step(1, 0, 2.5)
    assert "left" not in caplog.text, "the first step is no measure"
    next(steps)
    progress.step(2, 0, None)
    assert "step 2 of 1002, loss 2.500, about 12.5 h left with evaluation" in caplog.text


def test_a_model_for_gpus_on_a_cpu_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (500, 0.01):
        monkeypatch.setattr(app, "_FOR_GPUS", limit)
        run(tmp_path / str(limit), "trainer.max_steps=1", "model.depth=1")
        log = (tmp_path / str(limit) / "train.log").read_text()
        assert ("this model is meant for GPUs" in log) == (limit < 1)
