"""Test that what cannot work is refused by the name of its key, before anything is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from famba.training import app
from famba.training.compose import groups
from famba.training.config import RunConfig, keys

TINY = ("model=vim_micro", "model.depth=2", "data=digits", "recipe=quick", "fusion.budget=8")

# Each value is allowed by itself, but not with the others: what has to be named.
TOGETHER = {
    "fusion=upper fusion.budget=64": "fusion.budget",
    "fusion=upper fusion.budget=-3": "fusion.budget",
    "fusion=upper fusion.budget=3.5": "fusion.budget",
    "fusion=upper fusion.budget=[1,1]": "fusion.budget",
    "fusion=custom fusion.budget=paper fusion.layers=[1]": "fusion.budget",
    "fusion=custom fusion.budget=[1,1,1,1]": "fusion.budget",
    "fusion=custom fusion.budget=[60,0]": "fusion.budget",
    "fusion=custom fusion.budget=[0,-3]": "fusion.budget",
    "fusion=custom fusion.layers=[3]": "fusion.layers",
    "fusion=custom fusion.layers=[1,1]": "fusion.layers",
    "fusion=custom fusion.layers=3": "fusion.layers",
    "fusion=custom fusion.layers=[]": "fusion.layers",
    "fusion=custom fusion.layers=[1] fusion.budget=[0,1]": "fusion.layers",
    "fusion=upper fusion.layers=35": "fusion.layers",
    "fusion=all fusion.layers=3": "fusion.layers",
    "data.image_size=389": "data.image_size",
    "model.patch_size=7": "data.image_size",
    "trainer.accumulation=33": "trainer.accumulation trainer.batch_size",
    "trainer.batch_size=1438": "trainer.batch_size",
    "data=cifar10 trainer.batch_size=60000": "trainer.batch_size",
    "data.subset=15": "trainer.batch_size data.subset",
    "data.subset=1438": "data.subset",
    "data=cifar100 data.subset=50001": "data.subset",
    "data.val_fraction=0.99": "trainer.batch_size data.val_fraction",
    "trainer.epochs=3 recipe.warmup_epochs=3.6": "recipe.warmup_epochs",
    "trainer.batch_size=7 recipe.mixup=1.0": "trainer.batch_size recipe.mixup",
    "trainer.batch_size=7 recipe.cutmix=1": "trainer.batch_size recipe.cutmix",
    "recipe.random_erasing=0.1": "recipe.random_erasing",
    "recipe.color_jitter=0.4": "recipe.color_jitter",
    "recipe.auto_augment=rand-m9": "recipe.auto_augment",
    "recipe.augmentation=timm recipe.crop_padding=3": "recipe.crop_padding",
    "recipe.augmentation=timm recipe.auto_augment=rand-n3000000": "recipe.auto_augment",
    "recipe.augmentation=timm recipe.auto_augment=rand-q3": "recipe.auto_augment",
    "recipe.augmentation=timm recipe.auto_augment=rnd-m3": "recipe.auto_augment",
    "recipe.augmentation=timm recipe.auto_augment=rand-tnone3": "recipe.auto_augment",
    "model.depth=47 model.embed_dim=16384 model.d_state=1024": "model.embed_dim",
    "data.image_size=16384 model.patch_size=1 model.embed_dim=1024": "data.image_size",
    "model.num_classes=7": "model.num_classes",
    "data.num_classes=80": "data.num_classes",
    "data.num_classes=2": "data.num_classes",
    "data=folder": "data.root",
    "data=cifar10 data.root=/absent/3": "data.root",
    "data=folder data.root=/absent/3": "data.root",
    "data=digits data.root=/absent/3": "data.root",
    "data.name=torch/cifar10": "data.root",
    "data.name=wds/": "data.root",
    "data.name=foo3/cifar10": "data.name",
    "trainer.cuda_graphs=true": "trainer.cuda_graphs",
    "trainer.device=cuda:93": "trainer.device",
    "ops.backend=native trainer.precision=fp16": "ops.backend",
    "recipe.optimizer=adan": "recipe.optimizer",
    "recipe.optimizer=adahessian": "recipe.optimizer",
    "resume=absent3.pt": "resume",
    "init_from=absent3.pt": "init_from",
    "run_dir=/dev/null/run3": "run_dir",
    "-m fusion=none,upper fusion.layers=3": "fusion.layers",
    "-m trainer.batch_size=32,7 recipe.mixup=1": "trainer.batch_size",
    "resume=LONG": "resume",
    "init_from=LONG": "init_from",
    "run_dir=LONG": "run_dir",
}
# Where LONG stands, a name that no file system takes.
LONG = "x" * 300

# No key takes these.
WRONG = (
    "{a:1}",
    "[[1,2]]",
    "nan",
    "-inf",
    "[a,b]",
    "1e999",
    "1" * 400,
    "${nowhere}",
    "${",
    "???",
    "[1,",
    "{a",
    "'a",
    "1,2",
)
WRONG += ("choice(1,2)", "int(x)", "range(1,5)")


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


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command; return the error with which it is refused."""
    assert app.main(arguments) == 2, arguments
    message = capsys.readouterr().err
    assert message.startswith("error: "), arguments
    assert "Traceback" not in message, arguments
    assert list(Path.cwd().iterdir()) == [], arguments
    return message


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "start_process", None)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_values_that_a_key_does_not_take_are_refused_by_the_key(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (key, kind) in enumerate(leaves()):
        # Of the values that no key takes one after the other: all of them for each key would take minutes.
        wrong = [WRONG[number % len(WRONG)], WRONG[(5 * number + 1) % len(WRONG)], *dict.fromkeys(beyond(kind))]
        for value in wrong if number % 4 == part else []:
            if not (value in ("[a,b]", "1,2") and "list" in str(kind)):
                assert key in refusal([*TINY, f"{key}={value}"], capsys), f"{key}={value}"


@pytest.mark.parametrize("arguments", TOGETHER)
def test_values_that_do_not_go_together_are_refused_by_their_keys(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments.replace("LONG", LONG).split()
    message = refusal([*[item for item in given if item == "-m"], *TINY, *[i for i in given if i != "-m"]], capsys)
    assert all(key in message for key in TOGETHER[arguments].split()), message


def test_what_is_misspelt_is_named_with_what_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    for group in ("model", "fusion", "data", "recipe", "logger", "experiment"):
        choice = groups()[group][0]
        assert f"unknown {group} '{choice}x', did you mean" in refusal([f"{group}={choice}x"], capsys)
    for key in keys()[::7]:
        wrong = f"{key[:-1]}{key[-1]}q"
        for sign in ("", "+", "++"):
            message = refusal([f"{sign}{wrong}=3"], capsys)
            assert re.match(f"error: unknown key '{wrong}', did you mean '[^?]*{key}'", message), message


@pytest.mark.parametrize(
    "override",
    ["~trainer.epochs", "trainer.epochs.x=1", "+trainer.x=1", "trainer={x:1}", "trainer.epochs", "trainer=3"],
)
def test_sections_and_keys_are_what_they_are(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "trainer" in refusal([*TINY, override], capsys)
