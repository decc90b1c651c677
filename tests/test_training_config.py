"""The configuration: what is shipped fits together, and what cannot work is refused with a way out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from runs import check_command

from famba.errors import CheckpointError, ConfigError
from famba.files import write_whole
from famba.training import app, devices
from famba.training.checkpoint import save_weights
from famba.training.compose import compose, groups
from famba.training.config import RunConfig, flatten, keys, parse, plain
from famba.training.devices import choose_device, choose_precision
from famba.training.logging import duration
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


# Arguments, and what the error says. LONG stands for a name that no file system takes.
LONG = "x" * 300
REFUSED = [
    ("fusion=uper", "unknown fusion 'uper', did you mean 'upper'?; allowed: adaptive, all, custom"),
    ("model=vim_tiny", "unknown model 'vim_tiny', did you mean 'vit_tiny' or 'vim_ti'?"),
    ("model=null", "unknown model None; allowed: vim_b"),
    ("trainer.epoch=3", "unknown key 'trainer.epoch', did you mean 'trainer.epochs'?"),
    ("fuson=upper", "unknown key 'fuson', did you mean 'fusion'?"),
    ("+trainer.extra=1", "unknown key 'trainer.extra'"),
    ("trainer.epochs=many", "trainer.epochs is 'many': input should be a valid integer"),
    ("trainer.epochs=0", "trainer.epochs is 0: input should be greater than or equal to 1"),
    ("trainer.epochs=null", "trainer.epochs is None"),
    ("trainer.epochs=[1,2", "'trainer.epochs=[1,2' cannot be read"),
    ("fusion", "overrides look like fusion=upper"),
    ("model.cls_position=tail", "model.cls_position is 'tail': input should be 'head', 'middle' or"),
    ("model.name=vim_huge", "unknown model.name 'vim_huge'"),
    ("fusion.strategy=uper", "unknown fusion strategy 'uper', did you mean 'upper'?"),
    ("fusion=upper fusion.budget=500", "fusion.budget", "the largest that fits is 48"),
    ("fusion=upper fusion.budget=3.5", "fusion.budget", "between 0 and 1"),
    ("fusion=upper fusion.budget=lots", "fusion.budget is 'lots'; allowed"),
    ("fusion=upper fusion.budget=-7", "fusion.budget is -7; allowed"),
    ("fusion=upper fusion.budget=[1,1]", "fusion.budget"),
    ("fusion=custom fusion.budget=paper fusion.layers=[1]", "fusion.budget"),
    ("fusion=custom fusion.budget=[1,1,1,1]", "fusion.budget"),
    ("fusion=custom fusion.budget=[60,0]", "fusion.budget"),
    ("fusion=custom fusion.budget=[0,-3]", "fusion.budget"),
    ("fusion.budget=inf", "fusion.budget is inf: input should be a valid integer or a finite number"),
    ("fusion=upper fusion.layers=25", "fusion.layers is 25; allowed: 1 to 2"),
    ("fusion=all fusion.layers=3", "strategy 'all' takes no layers"),
    ("fusion=custom", "needs a list of layers"),
    ("fusion=custom fusion.layers=[3]", "fusion.layers holds 3; allowed: 0 to 1"),
    ("fusion=custom fusion.layers=[1,1]", "fusion.layers"),
    ("fusion=custom fusion.layers=3", "fusion.layers"),
    ("fusion=custom fusion.layers=[]", "fusion.layers"),
    ("fusion=custom fusion.layers=[1] fusion.budget=[0,1]", "fusion.layers"),
    ("data.image_size=389", "data.image_size", "is not divisible by patch size"),
    ("model.patch_size=7", "data.image_size"),
    ("data.image_size=16384 model.patch_size=1 model.embed_dim=1024", "data.image_size"),
    ("model.num_classes=7", "the data has 10 classes, but model.num_classes is 7"),
    ("model.depth=10000", "model.depth is 10000: input should be less than or equal to 512"),
    ("model.depth=47 model.embed_dim=16384 model.d_state=1024", "GiB for its weights", "choose less of model.depth"),
    (
        "trainer.batch_size=32 trainer.accumulation=33",
        "trainer.batch_size=32 is not divisible by 1 processes x",
        "=33; 33",
    ),
    ("trainer.batch_size=7 recipe.mixup=1.0", "mixup and cutmix pair", "7 is odd", "recipe.mixup"),
    ("trainer.batch_size=7 recipe.cutmix=1", "trainer.batch_size", "recipe.cutmix"),
    ("data=cifar10 trainer.batch_size=60000", "trainer.batch_size=60000 does not fit into the 50000 training images"),
    ("data.subset=15", "trainer.batch_size", "data.subset"),
    ("data.subset=1438", "data.subset"),
    ("data=cifar100 data.subset=60000", "data.subset is 60000, but must be from 1 to the 50000 training images"),
    ("data.val_fraction=0.99", "trainer.batch_size", "data.val_fraction"),
    ("trainer.epochs=3 recipe.warmup_epochs=3", "recipe.warmup_epochs=3.0 leaves nothing of trainer.epochs=3"),
    ("trainer.device=tpu", "unknown trainer.device 'tpu'"),
    ("trainer.device=cuda:93", "trainer.device"),
    ("ops.backend=natve", "unknown backend 'natve', did you mean 'native'?"),
    ("ops.backend=mamba_ssm", "backend 'mamba_ssm' cannot be used: "),
    ("ops.backend=native trainer.precision=fp16", "ops.backend", "'native' does not serve float16", "use 'auto'"),
    ("trainer.cuda_graphs=true", "trainer.cuda_graphs=true cannot be: the device is cpu; leave it at auto"),
    ("resume=ato", "resume=ato is no file, did you mean 'auto'?"),
    ("init_from=none.pth", "init_from=none.pth is no file"),
    ("resume=LONG", "resume=x", "cannot be looked up"),
    ("init_from=LONG", "init_from=x", "cannot be looked up"),
    ("run_dir=LONG", "run_dir=", "cannot be looked up"),
    ("run_dir=/dev/null/run3", "run_dir=/dev/null/run3 cannot be written"),
    ("recipe.random_erasing=0.5", "recipe.crop_padding is 0", "set it to null"),
    ("recipe.auto_augment=augmix-m3", "recipe.crop_padding is 0"),
    (
        "recipe.crop_padding=null recipe.auto_augment=augmix-m3",
        "recipe.auto_augment 'augmix-m3' does not work on whole",
    ),
    ("recipe.augmentation=timm recipe.crop_padding=3", "recipe.crop_padding", "augmentation 'timm' does not use it"),
    ("recipe.augmentation=timm recipe.auto_augment=rand-n3000000", "recipe.auto_augment 'rand-n3000000' is no policy"),
    ("recipe.augmentation=timm recipe.auto_augment=rand-q3", "recipe.auto_augment"),
    ("recipe.augmentation=timm recipe.auto_augment=rnd-m3", "recipe.auto_augment"),
    ("recipe.augmentation=timm recipe.auto_augment=rand-tnone3", "recipe.auto_augment"),
    ("recipe.optimizer=adamx", "unknown recipe.optimizer 'adamx'"),
    ("recipe.optimizer=adan", "recipe.optimizer=adan does not work with this recipe here"),
    ("recipe.optimizer=adahessian", "recipe.optimizer"),
    ("recipe.lr=nan", "recipe.lr is nan: input should be a finite number"),
    ("data.std=[0,0,0]", "data.std is 0"),
    ("data.root=''", "data.root is '': string should have at least 1 character"),
    ("data=cifar100 data.root=absent", "data.root absent is no folder; give the one that holds the data"),
    ("data=folder", "data 'folder' needs data.root, the folder that holds"),
    ("data=folder data.root=/absent/3", "data.root"),
    ("data=digits data.root=/absent/3", "data.root"),
    ("data.name=wds/", "data.name: unknown data 'wds/'"),
    ("data.name=hf/x", "data.name: unknown data 'hf/x'"),
    ("data=cifar100 data.num_classes=80", "data.num_classes is 80, but cifar100 has 100 classes"),
    ("--config-name=other", "--config-name is not taken; add your own files by --config-dir"),
    ("--experimental-rerun=run.pickle", "--experimental-rerun is not taken"),
    ("fusion=none,upper", "add -m for a run with each"),
    ("~trainer.epochs", "trainer"),
    ("trainer.epochs.x=1", "trainer"),
    ("trainer={x:1}", "trainer"),
    ("trainer=3", "trainer"),
    ("-m fusion=none,uper", "unknown fusion 'uper'"),
    ("-m fusion=upper fusion.layers=20 model.depth=24,8", "fusion.layers is 20; allowed: 1 to 8"),
    ("-m trainer.batch_size=32,7 recipe.mixup=1", "trainer.batch_size"),
]
# Values that no key takes.
WRONG = ("{a:1}", "[[1,2]]", "nan", "-inf", "[a,b]", "1e999", "1" * 400, "${nowhere}", "${", "???", "[1,", "{a", "'a")
WRONG += ("1,2", "choice(1,2)", "int(x)", "range(1,5)")
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


def leaves(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of the schema and its annotation: a key that is added is tried from then on."""
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        kind, key = hints[field.name], f"{prefix}{field.name}"
        if is_dataclass(kind):
            yield from leaves(kind, f"{key}.")  # type: ignore[arg-type]
        else:
            yield key, kind


