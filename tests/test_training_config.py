"""The configuration: what is shipped fits together, and what cannot work is refused with a way out."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from runs import check_command

from famba.errors import ConfigError
from famba.training import app, devices, graph
from famba.training.compose import Command, compose, groups
from famba.training.config import flatten, keys, plain
from famba.training.devices import choose_precision
from famba.training.setup import prepare


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where nothing may be left behind."""
    monkeypatch.chdir(tmp_path)


GROUPS = groups()
STRATEGIES = [name for name in GROUPS["fusion"] if name != "custom"]


@pytest.mark.parametrize(
    ("model", "data"),
    [(model, "cifar100") for model in GROUPS["model"]] + [("vim_micro", data) for data in GROUPS["data"]],
)
def test_every_model_data_set_and_strategy_fit_at_the_default_budget(model: str, data: str, tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "class").mkdir(parents=True)
    more = ["data.num_classes=7"] if data == "folder" else []
    more += [f"data.root={tmp_path}"] if data in ("folder", "imagenet") else []
    removed = set()
    for strategy in STRATEGIES:
        found = prepare(config := compose([f"model={model}", f"data={data}", f"fusion={strategy}", *more]))
        assert config.fusion.is_matched
        if strategy != "none":
            removed.add(sum(found.schedule))
    patches = found.tokens - 1
    assert removed == {round(patches * 6 / 7)}, "the same total, whatever the strategy"


def test_every_recipe_logger_and_experiment_composes() -> None:
    for override in [f"{group}={choice}" for group in ("recipe", "logger") for choice in GROUPS[group]]:
        assert set(flatten(plain(compose([override])))) == set(keys())
    for experiment in GROUPS["experiment"]:
        for strategy in ("none", "adaptive"):
            prepare(compose([f"experiment={experiment}", f"fusion={strategy}", "model=vim_micro", "seed=0"]))


def test_the_paper_recipe_is_the_released_one() -> None:
    config = compose(["model=vim_s", "fusion=upper"])
    assert (config.trainer.epochs, config.trainer.batch_size, config.trainer.precision) == (300, 512, "fp32")
    assert asdict(config.recipe) == {
        "optimizer": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "lr": 5e-4, "lr_batch": 512, "weight_decay": 0.1,
        "layer_decay": None, "clip_grad": None, "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5,
        "lr_steps": "epoch", "mixup": 0.8, "cutmix": 1.0, "mixup_switch": 0.5, "label_smoothing": 0.1,
        "ema_decay": 0.99996, "augmentation": "batch", "crop_padding": None, "hflip": 0.5,
        "auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "random_erasing": 0.25, "erasing_mode": "pixel",
        "interpolation": "bicubic", "eval_crop": 0.875, "repeats": 3,
    }  # fmt: skip
    assert config.model.drop_path == 0
    assert config.data.mean == [0.485, 0.456, 0.406]
    assert config.data.std == [0.229, 0.224, 0.225]
    found = prepare(config)
    assert (found.image_size, found.tokens, sum(found.schedule)) == (224, 197, 168)
    assert found.schedule[:6] == (0,) * 6
    literal = compose(["fusion=upper", "fusion.budget=paper"])
    assert (prepare(literal).schedule, literal.fusion.is_matched) == ((0,) * 6 + (9,) * 18, False)


