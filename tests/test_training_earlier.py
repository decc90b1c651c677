"""A run that an earlier version began goes on as that version would have gone on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from earlier import COMMAND, KEPT, STEPS, write_images
from runs import metrics
from safetensors.torch import load_file

from famba.training.app import train
from famba.training.compose import compose


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Folder of the kept run, whose images lie beside it."""
    write_images(tmp_path / "images")
    return shutil.copytree(KEPT, tmp_path / "run")


def test_a_run_of_version_0_1_ends_with_the_weights_that_it_had_there(begun: Path) -> None:
    summary = train(compose([*COMMAND, f"data.root={begun.parent / 'images'}", f"run_dir={begun}"]), begun)
    assert summary["step"] == STEPS
    log = (begun / "train.log").read_text()
    assert "an earlier version of Famba began it: data.version=1" in log
    epochs = [line["epoch"] for line in metrics(begun) if line["kind"] == "epoch"]
    assert epochs == [0, 1, 2, 2, 3], "metrics.jsonl goes on in its own numbering"
    assert 1 <= summary["selected"]["epoch"] <= 4, "the summary counts from 1"
    found, expected = load_file(begun / "model.safetensors"), load_file(begun / "expected.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_the_same_run_begun_now_reads_its_images_otherwise(begun: Path) -> None:
    new = begun.parent / "new"
    train(compose([*COMMAND, f"data.root={begun.parent / 'images'}", f"run_dir={new}"]), new)
    found, expected = load_file(new / "model.safetensors"), load_file(begun / "expected.safetensors")
    assert any(not torch.allclose(found[name], value, rtol=1e-2, atol=1e-3) for name, value in expected.items())
