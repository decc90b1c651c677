"""Test what a run computes, writes and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import TINY, last_checkpoint, metrics, python, run, weights
from safetensors.torch import load_file
from torch import nn

from famba.errors import ConfigError, TrainingError
from famba.models import Vim
from famba.ops.registry import resolve
from famba.training import measure, step, trainer
from famba.training.build import build_model, load_splits, make_loaders, resident
from famba.training.checkpoint import TrainedOn, load
from famba.training.compose import compose
from famba.training.devices import loading_workers
from famba.training.distributed import Process
from famba.training.measure import evaluate, macs_per_image, saved_bytes_per_image
from famba.training.setup import prepare
from famba.training.trainer import new_state

ONE = Process(0, 1, torch.device("cpu"))


def test_run_folder_holds_what_it_promises(tmp_path: Path) -> None:
    summary = run(tmp_path, "fusion=upper", "fusion.budget=5", "recipe.ema_decay=0.5")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert [summary[key] for key in ("status", "step", "steps", "epoch")] == ["finished", 6, 6, 2]
    assert summary["schedule"] == [2, 3], "5 over the two layers that upper fuses at depth 2"
    assert (summary["tokens_removed"], summary["tokens_per_layer"][-1], summary["budget_matched"]) == (5, 17 - 5, True)
    assert summary["parameters"] == sum(v.numel() for v in load_file(tmp_path / "model.safetensors").values())
    assert 0 <= summary["top1"] <= summary["top5"] <= 100
    assert summary["ema_top1"] is not None
    for name in ("train_time_s", "images_per_s", "peak_memory_mib", "saved_bytes_per_image", "macs_per_image"):
        assert summary[name] > 0, name
    assert set(summary["epoch_time_s"]) == {"data", "step", "evaluation"}
    assert (summary["provenance"]["seed"], summary["provenance"]["backend"]) == (0, resolve("cpu"))
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [(line["step"], line["epoch"]) for line in lines if line["kind"] == "epoch"] == [(3, 1), (6, 2)]
    assert lines[-1]["test_top1"] == summary["top1"]
    log = (tmp_path / "train.log").read_text()
    told = f"test Top-1 {summary['top1']:.2f} % by the last weights, {summary['ema_top1']:.2f} % by their average (EMA)"
    assert f"epoch 2 of 2: loss {lines[-1]['train_loss']:.4f}, {told}" in log
    for said in (told, "fusion upper: 17 tokens, 5 removed, 12 left", "digits: 10 classes, 72 train, 360 test images",
                 "2 epochs of 3 steps of 24 images, adamw, lr 0.004 for 32 images",
                 f"famba evaluate {tmp_path} --per-class --out", f"famba visualize {tmp_path};"):  # fmt: skip
        assert said in log, said
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > 1000
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000003.pt", "step_00000006.pt"}
    assert summary["selected"] is None, "no images are held out"
    assert {p.name for p in tmp_path.rglob(".*")} <= {".lock"}, "nothing temporary stays"


def test_training_learns(tmp_path: Path) -> None:
    summary = run(tmp_path, "data.subset=480", "trainer.epochs=6", "model.embed_dim=32", "recipe.lr=0.01")
    assert summary["top1"] > 40
    losses = [line["train_loss"] for line in metrics(tmp_path) if line["kind"] == "epoch"]
    assert losses[-1] < losses[0] - 0.3


def test_selection_is_by_validation_and_never_by_the_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([60.0, 20.0, 50.0, 30.0])

    def scripted(*arguments: Any) -> dict[str, float]:
        top1 = next(scores)
        return {"top1": top1, "top5": 100.0, "loss": 1.0}

    monkeypatch.setattr(trainer, "evaluate", scripted)
    summary = run(tmp_path, "data.val_fraction=0.25", "data.subset=96")
    # Two epochs on validation, then the last and the selected weights on the test set.
    assert summary["selected"] == {"epoch": 1, "validation_top1": 60.0, "top1": 30.0, "top5": 100.0}
    assert summary["top1"] == 50.0
    assert load(tmp_path / "checkpoints" / "best.pt")["step"] == 3


def test_evaluations_before_the_last_take_some_images_of_each_class(tmp_path: Path) -> None:
    config = compose([*TINY, f"run_dir={tmp_path}", "trainer.eval_images=20"])
    splits = load_splits(config)
    loaders = make_loaders(config, 32, splits, ONE)
    labels = torch.cat([labels for _, labels in loaders.in_training])
    assert labels.bincount().tolist() == [2] * 10
    assert sum(len(labels) for _, labels in loaders.selection) == 360
    run(tmp_path, "trainer.eval_images=7")
    first, last = (line["test_top1"] for line in metrics(tmp_path) if line["kind"] == "epoch")
    assert 7 * first / 100 == pytest.approx(round(7 * first / 100))
    assert 360 * last / 100 == pytest.approx(round(360 * last / 100), abs=1e-3)
    with pytest.raises(ConfigError, match="trainer.eval_images=20 is for test images"):
        run(tmp_path / "selected", "trainer.eval_images=20", "data.val_fraction=0.5", "trainer.batch_size=12")


def test_images_lie_on_the_device_if_they_fit_and_are_augmented_there() -> None:
    splits = load_splits(compose([*TINY, "run_dir=unused"]))
    size, cpu = sum(part.images.nbytes for part in (splits.train, splits.test)), torch.device("cpu")  # type: ignore[union-attr]
    assert resident(splits, cpu, "batch", 4 * size - 1) is splits
    for augmentation, moves_train in (("batch", True), ("timm", False)):
        moved = resident(splits, cpu, augmentation, 4 * size)
        assert (moved.train is not splits.train, moved.test is not splits.test) == (moves_train, True)


def test_workers_take_the_cores_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, processes, workers in ((12, 1, 12), (12, 4, 3), (64, 2, 16), (2, 4, 1)):
        monkeypatch.setattr("joblib.cpu_count", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert loading_workers("auto") == workers


def test_a_loss_that_is_not_finite_stops_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        loss = nn.functional.cross_entropy(logits, targets)
        return loss * float("nan") if len(calls) == 5 else loss

    monkeypatch.setattr(step, "create_loss", lambda recipe: broken)
    place = r"the loss is nan at step 5 \(epoch 2\), with learning rate .* norm .* last good state is that of step 3"
    with pytest.raises(TrainingError, match=place):
        run(tmp_path)
    kept = load(tmp_path / "checkpoints" / "step_00000003.pt")
    assert all(torch.isfinite(value).all() for value in kept["model"].values())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "loss is nan" in summary["error"]


def test_out_of_memory_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Vim.forward

    def forward(self: Vim, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return original(self, x)

    monkeypatch.setattr(Vim, "forward", forward)
    with pytest.raises(TrainingError, match=r"12 images at once.*trainer.accumulation=4.*grad_checkpointing"):
        run(tmp_path, "trainer.accumulation=2")


def test_strategies_share_weights_and_images_at_one_seed() -> None:
    first = None
    for strategy in ("none", "all", "lower", "upper"):
        config = compose([*TINY, f"fusion={strategy}", "fusion.budget=6", "recipe.mixup=0.8", "run_dir=unused"])
        setup = prepare(config)
        splits = load_splits(config)
        state = new_state(config, setup, TrainedOn(10, None, {}), torch.device("cpu"))
        batches = make_loaders(config, setup.image_size, splits, ONE).train.epoch(0)
        images, labels = next(batches)
        batches.close()
        found = [*state.model.state_dict().values(), images, labels]
        if first is not None:
            assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True)), strategy
        first = found


def test_accumulation_is_the_same_step_in_parts(tmp_path: Path) -> None:
    settings = ("trainer.max_steps=2", "recipe.clip_grad=0.1")
    run(tmp_path / "whole", *settings)
    run(tmp_path / "parts", *settings, "trainer.accumulation=4")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole")]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_learning_rate_follows_the_recipe(tmp_path: Path) -> None:
    per_step = ("trainer.epochs=4", "recipe.warmup_epochs=1", "recipe.lr=0.008", "recipe.lr_batch=48",
                "recipe.warmup_lr=0.001", "recipe.min_lr=0.0005")  # fmt: skip
    run(tmp_path / "update", *per_step)
    rates = [line["lr"] for line in metrics(tmp_path / "update") if line["kind"] == "train"]
    # 24 images per step, half of lr_batch: the peak is 0.004, from 0.001 over 3 steps.
    assert rates[:3] == pytest.approx([0.001, 0.002, 0.003])
    assert max(rates) <= 0.004
    assert rates[6] == pytest.approx(0.0005 + 0.0035 / 2, rel=1e-6), "half way down the cosine"
    run(tmp_path / "epoch", *per_step, "recipe.lr_steps=epoch")
    rates = [line["lr"] for line in metrics(tmp_path / "epoch") if line["kind"] == "train"]
    assert len(set(rates)) == 4
    assert rates[0] == rates[2] == pytest.approx(0.001)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradient_checkpointing_changes_memory_alone(tmp_path: Path, backend: str) -> None:
    options = ("trainer.max_steps=2", f"ops.backend={backend}")
    plain = run(tmp_path / "plain", *options)
    saving = run(tmp_path / "saving", *options, "trainer.grad_checkpointing=true")
    assert weights(tmp_path / "plain") == weights(tmp_path / "saving")
    assert saving["saved_bytes_per_image"] < plain["saved_bytes_per_image"]


def test_fp16_trains_with_a_scaler(tmp_path: Path) -> None:
    assert run(tmp_path, "trainer.precision=fp16", "trainer.max_steps=2")["precision"] == "float16"
    assert load(last_checkpoint(tmp_path))["scaler"]["scale"] > 0


def test_macs_are_those_of_the_layers_by_hand() -> None:
    config = compose([*TINY, "run_dir=unused"])
    model = build_model(config.model.name, {**prepare(config).model_arguments, "num_classes": 10})
    d, d_inner, n, rank, tokens, depth = 16, 32, 2, 1, 17, 2
    per_token = d * 2 * d_inner + d_inner * d
    per_token += 2 * (4 * d_inner + d_inner * (rank + 2 * n) + rank * d_inner + d_inner * (4 * n + 3))
    expected = depth * tokens * per_token + 16 * d * 3 * 8 * 8 + d * 10
    assert macs_per_image(model, 32) == expected


def test_saved_bytes_count_each_storage_once_and_no_parameters() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.sum((1, 2, 3)).unsqueeze(1) * self.weight  # keeps (b, 1) and the parameter
            return x * x  # keeps (b, 5), twice the same

    assert saved_bytes_per_image(Square(), 8, None) == 4 * (1 + 5)


def test_evaluation_counts_top1_top5_and_loss() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    logits = torch.tensor([[9.0, 1, 2, 3, 4, 5], [9, 8, 7, 6, 5, 1], [0, 9, 3, 4, 5, 6]])
    batches = [(logits[:2], torch.tensor([0, 1])), (logits[2:], torch.tensor([0]))]
    model = Fixed().train()
    result = evaluate(model, batches, ONE, model, lambda: 0)
    assert result["top1"] == pytest.approx(100 / 3)
    assert result["top5"] == pytest.approx(200 / 3)
    expected = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0])).item()
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    assert model.training


@pytest.mark.slow
def test_a_compiled_model_trains_like_an_eager_one(tmp_path: Path) -> None:
    # In processes of their own, without the checks of shapes in signatures, which a compiler cannot see through.
    losses = []
    for name, more in (("eager", ()), ("compiled", ("trainer.compile=true",))):
        folder = tmp_path / name
        settings = (*TINY, "trainer.epochs=1", "fusion=upper", "fusion.budget=5", *more)
        done = python("train.py", *settings, f"run_dir={folder}")
        assert done.returncode == 0, done.stderr[-4000:]
        losses.append([line["loss"] for line in metrics(folder) if line["kind"] == "train"])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_outside_a_checkout_the_environment_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("famba.__file__", str(tmp_path / "famba" / "__init__.py"))
    monkeypatch.delenv("FAMBA_COMMIT", raising=False)
    assert measure.git_commit() is None
    monkeypatch.setenv("FAMBA_COMMIT", "0123abc")
    assert measure.git_commit() == "0123abc"
