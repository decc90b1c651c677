"""A run that is stopped and continued is the run that it would have been."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import metrics, run

from famba.errors import CheckpointError, ConfigError
from famba.training.checkpoint import load
from famba.training.interrupts import Interrupted
from famba.training.reporting import Progress
from famba.training.run_folder import RunFolder

EVERYTHING = (
    "recipe.mixup=0.8",
    "recipe.cutmix=1.0",
    "recipe.ema_decay=0.9",
    "trainer.accumulation=2",
    "trainer.batch_size=12",
    "model.drop_path=0.2",
    "fusion=upper",
    "fusion.budget=0.5",
    "data.val_fraction=0.25",
)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that has the process sent a signal once a number of steps is done."""
    original = Progress.step

    def arrange(stop: int, number: signal.Signals = signal.SIGINT) -> None:
        def step(self: Progress, done: int, epoch: int, loss: float | None) -> None:
            original(self, done, epoch, loss)
            if done == stop:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Progress, "step", step)

    return arrange


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of 8 steps that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, *EVERYTHING)["steps"] == 8
    return folder


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_stopped_and_resumed_is_bit_equal(tmp_path: Path, uninterrupted: Path, stop_after: Any, stop: int) -> None:
    whole, parts = uninterrupted, tmp_path
    expected = RunFolder(whole, writes=True).summary
    assert expected is not None

    stop_after(stop, signal.SIGTERM if stop == 7 else signal.SIGINT)
    with pytest.raises(Interrupted, match="the same command"):
        run(parts, *EVERYTHING)
    interrupted = RunFolder(parts, writes=True).summary
    assert interrupted is not None
    assert (interrupted["status"], interrupted["step"]) == ("interrupted", stop)

    stop_after(-1)
    resumed = run(parts, *EVERYTHING)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert metrics(parts) == metrics(whole)
    for name in ("top1", "top5", "loss", "ema_top1", "selected"):
        assert resumed[name] == expected[name], name
    averaged, straight = (load(f / "checkpoints" / "step_00000008.pt")["ema"] for f in (parts, whole))
    for name, value in straight.items():
        assert torch.equal(averaged[name], value), name


@pytest.mark.parametrize("stop", [4, 5])
def test_a_schedule_that_adapts_resumes_bit_equal(tmp_path: Path, stop_after: Any, stop: int) -> None:
    """Stopped right before the schedule is measured anew, and right after."""
    adaptive = [*EVERYTHING, "fusion=adaptive", "fusion.adapt_at=[0.25,0.5]", "fusion.adapt_images=12"]
    whole = run(tmp_path / "whole", *adaptive)
    stop_after(stop)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", *adaptive)
    stop_after(-1)
    resumed = run(tmp_path / "parts", *adaptive)
    assert [entry["step"] for entry in whole["adapted"]] == [2, 4]
    assert resumed["adapted"] == whole["adapted"]
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for name in ("top1", "ema_top1", "selected", "macs_per_image", "saved_bytes_per_image"):
        assert resumed[name] == whole[name], name


def test_an_evaluation_that_fails_costs_no_step(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("famba.training.loop.evaluate", None)
        with pytest.raises(TypeError):
            run(tmp_path, *EVERYTHING)
    assert load(tmp_path / "checkpoints" / "step_00000004.pt")["step"] == 4
    run(tmp_path, *EVERYTHING)
    assert (tmp_path / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()
    assert metrics(tmp_path) == metrics(uninterrupted)


def test_a_refused_start_leaves_the_folder_as_it_was(tmp_path: Path, stop_after: Any) -> None:
    stop_after(2)
    with pytest.raises(Interrupted):
        run(tmp_path)
    stop_after(-1)
    before = {name: (tmp_path / name).read_bytes() for name in ("config.yaml", "summary.json", "metrics.jsonl")}
    with pytest.raises(CheckpointError, match="of a run with other settings"):
        run(tmp_path, "fusion=all", "fusion.budget=4")
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_an_older_checkpoint_does_not_overwrite_later_ones(tmp_path: Path) -> None:
    run(tmp_path)
    older = tmp_path / "checkpoints" / "step_00000003.pt"
    with pytest.raises(CheckpointError, match="is of step 3, but .* holds step 6 already"):
        run(tmp_path, f"resume={older}")


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, f"seed={seed}", "recipe.mixup=0.8", "trainer.epochs=1", "recipe.warmup_epochs=0")
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_resume_with_workers_and_timm_augmentation_is_bit_equal(tmp_path: Path, stop_after: Any) -> None:
    paper = ("recipe.augmentation=timm", "recipe.auto_augment=rand-m9-mstd0.5-inc1", "recipe.random_erasing=0.5",
             "data.workers=2", "trainer.epochs=1", "recipe.warmup_epochs=0")  # fmt: skip
    run(tmp_path / "whole", *paper)
    stop_after(2)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", *paper, "data.workers=0")
    stop_after(-1)
    run(tmp_path / "parts", *paper)
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_a_finished_run_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, "trainer.max_steps=2")
    monkeypatch.setattr("famba.training.app.Training", None)
    assert run(tmp_path, "trainer.max_steps=2") == first


