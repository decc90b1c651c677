"""Checkpoints: damage is seen, the last whole one serves, a full disk harms none, and saving keeps no step waiting."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import metrics, run

from famba.errors import CheckpointError
from famba.files import read_file, read_seal, remove_unfinished, seal, sha256, write_whole
from famba.training import checkpoint, loop
from famba.training.checkpoint import Checkpoints, load
from famba.training.saving import Saver, on_host


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of 6 steps, with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder)
    return folder


def damage(content: bytes, draw: random.Random) -> bytes:
    """Cut a file off at a random length, or flip bits in up to eight of its bytes."""
    if draw.random() < 0.5:
        return content[: draw.randrange(len(content))]
    damaged = bytearray(content)
    for place in draw.sample(range(len(content)), draw.randint(1, 8)):
        damaged[place] ^= draw.randint(1, 255)
    return bytes(damaged)


def test_two_hundred_damaged_checkpoints_give_way_to_the_one_before(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    before, last = checkpoints.path(3), checkpoints.path(6)
    whole = last.read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        last.write_bytes(damage(whole, draw))
        caplog.clear()
        assert checkpoints.find_last() == before
        assert "step_00000006.pt" in caplog.text
        assert "trying the one before it" in caplog.text
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
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    run(tmp_path)
    assert "step_00000005.pt is damaged" in (tmp_path / "train.log").read_text()
    assert (tmp_path / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert metrics(tmp_path) == metrics(trained)


def test_a_sealed_file_is_a_checkpoint_for_other_tools_too(trained: Path) -> None:
    path = trained / "checkpoints" / "step_00000006.pt"
    assert read_seal(path) is True
    assert torch.load(path, weights_only=True)["format"] == 2


def test_damage_shows_where_weights_are_taken_from_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    content = bytearray((trained / "checkpoints" / "step_00000006.pt").read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged: it is not what was written"):
        read_file(path)


def test_a_checkpoint_without_its_seal_or_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step_00000001.pt"
    torch.save({"format": 2, "step": 1}, path)
    with pytest.raises(CheckpointError, match="its end, which seals it, is missing"):
        load(path)
    torch.save({"format": 1, "step": 1}, path)
    with pytest.raises(CheckpointError, match="format 1, this release reads 2"):
        load(path)


def test_seals_tell_apart_whole_damaged_and_unsealed(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"x": torch.arange(1000)}, path)
    assert read_seal(path) is None
    seal(path)
    assert read_seal(path) is True
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    assert read_seal(path) is False


def test_weights_are_named_by_their_sha256(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["weights_sha256"] == sha256(trained / "model.safetensors")


def test_the_last_two_and_the_selected_one_are_kept(tmp_path: Path) -> None:
    summary = run(tmp_path, "data.val_fraction=0.25", "data.subset=96", "trainer.epochs=4")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.pt", "step_00000009.pt", "step_00000012.pt"]
    assert load(tmp_path / "checkpoints" / "best.pt")["step"] == 3 * (summary["selected"]["epoch"] + 1)


def test_a_damaged_selected_checkpoint_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = loop.Training._evaluate_selected

    def damaged(self: loop.Training) -> None:
        best = self.folder.checkpoints.best
        content = best.read_bytes()
        best.unlink()
        best.write_bytes(content[:1000])
        finish(self)

    monkeypatch.setattr(loop.Training, "_evaluate_selected", damaged)
    summary = run(tmp_path, "data.val_fraction=0.25", "data.subset=96")
    assert summary["status"] == "finished"
    assert "top1" not in summary["selected"]
    assert "the selected weights cannot be tested" in (tmp_path / "train.log").read_text()


def test_checkpoints_within_an_epoch_change_nothing(trained: Path, tmp_path: Path) -> None:
    run(tmp_path, "trainer.save_every_min=1e-6")
    assert (tmp_path / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert metrics(tmp_path) == metrics(trained)
    steps = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert steps == ["step_00000005.pt", "step_00000006.pt"]


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    left = [tmp_path / ".summary.json.abc.tmp", tmp_path / "checkpoints" / ".step_00000003.pt.xyz.tmp"]
    for path in left:
        path.write_bytes(b"half")
    (tmp_path / "kept.tmp").write_bytes(b"the user's own")
    run(tmp_path, "trainer.max_steps=1")
    assert not any(path.exists() for path in left)
    assert (tmp_path / "kept.tmp").exists()


def test_removing_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    remove_unfinished(tmp_path)
    assert (tmp_path / ".lock").exists()


def test_training_waits_for_the_copy_and_not_for_the_write() -> None:
    saver, release, written = Saver(), threading.Event(), []

    def write(content: dict[str, Any]) -> None:
        assert release.wait(60)
        written.append(content)

    weights = {"w": torch.zeros(3)}
    saver.save(weights, write)
    weights["w"] += 1  # training goes on while the write has not begun
    release.set()
    saver.wait()
    assert torch.equal(written[0]["w"], torch.zeros(3)), "what was saved is the state at the call"


def test_the_error_of_a_write_comes_out_once() -> None:
    saver = Saver()

    def refuse(content: dict[str, Any]) -> None:
        raise CheckpointError("no space")

    saver.save({}, refuse)
    with pytest.raises(CheckpointError, match="no space"):
        saver.wait()
    saver.check()


def test_copies_share_nothing_with_what_they_copy() -> None:
    inner = torch.ones(2, requires_grad=True)
    copy = on_host({"a": [inner, (inner, 1)], "b": {"c": "text"}})
    assert copy["b"] == {"c": "text"}
    assert copy["a"][0].data_ptr() != inner.data_ptr()
    assert not copy["a"][1][0].requires_grad


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Fill a file system up to `left` bytes with a file, and return that."""
    ballast = disk / "ballast"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    ballast.write_bytes(b"\0" * max(0, free - left))
    return ballast


