"""The commands as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import TINY
from safetensors.torch import load_file

from famba.cli import main as famba
from famba.ops.registry import resolve
from famba.training.app import main as train

ROOT = Path(__file__).parents[1]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_train_py_trains_and_says_so(tmp_path: Path) -> None:
    done = command("train.py", *TINY, "trainer.max_steps=2", "fusion=upper", "fusion.budget=5", f"run_dir={tmp_path}/r")
    assert done.returncode == 0, done.stderr
    assert "fusion upper: 17 tokens, 5 removed, 12 left" in done.stdout
    assert f"ops by {resolve('cpu')}" in done.stdout
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "finished"
    again = command(
        "train.py", *TINY, "trainer.max_steps=2", "fusion=upper", "fusion.budget=5", f"run_dir={tmp_path}/r"
    )
    assert again.returncode == 0
    assert "is finished already" in again.stdout


def test_errors_are_one_line_and_status_2(tmp_path: Path) -> None:
    done = command("train.py", "fusion=uper", f"run_dir={tmp_path}/r")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown fusion 'uper', did you mean 'upper'?")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()


def test_a_sweep_is_a_run_for_each_and_one_that_fails_leaves_the_others_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-m", *TINY, "recipe.optimizer=sgd", "recipe.lr=1000,0.004", "fusion=upper", "fusion.budget=5"]
    done = command("train.py", *arguments, f"run_dir={tmp_path}")
    assert done.returncode == 2
    assert "recipe.lr=1000: the loss is" in done.stderr
    assert "Traceback" not in done.stderr
    states = {p.parent.name: json.loads(p.read_text())["status"] for p in tmp_path.glob("*/summary.json")}
    assert states == {"recipe.lr=1000": "failed", "recipe.lr=0.004": "finished"}
    assert famba(["report", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "Top-1" in table
    assert "12 of 17" in table


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    arguments = [sys.executable, "train.py", *TINY, f"run_dir={tmp_path}/r", "trainer.epochs=40"]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "r" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped after step" in errors
    assert "Traceback" not in errors
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    more = f"trainer.max_steps={summary['step'] + 1}"
    again = command("train.py", *TINY, f"run_dir={tmp_path}/r", "trainer.epochs=40", more)
    assert again.returncode == 0, again.stderr
    assert f"continuing after step {summary['step']}" in again.stdout


def test_help_explains_every_group() -> None:
    done = command("train.py", "--help")
    assert done.returncode == 0, done.stderr
    said = "model=vim_ti |fusion=interleaved|(default: cifar100)|recipe.lr: 5.0e-4|trainer.epochs: 300|logger.mode:|"
    said += "hydra.launcher.nodes: 1|seed: 0|trainer.accumulation: 1 |famba download|hydra/launcher=slurm"
    for word in said.split("|"):
        assert word in done.stdout, word
    assert "=_" not in done.stdout, "what choices are made of is no choice"


@pytest.mark.slow
def test_famba_and_python_m_famba_are_the_same() -> None:
    by_module = command("-m", "famba", "--help")
    script = subprocess.run([Path(sys.executable).parent / "famba", "--help"], capture_output=True, text=True)
    assert by_module.returncode == script.returncode == 0
    assert by_module.stdout == script.stdout
    assert "download" in by_module.stdout


@pytest.mark.slow
def test_famba_train_is_train_py(tmp_path: Path) -> None:
    assert command("-m", "famba", "train", "fusion=uper").stderr == command("train.py", "fusion=uper").stderr


def test_download_of_what_has_none_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert famba(["download", "digits"]) == 2
    assert "digits" in capsys.readouterr().err


def test_report_on_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert famba(["report", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err


def test_pandas_is_imported_for_reports_alone() -> None:
    told = command("-c", "import sys, famba.cli, famba.training.app; print('pandas' in sys.modules)")
    assert told.stdout == "False\n"


def test_missing_data_names_folders_and_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["data=cifar100", f"data.root={tmp_path}", f"run_dir={tmp_path}/r"]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path) in message
    assert f"famba download cifar100 --root {tmp_path}" in message


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one(tmp_path: Path) -> None:
    settings = [*TINY, "fusion=upper", "fusion.budget=5", "recipe.ema_decay=0.9", "trainer.epochs=1",
                "recipe.warmup_epochs=0", "recipe.clip_grad=1", "trainer.precision=fp32"]  # fmt: skip
    one = command("train.py", *settings, f"run_dir={tmp_path}/one", "trainer.accumulation=2")
    assert one.returncode == 0, one.stderr
    two = command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                  "train.py", *settings, f"run_dir={tmp_path}/two", OMP_NUM_THREADS="1")  # fmt: skip
    assert two.returncode == 0, two.stderr
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[1]["provenance"]["processes"] == 2
    assert summaries[0]["top1"] == pytest.approx(summaries[1]["top1"], abs=0.6), "each image is counted once"
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=2e-5, msg=name)
