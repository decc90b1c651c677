"""Checkpoints: damage is found, the last whole one is used, a full disk harms none, and saving does not block."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, run

from famba.errors import CheckpointError
from famba.files import read_seal, remove_unfinished, seal, sha256
from famba.training import trainer
from famba.training.checkpoint import Checkpoints, load


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of 6 steps, with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(folder)["weights_sha256"] == sha256(folder / "model.safetensors")
    return folder


def damage(content: bytes, draw: random.Random) -> bytes:
    """Cut a file off at a random length, or flip bits in up to eight of its bytes."""
    if draw.random() < 0.5:
        return content[: draw.randrange(len(content))]
    damaged = bytearray(content)
    for place in draw.sample(range(len(content)), draw.randint(1, 8)):
        damaged[place] ^= draw.randint(1, 255)
    return bytes(damaged)


def test_damaged_checkpoints_give_way_to_the_one_before(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    before, last = checkpoints.path(3), checkpoints.path(6)
    whole = last.read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        last.write_bytes(damage(whole, draw))
        caplog.clear()
        assert checkpoints.find_last() == before
        assert "step_00000006.pt" in caplog.text
        aside = last.with_suffix(".damaged")
        assert not last.exists(), "it does not count as one of the two that are kept"
        with pytest.raises(CheckpointError):
            load(aside)
        aside.unlink()
    last.write_bytes(whole)
    assert checkpoints.find_last() == last


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(trained: Path, tmp_path: Path) -> None:
    run(tmp_path, "trainer.max_steps=5")
    last = tmp_path / "checkpoints" / "step_00000005.pt"
    last.write_bytes(damage(last.read_bytes(), random.Random(1)))
    run(tmp_path)
    assert "trying the one before it" in (tmp_path / "train.log").read_text()
    assert_same_run(tmp_path, trained)
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    (tmp_path / "summary.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        run(tmp_path)


def test_seals_tell_whole_from_damaged_and_another_format_is_refused(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "step_00000001.pt"
    torch.save({"format": 2, "step": 1}, path)
    assert read_seal(path) is None
    with pytest.raises(CheckpointError, match="its end, which seals it, is missing"):
        load(path)
    torch.save({"format": 3, "step": 1}, path)
    seal(path)
    assert read_seal(path) is True
    with pytest.raises(CheckpointError, match=r"step_00000001.pt has format 3, this release reads 2; use the release"):
        Checkpoints(tmp_path).find_last()
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    assert read_seal(path) is False
    whole = trained / "checkpoints" / "step_00000006.pt"
    assert torch.load(whole, weights_only=True)["format"] == 2, "it is a checkpoint for other tools too"


def test_a_damaged_selected_checkpoint_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_selected = trainer.Training._test_selected

    def damaged(self: trainer.Training) -> None:
        best = self.folder.checkpoints.best
        best.write_bytes(best.read_bytes()[:1000])
        test_selected(self)

    monkeypatch.setattr(trainer.Training, "_test_selected", damaged)
    summary = run(tmp_path, "data.val_fraction=0.25", "data.subset=96", "trainer.epochs=4")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.pt", "step_00000009.pt", "step_00000012.pt"], "the last two and the selected one are kept"
    assert summary["status"] == "finished"
    assert "top1" not in summary["selected"]
    assert "the selected weights cannot be tested" in (tmp_path / "train.log").read_text()


def test_checkpoints_within_an_epoch_change_nothing(trained: Path, tmp_path: Path) -> None:
    run(tmp_path, "trainer.save_every_min=1e-6")
    assert_same_run(tmp_path, trained)
    steps = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert steps == ["step_00000005.pt", "step_00000006.pt"]


def test_what_a_killed_write_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    left = [tmp_path / ".summary.json.abc.tmp", tmp_path / "checkpoints" / ".step_00000003.pt.xyz.tmp"]
    kept = [tmp_path / "kept.tmp", tmp_path / ".hidden"]
    for path in (*left, *kept):
        path.write_bytes(b"half")
    run(tmp_path, "trainer.max_steps=1")
    remove_unfinished(tmp_path)
    assert [path.exists() for path in (*left, *kept)] == [False, False, True, True]


def test_training_waits_for_the_copy_and_not_for_the_write(tmp_path: Path) -> None:
    checkpoints, release = Checkpoints(tmp_path), threading.Event()
    weights = {"w": torch.zeros(3)}
    checkpoints.save(1, weights, False, lambda: release.wait(60))
    weights["w"] += 1  # training goes on while the write has not begun
    checkpoints.wait(block=False)
    release.set()
    checkpoints.wait()
    assert torch.equal(torch.load(checkpoints.path(1), weights_only=True)["w"], torch.zeros(3)), "as at the call"
    checkpoints.save(2, {}, False, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoints.wait()
    checkpoints.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_an_error_that_leaves_the_last_checkpoint_whole(
    small_disk: Path, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, ballast = small_disk / "run", small_disk / "ballast"
    run(folder, "trainer.max_steps=3")
    last = folder / "checkpoints" / "step_00000003.pt"
    whole = last.read_bytes()
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(b"\0" * max(0, free - 40_000))
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device"):
        run(folder)
    assert last.read_bytes() == whole
    assert load(last)["step"] == 3
    assert not list(folder.rglob("*.tmp")), "what could not be written takes no space"
    assert "Traceback" not in capfd.readouterr().err
    ballast.unlink()
    run(folder)
    assert_same_run(folder, trained)


def test_a_disk_that_does_not_answer_is_no_damage(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Input/output error; try again"):
        Checkpoints(trained / "checkpoints").find_last()
    assert not list(trained.rglob("*.damaged"))