def test_more_steps_continue_a_run_that_max_steps_ended(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "parts", "trainer.max_steps=2")
    run(tmp_path / "parts")
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_other_settings_do_not_continue_a_run(tmp_path: Path) -> None:
    run(tmp_path, "trainer.max_steps=2")
    with pytest.raises(CheckpointError, match=r"recipe.lr: 0.004 before, 0.001 now"):
        run(tmp_path, "recipe.lr=0.001", "trainer.max_steps=2")
    with pytest.raises(CheckpointError, match=r"fusion.strategy: 'none' before, 'upper' now"):
        run(tmp_path, "fusion=upper", "fusion.budget=4")


def test_resume_never_leaves_a_run_alone(tmp_path: Path) -> None:
    run(tmp_path, "trainer.max_steps=1")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="resume=never would overwrite"):
        run(tmp_path, "resume=never")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_from_a_named_checkpoint_into_another_folder(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "begun", "trainer.max_steps=2")
    begun = tmp_path / "begun" / "checkpoints" / "step_00000002.pt"
    run(tmp_path / "other", f"resume={begun}")
    whole, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "other"))
    assert whole == other


def test_a_torn_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, stop_after: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "whole")
    stop_after(5)
    with pytest.raises(Interrupted):
        run(tmp_path / "torn")
    stop_after(-1)
    last = tmp_path / "torn" / "checkpoints" / "step_00000005.pt"
    last.write_bytes(last.read_bytes()[:1000])
    run(tmp_path / "torn")
    assert "step_00000005.pt is truncated" in (tmp_path / "torn" / "train.log").read_text()
    whole, torn = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "torn"))
    assert whole == torn
    assert metrics(tmp_path / "torn") == metrics(tmp_path / "whole")


def test_nothing_but_torn_checkpoints_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, "trainer.max_steps=2")
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        run(tmp_path)


def test_weights_are_no_checkpoint_to_resume(tmp_path: Path) -> None:
    run(tmp_path / "a", "trainer.max_steps=1")
    weights = tmp_path / "a" / "model.safetensors"
    with pytest.raises(CheckpointError, match="use init_from instead of resume"):
        run(tmp_path / "b", f"resume={weights}")


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first = RunFolder(tmp_path, writes=True)
    first.claim()
    with pytest.raises(ConfigError, match="another run is writing"):
        run(tmp_path)
    first.release()
    run(tmp_path, "trainer.max_steps=1")


def test_init_from_takes_weights_and_a_new_classifier(tmp_path: Path) -> None:
    run(tmp_path / "a", "trainer.max_steps=1")
    weights = tmp_path / "a" / "model.safetensors"
    run(tmp_path / "b", f"init_from={weights}", "trainer.max_steps=1", "recipe.warmup_lr=0")
    run(tmp_path / "c", f"init_from={weights}", "trainer.max_steps=1", "recipe.warmup_lr=0", "model.num_classes=20")
    from safetensors.torch import load_file

    start, same, other = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    # The first step's rate is 0, so weights are still those that the run began with.
    assert all(torch.equal(start[name], same[name]) for name in start)
    assert other["head.weight"].shape[0] == 20
    assert all(torch.equal(start[name], other[name]) for name in start if not name.startswith("head."))
    shutil.rmtree(tmp_path / "a")


def test_the_same_command_with_a_named_checkpoint_goes_on_where_it_stopped(tmp_path: Path, stop_after: Any) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "begun", "trainer.max_steps=2")
    begun = f"resume={tmp_path}/begun/checkpoints/step_00000002.pt"
    stop_after(4)
    with pytest.raises(Interrupted):
        run(tmp_path / "other", begun)
    stop_after(-1)
    run(tmp_path / "other", begun)
    assert "continuing after step 4" in (tmp_path / "other" / "train.log").read_text()
    whole, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "other"))
    assert whole == other


def test_a_job_that_slurm_starts_again_goes_on_whatever_it_was_told_first(
    tmp_path: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(2)
    with pytest.raises(Interrupted):
        run(tmp_path, "resume=never")
    stop_after(-1)
    with pytest.raises(ConfigError, match="resume=never would overwrite"):
        run(tmp_path, "resume=never")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(tmp_path, "resume=never")["status"] == "finished"
    assert "continuing after step 2" in (tmp_path / "train.log").read_text()


def test_a_stop_is_answered_between_epochs_without_evaluation(tmp_path: Path, stop_after: Any) -> None:
    stop_after(3)
    with pytest.raises(Interrupted, match="stopped after step 3 of 6"):
        run(tmp_path, "trainer.eval_every=1000")


@pytest.mark.parametrize("name", ["summary.json", "config.yaml"])
@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff\xfe", b""])
def test_a_damaged_small_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    run(tmp_path, "trainer.max_steps=1")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} is damaged .*remove it, or choose another run_dir"):
        run(tmp_path, "trainer.max_steps=1")


def test_a_line_of_metrics_that_is_no_text_is_dropped(tmp_path: Path, stop_after: Any) -> None:
    stop_after(2)
    with pytest.raises(Interrupted):
        run(tmp_path / "damaged")
    stop_after(-1)
    with open(tmp_path / "damaged" / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe{")
    run(tmp_path / "damaged")
    run(tmp_path / "whole")
    assert metrics(tmp_path / "damaged") == metrics(tmp_path / "whole")