# Arguments, and what the error says. LONG stands for a name that no file system takes.
LONG = "x" * 300
REFUSED = [
    ("fusion=uper", "unknown fusion 'uper', did you mean 'upper'?; allowed: adaptive, all, custom"),
    ("fuson=upper", "unknown key 'fuson', did you mean 'fusion'?"),
    ("trainer.epochs=many", "trainer.epochs is 'many': input should be a valid integer"),
    ("trainer.epochs=0", "trainer.epochs is 0: input should be greater than or equal to 1"),
    ("fusion", "overrides look like fusion=upper"),
    ("run_dir=runs/a=1", "a value with = or , in it like \"run_dir='a=1,b=2'\""),
    ("fusion=upper fusion.budget=500", "fusion.budget", "the largest that fits is 48"),
    ("fusion=upper fusion.layers=25", "fusion.layers is 25; allowed: 1 to 2"),
    ("fusion=custom", "needs a list of layers"),
    ("data.image_size=389", "data.image_size", "is not divisible by patch size"),
    ("model.num_classes=7", "the data has 10 classes, but model.num_classes is 7"),
    ("trainer.batch_size=32 trainer.accumulation=33", "trainer.batch_size is 32, but must be a multiple of 33"),
    ("trainer.batch_size=7 recipe.mixup=1.0", "mixup and cutmix pair", "7 is odd", "recipe.mixup"),
    ("data.val_fraction=0.99", "trainer.batch_size 32 does not fit into the 14 training images"),
    ("trainer.epochs=3 recipe.warmup_epochs=3", "recipe.warmup_epochs=3.0 leaves nothing of trainer.epochs=3"),
    ("data.device=cuda", "data.device=cuda, but the training runs on cpu; leave data.device at auto"),
    ("trainer.eval_images=9 data.val_fraction=0.1", "trainer.eval_images=9 is for test images", "leave it out"),
    ("data.device=gpu data.workers=-1", "data.device is 'gpu'", "data.workers is -1"),
    ("trainer.device=tpu", "trainer.device 'tpu' is not on this machine; allowed here: auto, cpu"),
    ("ops.backend=natve", "unknown backend 'natve', did you mean 'native'?"),
    ("ops.backend=mamba_ssm", "backend 'mamba_ssm' cannot be used: "),
    ("ops.backend=native trainer.precision=fp16", "ops.backend", "'native' does not serve float16", "use 'auto'"),
    ("trainer.cuda_graphs=true", "trainer.cuda_graphs=true cannot be: the device is cpu; leave it at auto"),
    ("init_from=LONG", "init_from=x", "is no file"),
    ("recipe.random_erasing=0.5", "recipe.crop_padding is 0, which is no crop at all", "set it to null"),
    ("recipe.crop_padding=null recipe.auto_augment=augmix-m3", "recipe.auto_augment 'augmix-m3' does not work on"),
    ("recipe.augmentation=timm recipe.crop_padding=3", "recipe.crop_padding", "augmentation 'timm' does not use it"),
    ("recipe.augmentation=timm recipe.auto_augment=rand-n3000000", "recipe.auto_augment 'rand-n3000000' is no policy"),
    ("recipe.optimizer=adamx", "recipe.optimizer=adamx does not work with this recipe here, did you mean 'adam"),
    ("data=cifar100 data.root=absent", "data.root absent is no folder; give the one that holds the data"),
    ("data=folder", "data 'folder' needs data.root, the folder that holds"),
    ("data=cifar100 data.num_classes=80", "data.num_classes is 80, but cifar100 has 100 classes"),
    ("model=vit_tiny model.d_state=4", "model.d_state=4 cannot be chosen for"),
    ("model=vim_ti fusion.proportional=true", "fusion.proportional is about attention, and a Vim has none"),
    ("model=vim_ti fusion.place=after_attention", "did you mean 'after_scan'?, where a Vim reduces no tokens"),
    ("model=vit_tiny model.name=vit_base_patch16_siglip_224", "global_pool='map'"),
    ("model=vit_tiny fusion.mode=prune fusion.proportional=true", "has no effect with fusion.mode=prune"),
    ("model=vit_tiny model.embed_dim=100", "cannot be built with these model keys"),
    ("fusion=upper fusion.adapt_at=[0.5]", "fusion.adapt_at has a value with fusion=adaptive alone"),
    ("fusion=adaptive fusion.adapt_images=null", "must have one there"),
    ("fusion=adaptive fusion.adapt_at=[1.5]", "fusion.adapt_at is [1.5]; allowed: 1 to 6 shares"),
    ("--config-name=other", "--config-name is not taken; add your own files by --config-dir"),
    ("fusion=none,upper", "add -m for a run with each"),
    ("-m seed=0,1 --cfg=job", "--cfg shows one run; leave out -m"),
    ("-m fusion=upper fusion.layers=20 model.depth=24,8", "fusion.layers is 20; allowed: 1 to 8"),
]
SMALL = ("model=vim_micro", "model.depth=2", "data=digits", "recipe=quick", "fusion.budget=8")


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command; return the error with which it is refused, before any work and any folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(app, "start_process", None)
        assert app.main(arguments) == 2, arguments
    message = capsys.readouterr().err
    assert message.startswith("error: "), arguments
    assert "Traceback" not in message, arguments
    assert list(Path.cwd().iterdir()) == [], arguments
    return message


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused[0])
def test_what_cannot_work_is_refused_before_any_work(
    refused: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    given = refused[0].replace("LONG", LONG).split()
    message = refusal([*[item for item in given if item == "-m"], *SMALL, *[i for i in given if i != "-m"]], capsys)
    for part in refused[1:]:
        assert part in message


def test_an_unknown_optimizer_is_named_where_steps_would_be_graphs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_DEVICES", ["cuda", "cpu"])
    with pytest.raises(ConfigError, match="recipe.optimizer=adamx does not work .* did you mean 'adam"):
        prepare(compose([*SMALL, "recipe.optimizer=adamx"]))
    prepare(compose([*SMALL, "recipe.optimizer=lookahead_adamw"]))


def test_a_recipes_warm_up_shrinks_with_the_epochs() -> None:
    assert compose(["trainer.epochs=2"]).recipe.warmup_epochs == 0, "5 of 300, whole epochs"
    light = Command(("recipe=light", "trainer.epochs=2"))
    assert light.config().recipe.warmup_epochs == pytest.approx(2 * 2 / 30, abs=1e-4)
    assert light.notes == ["recipe.warmup_epochs=2 is for 30 epochs; with trainer.epochs=2 it is 0.1333"]
    assert compose(["recipe=light", "trainer.epochs=3"]).recipe.warmup_epochs == 2, "it fits"


def test_what_is_misspelt_is_named_with_what_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    for group in ("model", "fusion", "data", "recipe", "logger", "experiment"):
        choice = next(iter(GROUPS[group]))
        assert f"unknown {group} '{choice}x', did you mean" in refusal([f"{group}={choice}x"], capsys)
    for key in keys()[::7]:
        wrong = f"{key[:-1]}{key[-1]}q"
        for sign in ("", "+", "++"):
            message = refusal([f"{sign}{wrong}=3"], capsys)
            assert re.match(f"error: unknown key '{wrong}', did you mean '[^?]*{key}'", message), message


def test_bf16_is_refused_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_bf16", lambda device: False)
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="has no trainer.precision=bf16; use fp32 or auto"):
        choose_precision("bf16", cpu)
    assert choose_precision("auto", cpu) is None
    monkeypatch.setattr(devices, "has_bf16", lambda device: True)
    assert choose_precision("auto", cpu) == torch.bfloat16
    assert choose_precision("fp32", cpu) is None


def test_torchrun_and_sweeps_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="-m does not go with torchrun"):
        check_command(["-m", "fusion=none,upper"])
    with pytest.raises(ConfigError, match="trainer.batch_size is 9, but must be a multiple of 2"):
        prepare(compose(["trainer.batch_size=9"]))