def beyond(kind: Any) -> Iterator[float]:
    """Yield numbers just outside the bounds of an annotation of numbers."""
    if not hasattr(kind, "__metadata__"):
        for member in get_args(kind):
            yield from beyond(member)
    elif kind.__origin__ in (int, float):
        for rule in (rule for field in kind.__metadata__ for rule in field.metadata):
            for side, step in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
                if hasattr(rule, side):
                    yield getattr(rule, side) + step


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_values_that_a_key_does_not_take_are_refused_by_the_key(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (key, kind) in enumerate(leaves()):
        # Of the values that no key takes one after the other: all of them for each key would take minutes.
        wrong = [WRONG[number % len(WRONG)], WRONG[(5 * number + 1) % len(WRONG)], *dict.fromkeys(beyond(kind))]
        for value in wrong if number % 4 == part else []:
            if not (value in ("[a,b]", "1,2") and "list" in str(kind)):
                assert key in refusal([*SMALL, f"{key}={value}"], capsys), f"{key}={value}"


def test_what_is_misspelt_is_named_with_what_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    for group in ("model", "fusion", "data", "recipe", "logger", "experiment"):
        choice = GROUPS[group][0]
        assert f"unknown {group} '{choice}x', did you mean" in refusal([f"{group}={choice}x"], capsys)
    for key in keys()[::7]:
        wrong = f"{key[:-1]}{key[-1]}q"
        for sign in ("", "+", "++"):
            message = refusal([f"{sign}{wrong}=3"], capsys)
            assert re.match(f"error: unknown key '{wrong}', did you mean '[^?]*{key}'", message), message


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
        prepare(compose(["trainer.batch_size=9"]))


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, lambda file: Path(file).write_text("old"))
    plain = path.with_name("plain")
    plain.touch()
    save_weights(path.with_name("weights"), {"x": torch.zeros(1)})
    assert path.with_name("weights").stat().st_mode == path.stat().st_mode == plain.stat().st_mode

    def fail(file: str) -> None:
        Path(file).write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device; the file before it is unharmed"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"file", "plain", "weights"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(44.6, "45 s"), (600, "10 min"), (12000, "3 h 20 min"), (200000, "2 d 7 h")]
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
