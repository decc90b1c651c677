"""A run that is stopped and continued is the run that it would have been."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, assert_same_run, last_checkpoint, run, weights

from famba.cli import main as famba
from famba.errors import CheckpointError, ConfigError
from famba.training import step
from famba.training.app import main
from famba.training.checkpoint import load
from famba.training.compose import Command, quoted
from famba.training.interrupts import Interrupted
from famba.training.run_folder import RunFolder, again, continued

EVERYTHING = ("recipe.mixup=0.8", "recipe.cutmix=1.0", "recipe.ema_decay=0.9", "recipe.layer_decay=0.8",
              "trainer.accumulation=2", "trainer.batch_size=12", "model.drop_path=0.2", "fusion=upper",
              "fusion.budget=0.5", "data.val_fraction=0.25")  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of 6 steps that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of 8 steps, with all that a run may use, that nothing stopped."""
    folder = tmp_path_factory.mktemp("everything")
    assert run(folder, *EVERYTHING)["steps"] == 8
    return folder


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def stopped(folder: Path, stop_after: Any, step: int, *overrides: str, number: signal.Signals = signal.SIGINT) -> None:
    """Begin a run that is stopped after a step; those that follow are not."""
    stop_after(step, number)
    with pytest.raises(Interrupted, match=rf"stopped after step {step} of .*; to continue: famba train run_dir="):
        run(folder, *overrides)
    stop_after(-1)


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_stopped_and_resumed_is_bit_equal(tmp_path: Path, everything: Path, stop_after: Any, stop: int) -> None:
    number = signal.SIGTERM if stop == 7 else signal.SIGINT
    stopped(tmp_path, stop_after, stop, *EVERYTHING, number=number)
    interrupted, expected = (summary(folder) for folder in (tmp_path, everything))
    assert (interrupted["status"], interrupted["step"]) == ("interrupted", stop)
    resumed = run(tmp_path, *EVERYTHING)
    assert_same_run(tmp_path, everything)
    for name in ("top1", "top5", "loss", "ema_top1", "selected"):
        assert resumed[name] == expected[name], name
    averages = [load(last_checkpoint(folder))["ema"] for folder in (tmp_path, everything)]
    torch.testing.assert_close(*averages, rtol=0, atol=0)


@pytest.mark.parametrize("stop", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_schedule_that_adapts_resumes_bit_equal(tmp_path: Path, stop_after: Any, stop: int) -> None:
    """Stopped right before the schedule is measured anew, and right after."""
    adaptive = [*EVERYTHING, "fusion=adaptive", "fusion.adapt_at=[0.25,0.5]", "fusion.adapt_images=12"]
    expected = run(tmp_path / "whole", *adaptive)
    stopped(tmp_path / "parts", stop_after, stop, *adaptive)
    resumed = run(tmp_path / "parts", *adaptive)
    assert [entry["step"] for entry in expected["adapted"]] == [2, 4]
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    for name in ("adapted", "top1", "ema_top1", "selected", "macs_per_image", "saved_bytes_per_image"):
        assert resumed[name] == expected[name], name


def test_resume_with_workers_and_timm_augmentation_is_bit_equal(tmp_path: Path, stop_after: Any) -> None:
    paper = ("recipe.augmentation=timm", "recipe.auto_augment=rand-m9-mstd0.5-inc1", "recipe.random_erasing=0.5",
             "data.workers=2", "trainer.epochs=1", "recipe.warmup_epochs=0")  # fmt: skip
    run(tmp_path / "whole", *paper)
    stopped(tmp_path / "parts", stop_after, 2, *paper, "data.workers=0")
    run(tmp_path / "parts", *paper)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, f"seed={seed}", "recipe.mixup=0.8", "trainer.epochs=1", "recipe.warmup_epochs=0")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_a_finished_run_ends_at_once_and_more_steps_continue_it(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path, "trainer.max_steps=2")
    with monkeypatch.context() as patched:
        patched.setattr("famba.training.app.Training", None)
        assert run(tmp_path, "trainer.max_steps=2") == first
    run(tmp_path)
    assert weights(tmp_path) == weights(whole)


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path, stop_after: Any) -> None:
    stopped(tmp_path, stop_after, 3)
    with pytest.raises(CheckpointError, match="3 steps are done; trainer.max_steps=2 must be more"):
        run(tmp_path, "trainer.max_steps=2")
    assert run(tmp_path, "trainer.max_steps=4")["step"] == 4


