"""`famba status` on folders of every kind."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from famba.analysis import status as looking
from famba.cli import main as famba

Printed = pytest.CaptureFixture[str]
SUMMARY = {"status": "running", "top1": None, "epoch": 1, "epochs": 4, "step": 30, "steps": 120}
EPOCH = {"kind": "epoch", "step": 30, "epoch": 0, "test_top1": 12.5}


def write_run(folder: Path, *lines: dict[str, Any], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, **changes}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").touch()
    return folder


def train_line(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "epoch": step // 30, "loss": 1.0}


def states(folder: Path) -> dict[str, str]:
    return {run.run: run.state for run in looking.status([folder])}


def test_a_run_says_how_far_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", EPOCH, train_line(45))
    with FileLock(run / ".lock"):
        (found,) = looking.status([run])
    assert (found.state, found.epoch, found.epochs, found.step, found.steps) == ("running", 1, 4, 45, 120)
    assert (found.top1, found.top1_of) == (12.5, "test")
    assert found.updated == pytest.approx(time.time(), abs=60)
    saved = write_run(tmp_path / "saved", EPOCH, train_line(40), status="interrupted", step=46)
    now = write_run(tmp_path / "now", {**EPOCH, "epoch": 1}, {**train_line(45), "epoch": 2})
    assert [one.epoch for one in looking.status([now])] == [1], "epochs count from 1, and from 0 in earlier files"
    assert [one.step for one in looking.status([saved])] == [46], "as far as what it saved"


def test_every_state_is_told(tmp_path: Path, capsys: Printed) -> None:
    for said in ("finished", "interrupted"):
        write_run(tmp_path / said, EPOCH, status=said, top1=30.0)
    write_run(tmp_path / "failed", EPOCH, status="failed", error="the loss is nan")
    write_run(tmp_path / "stopped", {"validation_top1" if key == "test_top1" else key: EPOCH[key] for key in EPOCH})
    (write_run(tmp_path / "lost", EPOCH) / "summary.json").unlink()
    for name, text in (("empty", ""), ("foreign", '{"status": 3}')):
        (write_run(tmp_path / name, EPOCH) / "summary.json").write_text(text)
    held = write_run(tmp_path / "running", EPOCH)
    again = write_run(tmp_path / "again", EPOCH, status="failed", error="before")
    write_sweep(tmp_path, "later")
    with FileLock(held / ".lock"), FileLock(again / ".lock"):
        found = states(tmp_path)
        assert famba(["status", str(tmp_path)]) == 0
    named = {name: name for name in ("finished", "interrupted", "failed", "stopped", "running")}
    damaged = dict.fromkeys(("empty", "foreign"), "damaged")
    assert found == {**named, **damaged, "again": "running", "later": "not started", "lost": "stopped"}
    table = capsys.readouterr().out
    assert all(part in table for part in ("failed: the loss is nan", " 30.00 ", "empty/summary.json is damaged"))
    assert "again: before" not in table
    assert " 12.50 val " in next(line for line in table.splitlines() if line.startswith("stopped"))
    counts = "10 runs: 1 finished, 2 running, 1 interrupted, 2 stopped, 1 failed, 2 damaged, 1 not started"
    assert table.splitlines()[-1] == counts


def test_a_table_shows_what_differs_and_nothing_else(tmp_path: Path, capsys: Printed) -> None:
    for name, fusion in (("a", "none, mode: fuse, order: x"), ("b", "upper, mode: fuse, order: x"),
                         ("c", "upper, mode: prune, order: x")):  # fmt: skip
        config = f"fusion: {{strategy: {fusion}}}\nmodel: {{name: vim}}\nseed: 0\nrun_dir: {name}\n"
        (write_run(tmp_path / name, EPOCH) / "config.yaml").write_text(config)
    write_sweep(tmp_path, "later")
    assert famba(["status", str(tmp_path)]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "fusion", "mode", *["state", "epoch", "done", "Top-1", "%", "updated"]]
    told = {row.split()[0]: row.split()[1:3] for row in rows[:4]}
    assert told == {"later": ["-", "-"], "a": ["none", "-"], "b": ["upper", "fuse"], "c": ["upper", "prune"]}


def write_sweep(folder: Path, *names: str) -> None:
    (folder / "sweep.json").write_text(json.dumps({"runs": [{"folder": name, "overrides": []} for name in names]}))


def test_jobs_that_wait_in_slurm_are_told_from_those_that_never_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(tmp_path, "new", "gone", "never")
    write_run(tmp_path / "requeued", EPOCH, status="interrupted")
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text('{"new": "7_0", "gone": "7_1", "requeued": "7_2"}')
    monkeypatch.setattr(looking, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(looking, "queue", lambda: {"7_0": "PENDING", "7_2": "PENDING"})
    waiting, never = dict.fromkeys(("new", "requeued"), "waiting"), dict.fromkeys(("gone", "never"), "not started")
    assert states(tmp_path) == {**waiting, **never}


@pytest.mark.parametrize("folder", ["/etc", "a/../../escape", "", "a\0b"])
def test_a_sweep_lists_nothing_outside_its_folder(folder: str, tmp_path: Path) -> None:
    write_run(tmp_path / "escape", EPOCH)
    write_run(tmp_path / "sweep" / "run", EPOCH)
    write_sweep(tmp_path / "sweep", folder, "later")
    assert states(tmp_path / "sweep") == {"later": "not started", "run": "stopped"}


def test_json_and_folders_without_runs(tmp_path: Path, capsys: Printed) -> None:
    write_run(tmp_path / "run", EPOCH, status="finished", top1=30.0)
    assert famba(["status", str(tmp_path / "rum")]) == 2
    assert "rum: it is not there, did you mean 'run'?; give the run_dir" in capsys.readouterr().err
    assert famba(["status", str(tmp_path), "--json", str(tmp_path / "no such")]) == 2, "options stand anywhere"
    assert "no such: it is not there" in capsys.readouterr().err
    assert famba(["status", "--json", str(tmp_path)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["run"], found["state"], found["top1"]) == ("run", "finished", 30.0)
