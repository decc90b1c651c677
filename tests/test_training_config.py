"""The configuration: what is shipped fits together, and what cannot work is refused with a way out."""

from __future__ import annotations

import itertools
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from runs import check_command

from famba.errors import BackendError, CheckpointError, ConfigError, DataError, FambaError
from famba.files import write_whole
from famba.training import devices, setup
from famba.training.compose import compose, groups
from famba.training.config import flatten, keys, parse, plain
from famba.training.devices import choose_device, choose_precision
from famba.training.reporting import duration
from famba.training.setup import prepare


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where nothing may be left behind."""
    monkeypatch.chdir(tmp_path)


GROUPS = groups()
STRATEGIES = [name for name in GROUPS["fusion"] if name != "custom"]


def class_folders(folder: Path) -> Path:
    """Make the folders that data=folder looks for, without images."""
    for part in ("train", "val"):
        (folder / part / "class").mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize(("model", "data"), list(itertools.product(GROUPS["model"], GROUPS["data"])))
def test_every_model_data_set_and_strategy_fit_at_the_default_budget(model: str, data: str, tmp_path: Path) -> None:
    classes = ["data.num_classes=7"] if data == "folder" else []
    root = [f"data.root={class_folders(tmp_path)}"] if data in ("folder", "imagenet") else []
    removed = set()
    for strategy in STRATEGIES:
        found = prepare(compose([f"model={model}", f"data={data}", f"fusion={strategy}", *classes, *root]))
        assert found.matched
        if strategy != "none":
            removed.add(sum(found.schedule))
    patches = found.tokens - 1
    assert removed == {round(patches * 6 / 7)}, "the same total, whatever the strategy"


@pytest.mark.parametrize("recipe", GROUPS["recipe"])
def test_every_recipe_composes_with_every_logger(recipe: str) -> None:
    for logger in GROUPS["logger"]:
        config = compose([f"recipe={recipe}", f"logger={logger}"])
        assert set(flatten(plain(config))) == set(keys())


def test_every_experiment_composes() -> None:
    for experiment in GROUPS["experiment"]:
        for strategy in STRATEGIES:
            prepare(compose([f"experiment={experiment}", f"fusion={strategy}", "model=vim_micro", "seed=0"]))


def test_the_paper_recipe_is_the_released_one() -> None:
    config = compose(["model=vim_s", "fusion=upper"])
    assert (config.trainer.epochs, config.trainer.batch_size, config.trainer.precision) == (300, 512, "fp32")
    assert asdict(config.recipe) == {
        "optimizer": "adamw",
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "lr": 5e-4,
        "lr_batch": 512,
        "weight_decay": 0.1,
        "layer_decay": None,
        "clip_grad": None,
        "warmup_epochs": 5,
        "warmup_lr": 1e-6,
        "min_lr": 1e-5,
        "lr_steps": "epoch",
        "mixup": 0.8,
        "cutmix": 1.0,
        "mixup_switch": 0.5,
        "label_smoothing": 0.1,
        "ema_decay": 0.99996,
        "augmentation": "timm",
        "crop_padding": 0,
        "hflip": 0.5,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.3,
        "random_erasing": 0.25,
        "erasing_mode": "pixel",
        "interpolation": "bicubic",
        "eval_crop": 0.875,
        "repeats": 3,
    }
    assert config.model.drop_path == 0
    assert config.data.mean == [0.485, 0.456, 0.406]
    assert config.data.std == [0.229, 0.224, 0.225]
    found = prepare(config)
    assert (found.image_size, found.tokens, sum(found.schedule)) == (224, 197, 168)
    assert found.schedule[:6] == (0,) * 6


def test_the_literal_counts_of_the_paper_are_named_as_not_matched() -> None:
    found = prepare(compose(["fusion=upper", "fusion.budget=paper"]))
    assert found.schedule == (0,) * 6 + (9,) * 18
    assert not found.matched


def test_custom_schedules_come_by_layers_or_by_counts() -> None:
    by_layers = prepare(compose(["model=vim_micro", "fusion=custom", "fusion.layers=[2,5,7]", "fusion.budget=30"]))
    assert [i for i, r in enumerate(by_layers.schedule) if r] == [2, 5, 7]
    assert sum(by_layers.schedule) == 30
    counts = "[0,0,20,0,10,0,0,0]"
    assert prepare(compose(["model=vim_micro", "fusion=custom", f"fusion.budget={counts}"])).schedule[2] == 20


REFUSED = [
    (["fusion=uper"], ConfigError, "unknown fusion 'uper', did you mean 'upper'?; allowed: adaptive, all, custom"),
    (["model=vim_tiny"], ConfigError, "unknown model 'vim_tiny', did you mean 'vit_tiny' or 'vim_ti'?"),
    (["recipe=papr"], ConfigError, "unknown recipe 'papr', did you mean 'paper'?"),
    (["data=cifar1000"], ConfigError, "unknown data 'cifar1000', did you mean 'cifar100'?"),
    (["trainer.epoch=3"], ConfigError, "unknown key 'trainer.epoch', did you mean 'trainer.epochs'?"),
    (["fuson=upper"], ConfigError, "unknown key 'fuson', did you mean 'fusion'?"),
    (["+trainer.extra=1"], ConfigError, "unknown key 'trainer.extra'"),
    (["trainer.epochs=many"], ConfigError, "trainer.epochs is 'many': input should be a valid integer"),
    (["trainer.epochs=0"], ConfigError, "trainer.epochs is 0: input should be greater than or equal to 1"),
    (["trainer.epochs=null"], ConfigError, "trainer.epochs is None"),
    (["model.cls_position=tail"], ConfigError, "model.cls_position is 'tail': input should be 'head', 'middle' or"),
    (["model.name=vim_huge"], ConfigError, "unknown model.name 'vim_huge'"),
    (["fusion.strategy=uper"], ConfigError, "unknown fusion strategy 'uper', did you mean 'upper'?"),
    (["fusion=upper", "fusion.budget=500"], ConfigError, "the largest that fits is 195"),
    (["fusion=upper", "fusion.budget=1.5"], ConfigError, "between 0 and 1"),
    (["fusion=upper", "fusion.budget=lots"], ConfigError, "budget is 'lots'; allowed"),
    (["fusion=upper", "fusion.layers=25"], ConfigError, "layers is 25; allowed: 1 to 24"),
    (["fusion=all", "fusion.layers=3"], ConfigError, "strategy 'all' takes no layers"),
    (["fusion=custom"], ConfigError, "needs a list of layers"),
    (["fusion=custom", "fusion.layers=[3,30]"], ConfigError, "layers holds 30; allowed: 0 to 23"),
    (["data.image_size=100"], ConfigError, "100 is not divisible by patch size 16; use 96 or 112"),
    (["model.num_classes=10"], ConfigError, "the data has 100 classes, but model.num_classes is 10"),
    (["trainer.accumulation=3"], ConfigError, "trainer.batch_size=512 is not divisible by 1 processes x .*=3; 513 is"),
    (["trainer.batch_size=7", "recipe=light"], ConfigError, "mixup and cutmix pair .* 7 is odd"),
    (["trainer.epochs=4"], ConfigError, "recipe.warmup_epochs=5.* leaves nothing of trainer.epochs=4"),
    (["trainer.device=tpu"], ConfigError, "unknown trainer.device 'tpu'"),
    (["ops.backend=natve"], BackendError, "unknown backend 'natve', did you mean 'native'?"),
    (["ops.backend=mamba_ssm"], BackendError, "backend 'mamba_ssm' cannot be used: .*; "),
    (["ops.backend=native", "trainer.precision=fp16"], BackendError, "'native' does not serve float16 .*use 'auto'"),
    (["ops.backend=nativ"], BackendError, "did you mean 'native'"),
    (["trainer.cuda_graphs=true"], ConfigError, "cannot be: the device is cpu; leave it at auto"),
    (["resume=ato"], CheckpointError, "resume=ato is no file, did you mean 'auto'?"),
    (["init_from=none.pth"], CheckpointError, "init_from=none.pth is no file"),
    (["recipe=light", "recipe.random_erasing=0.5"], ConfigError, "augmentation 'batch' does not use it"),
    (["recipe.crop_padding=4"], ConfigError, "augmentation 'timm' does not use it"),
    (["trainer.epochs=1", "recipe.warmup_epochs=1"], ConfigError, "leaves nothing of trainer.epochs=1"),
    (["fusion.budget=-7"], ConfigError, "budget is -7; allowed"),
    (["data.std=[0,0,0]"], ConfigError, "data.std is 0"),
    (["recipe.optimizer=adamx"], ConfigError, "unknown recipe.optimizer 'adamx'"),
    (["recipe.auto_augment=rnd-m9"], ConfigError, "auto_augment"),
    (["recipe.lr=nan"], ConfigError, "recipe.lr is nan: input should be a finite number"),
    (["fusion.budget=inf"], ConfigError, "fusion.budget is inf: input should be a valid integer or a finite number"),
    (["model.depth=10000"], ConfigError, "model.depth is 10000: input should be less than or equal to 512"),
    (["model.depth=50", "model.embed_dim=16384"], ConfigError, "GiB for its weights .* choose less of model.depth"),
    (["data.root=''"], ConfigError, "data.root is '': string should have at least 1 character"),
    (["data.root=absent"], DataError, "data.root absent is no folder; give the one that holds the data"),
    (["data=folder"], ConfigError, "data 'folder' needs data.root, the folder that holds"),
    (["data.name=hf/x"], ConfigError, "data.name: data 'hf/x': unknown prefix, known are .*"),
    (["data.num_classes=10"], ConfigError, "data.num_classes is 10, but cifar100 has 100 classes"),
    (["data.subset=60000"], ConfigError, "data.subset is 60000, but must be from 1 to the 50000 training images"),
    (["trainer.batch_size=60000"], ConfigError, "trainer.batch_size=60000 does not fit into the 50000 training images"),
    (["data.subset=600", "data.val_fraction=0.2"], ConfigError, "does not fit into the 480 .* choose 480 or fewer"),
    (["recipe.optimizer=adan"], ConfigError, "recipe.optimizer=adan does not work with this recipe here"),
    (["recipe.auto_augment=rand-n1000000"], ConfigError, "recipe.auto_augment 'rand-n1000000' is no policy"),
    ([f"resume={'x' * 300}"], ConfigError, "resume=x.* cannot be looked up"),
    ([f"run_dir={'x' * 300}"], ConfigError, "run_dir=.* cannot be looked up"),
    (["trainer.epochs=[1,2"], ConfigError, "'trainer.epochs=[1,2' cannot be read"),
    (["model=null"], ConfigError, "unknown model None; allowed: vim_b"),
    (["experiment=null"], ConfigError, "unknown experiment None"),
    (["--config-name=other"], ConfigError, "--config-name is not taken; add your own files by --config-dir"),
    (["--experimental-rerun=run.pickle"], ConfigError, "--experimental-rerun is not taken"),
    (["fusion=none,upper"], ConfigError, "add -m for a run with each"),
    (["fusion"], ConfigError, "overrides look like fusion=upper"),
]


@pytest.mark.parametrize(("overrides", "error", "message"), REFUSED, ids=lambda v: v[-1] if isinstance(v, list) else "")
def test_what_cannot_work_is_refused_before_any_work(
    overrides: list[str], error: type[FambaError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=re.sub(r"([?(\[])", r"\\\1", message)):
        check_command(overrides)
    assert not list(tmp_path.iterdir()), "no folder is made"


def test_a_sweep_is_checked_as_a_whole() -> None:
    check_command(["-m", "fusion=none,upper", "model=vim_ti,vim_s"])
    with pytest.raises(ConfigError, match="unknown fusion 'uper'"):
        check_command(["-m", "fusion=none,uper"])
    with pytest.raises(ConfigError, match="layers is 20; allowed: 1 to 8"):
        check_command(["-m", "fusion=upper", "fusion.layers=20", "model=vim_ti,vim_micro"])


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run_dir=.* cannot be written"):
        prepare(compose([f"run_dir={tmp_path}/file/run"]))


def test_a_key_that_is_missing_is_named() -> None:
    values = plain(compose([]))
    del values["recipe"]["lr"]
    with pytest.raises(ConfigError, match="recipe.lr is missing"):
        parse(values)


def test_bf16_is_refused_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_bf16", lambda device: False)
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="no bfloat16 instructions; use trainer.precision=fp32"):
        choose_precision("bf16", cpu)
    assert choose_precision("auto", cpu) is None
    monkeypatch.setattr(devices, "has_bf16", lambda device: True)
    assert choose_precision("auto", cpu) == torch.bfloat16
    assert choose_precision("fp32", cpu) is None


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="trainer.device 'cuda' is not on this machine; usable here: .*cpu"):
        choose_device("cuda")


def test_torchrun_and_sweeps_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="-m does not go with torchrun"):
        check_command(["-m", "fusion=none,upper"])
    with pytest.raises(ConfigError, match="trainer.batch_size=9 is not divisible by 2 processes"):
        setup.prepare(compose(["trainer.batch_size=9"]))


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, lambda file: Path(file).write_text("old"))

    def fail(file: str) -> None:
        Path(file).write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device; the file before it is unharmed"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(44.6, "45 s"), (600, "10 min"), (12000, "3 h 20 min"), (200000, "2 d 7 h")]
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