def test_other_settings_do_not_continue_a_run_and_leave_it_as_it_was(tmp_path: Path, stop_after: Any) -> None:
    stopped(tmp_path, stop_after, 2)
    before = {name: (tmp_path / name).read_bytes() for name in ("config.yaml", "summary.json", "metrics.jsonl")}
    for change, told in (("recipe.lr=0.001", "recipe.lr: 0.004 before, 0.001 now"),
                         ("fusion=upper", "fusion.strategy: 'none' before, 'upper' now")):  # fmt: skip
        with pytest.raises(CheckpointError, match=f"holds a run with other settings:(?s:.*){told}"):
            run(tmp_path, change, "fusion.budget=4")
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    run(tmp_path)
    with pytest.raises(CheckpointError, match="finished run with other settings:\n  recipe.lr: 0.004 before, 0.001"):
        run(tmp_path, "recipe.lr=0.001")


def test_resume_never_leaves_a_run_alone_but_a_restarted_job_continues_it(
    tmp_path: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path, stop_after, 2, "resume=never")
    with pytest.raises(ConfigError, match="resume=never would overwrite"):
        run(tmp_path, "resume=never")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(tmp_path, "resume=never")["status"] == "finished"
    assert "continuing after step 2" in (tmp_path / "train.log").read_text()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path, writes=True), pytest.raises(ConfigError, match="another run is writing"):
        run(tmp_path)
    run(tmp_path, "trainer.max_steps=1")
    with pytest.raises(ConfigError, match="run_dir=/dev/null/run cannot be written"):
        run(Path("/dev/null/run"))