@pytest.mark.parametrize("left", [0, 40_000])
def test_a_full_disk_is_an_error_that_leaves_the_last_checkpoint_whole(
    small_disk: Path, trained: Path, left: int, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = small_disk / "run"
    run(folder, "trainer.max_steps=3")
    last = folder / "checkpoints" / "step_00000003.pt"
    whole = last.read_bytes()
    ballast = fill(small_disk, left)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device"):
        run(folder)
    assert last.read_bytes() == whole
    assert load(last)["step"] == 3
    assert not list(folder.rglob("*.tmp")), "what could not be written takes no space"
    assert "Traceback" not in capfd.readouterr().err
    ballast.unlink()
    run(folder)
    assert (folder / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert metrics(folder) == metrics(trained)


def test_saving_blocks_training_for_a_small_part_of_the_write(tmp_path: Path) -> None:
    saver = Saver()
    content = {"weights": torch.zeros(4_000_000)}

    def slow(copied: dict[str, Any]) -> None:
        write_whole(tmp_path / "file.pt", lambda file: torch.save(copied, file))
        time.sleep(1.0)

    saver.save(content, slow)
    assert saver.blocked_s < 0.5
    saver.wait()


def test_a_disk_that_does_not_answer_is_no_damage(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Input/output error; try again"):
        Checkpoints(trained / "checkpoints").find_last()
    assert not list(trained.rglob("*.damaged"))


def test_another_format_is_refused_at_once(tmp_path: Path) -> None:
    for step in (1, 2):
        torch.save({"format": 3, "step": step}, tmp_path / f"step_0000000{step}.pt")
        seal(tmp_path / f"step_0000000{step}.pt")
    with pytest.raises(CheckpointError, match=r"step_00000002.pt has format 3, this release reads 2; use the release"):
        Checkpoints(tmp_path).find_last()


def test_a_selected_checkpoint_that_cannot_be_written_is_selected_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = ("data.val_fraction=0.25", "data.subset=96")
    write, calls = checkpoint.write_whole, []

    def refuse_once(path: Path, do: Any) -> None:
        if path.name == "best.pt":
            calls.append(1)
            if len(calls) == 1:
                raise CheckpointError("no space")
        write(path, do)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_whole", refuse_once)
        with pytest.raises(CheckpointError, match="no space"):
            run(tmp_path / "parts", *held_out)
    parts, whole = (run(tmp_path / name, *held_out) for name in ("parts", "whole"))
    assert parts["selected"] == whole["selected"]
    assert "top1" in parts["selected"]
    one, other = (load(tmp_path / name / "checkpoints" / "best.pt")["model"] for name in ("parts", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)