def test_a_damaged_small_file_is_named_and_a_broken_line_of_metrics_dropped(tmp_path: Path, whole: Path) -> None:
    run(tmp_path, "trainer.max_steps=3")
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe{")
    for name in ("summary.json", "config.yaml"):
        kept = (tmp_path / name).read_bytes()
        for content in (b"{}", b"[]", b"\xff\xfe", b""):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(CheckpointError, match=f"{name} cannot be read .*; restore it or remove it"):
                run(tmp_path, "trainer.max_steps=3")
        (tmp_path / name).write_bytes(kept)
    run(tmp_path)
    assert_same_run(tmp_path, whole)


def printed_command(errors: str, before: str) -> list[str]:
    """Return the arguments of train in a command that was printed, as a shell reads them."""
    (line,) = [line for line in errors.splitlines() if before in line]
    program, train, *arguments = shlex.split(line.partition(before)[2])
    assert (program, train) == ("famba", "train")
    return arguments


def test_a_run_goes_on_from_its_folder_alone_by_what_ctrl_c_prints(
    tmp_path: Path, whole: Path, stop_after: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "it's, my $run"
    stop_after(2)
    assert main([*TINY, f"run_dir={quoted(str(folder))}"]) == 130
    stop_after(-1)
    arguments = printed_command(capsys.readouterr().err, "to continue: ")
    for given, told in (("fusion=upper", "fusion.strategy: 'none' before, 'upper' now"),
                        ("recipe=light", "recipe.lr: 0.004 before, 0.001 now"),
                        ("trainer.epochs=300", "trainer.epochs: 2 before, 300 now")):  # fmt: skip
        assert main([*arguments, given]) == 2
        assert told in capsys.readouterr().err
    assert famba(["resume", str(tmp_path)]) == 2
    assert "holds no run to go on with" in capsys.readouterr().err
    assert famba(["resume", str(folder), "data.workers=0", "trainer.eval_every=1"]) == 0
    assert weights(folder) == weights(whole)
    assert main(arguments) == 0
    assert "is finished already" in capsys.readouterr().out


def test_what_a_stopped_sweep_prints_does_what_is_left(
    tmp_path: Path, stop_after: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(1)
    command = ["-m", *TINY, "trainer.max_steps=2", "seed=0,1", f"run_dir={quoted(str(tmp_path / 'a b, c'))}"]
    assert main(command) == 130
    stop_after(-1)
    with pytest.raises(ConfigError, match="is the folder of a sweep; repeat the command of the sweep"):
        continued(Command.parse([f"run_dir={quoted(str(tmp_path / 'a b, c'))}"]))
    assert main(printed_command(capsys.readouterr().err, "to do what is left of the sweep: ")) == 0
    assert [summary(path)["status"] for path in (tmp_path / "a b, c").glob("seed=*")] == ["finished", "finished"]


def test_more_epochs_of_a_finished_run_are_a_new_run_by_the_command_that_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("fusion=upper", "fusion.budget=5", "trainer.epochs=1", "recipe.warmup_epochs=0")
    run(tmp_path / "a run", *settings)
    assert main([f"run_dir={quoted(str(tmp_path / 'a run'))}", "trainer.epochs=2"]) == 2
    errors = capsys.readouterr().err
    assert "holds a finished run with other settings:\n  trainer.epochs: 1 before, 2 now" in errors
    arguments = shlex.split(errors.splitlines()[-1])[2:]
    assert {"fusion.strategy=upper", "data.name=digits", "trainer.epochs=2"} <= set(arguments)
    assert not any(argument.startswith("logger.") for argument in arguments), "no more than it takes"
    assert main(arguments) == 0
    assert summary(tmp_path / "a run-on")["started_from"]["init_from"] == str(tmp_path / "a run")
    before, new = (RunFolder(tmp_path / name, writes=False).config or {} for name in ("a run", "a run-on"))
    assert new["trainer"] == {**before["trainer"], "epochs": 2}
    assert all(new[group] == before[group] for group in ("model", "fusion", "data", "recipe", "ops"))


def test_a_checkpoint_that_is_named_begins_a_run_in_another_folder(
    whole: Path, tmp_path: Path, stop_after: Any
) -> None:
    begun = f"resume={shutil.copy(whole / 'checkpoints' / 'step_00000003.pt', tmp_path)}"
    (tmp_path / "best.pt").write_text("selected before")
    stopped(tmp_path / "other", stop_after, 4, begun)
    assert (tmp_path / "other/checkpoints/best.pt").read_text() == "selected before"
    run(tmp_path / "other", begun)
    assert "continuing after step 4" in (tmp_path / "other" / "train.log").read_text()
    assert weights(tmp_path / "other") == weights(whole)
    with pytest.raises(ConfigError, match="resume=ato is no file, did you mean 'auto'"):
        run(tmp_path / "third", "resume=ato")


def test_a_run_that_an_error_ends_keeps_what_it_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("trainer.epochs=1", "recipe.ema_decay=0.9")
    run(tmp_path / "whole", *settings)
    update, batch, count, folder = step.Step.update, step.Step.next_batch, iter((1, 1, 0)), tmp_path / "run"
    with monkeypatch.context() as patched:  # in the next step's images: two steps are done
        patched.setattr(step.Step, "next_batch", lambda self, batches: batch(self, batches) if next(count) else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(folder, *settings)
    assert last_checkpoint(folder).name == "step_00000002.pt"
    told = f"saved after step 2; to go on from there: famba train run_dir={folder}"
    assert told in (folder / "train.log").read_text()
    with monkeypatch.context() as patched:  # in the middle of a change
        patched.setattr(step.Step, "update", lambda self: update(self) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(folder, *settings)
    assert last_checkpoint(folder).name == "step_00000002.pt", "weights of half a step are not kept"
    run(folder, *settings)
    assert_same_run(folder, tmp_path / "whole")


def test_the_command_of_several_processes_starts_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert again("runs/a=1") == """python train.py 'run_dir='"'"'runs/a=1'"'"''  # in 2 processes, as before"""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert again("runs/one") == "torchrun --nproc-per-node=2 train.py run_dir=runs/one"


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def acquire(*args: Any, **options: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with RunFolder(tmp_path / "run", writes=True):
        assert "has no locks: make sure that no other run writes there" in caplog.text
