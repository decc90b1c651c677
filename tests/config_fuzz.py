"""Command lines that must be refused, drawn from the schema of the configuration, and the judge of what happens.

A key that is added to famba.training.config is fuzzed from then on, by its annotation.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import string
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import annotated_types

from famba.training import app
from famba.training.compose import groups, quoted
from famba.training.config import RunConfig, keys

TINY = ("model=vim_micro", "model.depth=2", "data=digits", "recipe=quick", "fusion.budget=8")
HANG_S = 60.0

# Text that means nothing to Famba itself. Any other text is a name or a file, which a random one is not.
FREE_TEXT = {"run_dir", "logger.project", "logger.entity", "logger.group"}
FOLDERS = {"data.root": ("data=folder", "data.num_classes=7")}

NAMES = (
    "x",
    "a b",
    "it's",
    'say "no"',
    "Größe",
    "雪",
    "two\nlines",
    "tab\t",
    "{",
    "[",
    "]",
    "$",
    "a,b",
    "a=b",
    "#",
    "%",
    "~",
)
NAMES += ("\\", "/", "a/../b", "-1", "null", "none ", "true", "1e3", "x" * 300, "\u202e", "${", "a:b", "*", "()")
SCALARS = (
    True,
    -1,
    0,
    1,
    3,
    10**6,
    10**12,
    10**30,
    10**400,
    -0.5,
    0.5,
    1.5,
    1e-300,
    1e300,
    math.nan,
    math.inf,
    -math.inf,
)
LISTS = (
    (),
    (1,),
    (0.5, 0.5, 0.5, 0.5),
    ("a", "b"),
    (None,),
    ((1, 2),),
    (-1, -1, -1),
    (math.nan,) * 3,
    (2, 2),
    (1e9,) * 3,
)
MAPS = ({}, {"a": 1}, {"a": {"b": None}})


@dataclass(frozen=True)
class Case:
    """A command line, and what its refusal has to name."""

    arguments: tuple[str, ...]
    named: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Verdict:
    """What a command line led to; `fault` is None where it was refused as it should be."""

    case: Case
    message: str
    seconds: float
    fault: str | None


def cases(count: int, seed: int) -> list[Case]:
    """Draw command lines that must be refused: a third is one wrong value each, the rest all other kinds in turn."""
    rng = random.Random(seed)
    drawn: dict[tuple[str, ...], Case] = {}
    makers: list[Callable[[random.Random], Case]] = [_wrong_value, _combination, _wrong_value, _misspelt, _structure]
    while len(drawn) < count:
        case = makers[len(drawn) % len(makers)](rng)
        if case.arguments in drawn:  # short lists run out before long ones
            case = _wrong_value(rng)
        drawn[case.arguments] = case
    return list(drawn.values())


def judge(case: Case, folder: Path) -> Verdict:
    """Run a case in this process, in an empty folder."""
    errors, output = io.StringIO(), io.StringIO()
    started = time.perf_counter()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output), _no_run():
            status: int | str | None = app.main(list(case.arguments))
    except _AcceptedError:
        status = "accepted"
    except SystemExit as stop:
        status = f"SystemExit({stop.code})"
    except BaseException as error:
        status = f"{type(error).__name__}: {error}"
    finally:
        os.chdir(before)
    seconds = time.perf_counter() - started
    return Verdict(case, errors.getvalue(), seconds, fault(case, status, errors.getvalue(), seconds, folder))


def fault(
    case: Case, status: int | str | None, message: str, seconds: float, folder: Path, limit_s: float = HANG_S
) -> str | None:
    """Say what is wrong with how a case ended, None where nothing is."""
    if status != 2:
        return f"status {status}, expected 2"
    if not message.startswith("error: "):
        return "the message does not start with 'error: '"
    if "Traceback" in message:
        return "a traceback"
    missing = [key for key in case.named if key not in message]
    if missing:
        return f"does not name {', '.join(missing)}"
    if seconds > limit_s:
        return f"took {seconds:.1f} s"
    left = [path.name for path in folder.iterdir()]
    return f"left {', '.join(left)} behind" if left else None


def leaves(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the schema and its annotation."""
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        kind, key = hints[field.name], f"{prefix}{field.name}"
        if is_dataclass(kind):
            yield from leaves(kind, f"{key}.")  # type: ignore[arg-type]
        else:
            yield key, kind


def accepts(kind: Any, value: object, name: bool = False) -> bool:
    """Whether an annotation allows a value; `name`: text is a name, of which a random one is none."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return accepts(arguments[0], value, name) and all(_holds(rule, value) for rule in _rules(arguments[1:]))
    if origin is Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in arguments)
    if origin is list:
        return isinstance(value, tuple) and all(accepts(arguments[0], item, name) for item in value)
    if arguments:
        return any(accepts(member, value, name) for member in arguments)
    return _is_plain(kind, value, name)


def valid(rng: random.Random, kind: Any) -> object:
    """Draw a value that an annotation of numbers, choices or lists allows."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return rng.choice(arguments)
    if origin is Annotated:
        rules = _rules(arguments[1:])
        if get_origin(arguments[0]) is list:
            length = next(rule.min_length for rule in rules if isinstance(rule, annotated_types.MinLen))
            return tuple(valid(rng, get_args(arguments[0])[0]) for _ in range(length))
        return _between(rng, arguments[0], rules)
    if kind is bool:
        return rng.random() < 0.5
    return valid(rng, rng.choice([member for member in arguments if member is not NoneType]))


def is_drawable(kind: Any) -> bool:
    """Whether `valid` draws for an annotation: there is no text in it, and each list has a length."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return get_origin(arguments[0]) is list or arguments[0] in (int, float)
    return origin is Literal or kind in (bool, NoneType) or (bool(arguments) and all(map(is_drawable, arguments)))


def written(value: object) -> str:
    """Write a value as Hydra reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, tuple):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(item)}' for key, item in value.items())}}}"
    return repr(value)


class _AcceptedError(Exception):
    """A run would have started."""


@contextlib.contextmanager
def _no_run() -> Iterator[None]:
    def accept(arguments: list[str]) -> None:
        raise _AcceptedError

    start, app._hydra_main = app._hydra_main, accept
    try:
        yield
    finally:
        app._hydra_main = start


def _wrong_value(rng: random.Random) -> Case:
    key, kind = rng.choice(list(leaves()))
    name = key not in FREE_TEXT
    pool: list[object] = [None, *SCALARS, *LISTS, *MAPS, *NAMES, "", *_beyond(kind)]
    wrong = [value for value in pool if not accepts(kind, value, name) and not _is_interpolation(value)]
    value = rng.choice(wrong)
    return Case((*TINY, *FOLDERS.get(key, ()), f"{key}={written(value)}"), (key,), "value")


def _misspelt(rng: random.Random) -> Case:
    known, choices = keys(), groups()
    choices = {group: found for group, found in choices.items() if not group.startswith("hydra")}
    if rng.random() < 0.5:
        group = rng.choice(list(choices))
        choice = _typo(rng, rng.choice(choices[group]), choices[group])
        return Case((f"{group}={choice}",), (group, choice), "choice")
    sections = {key.rsplit(".", 1)[0] for key in known}
    key = _typo(rng, rng.choice([*known, *choices]), [*known, *choices, *sections])
    return Case((f"{rng.choice(['', '+', '++'])}{key}={rng.randrange(9)}",), (key,), "key")


def _structure(rng: random.Random) -> Case:
    """Sections that are no sections, keys below keys, deleted keys, values that do not end."""
    key = rng.choice(keys())
    section = rng.choice(sorted({k.rsplit(".", 1)[0] for k in keys() if "." in k}))
    inside = next(k for k in keys() if k.startswith(f"{section}."))
    word = "".join(rng.choices(string.ascii_lowercase, k=5))
    draws = [
        ((f"~{key}",), key),
        ((f"{key}.{word}=1",), f"{key}.{word}"),
        ((f"+{section}.{word}=1",), f"{section}.{word}"),
        ((f"{section}={{{word}:1}}",), section),
        ((f"{inside}=[1,{word}",), inside),
        ((f"{inside}={{{word}",), inside),
        ((f"{inside}='{word}",), inside),
        ((f"{inside}=${{{word}}}",), inside),
        ((f"{inside}=${{{word}",), inside),
        ((f"{inside}=${{{inside}}}",), inside),
        ((f"{inside}=${{{word}:1}}",), inside),
        ((f"{inside}=???",), inside),
        ((f"{inside}={'9' * 5000}",), inside),
        ((f"{inside}=1,2",), inside),
        ((f"{inside}=choice(1,2)",), inside),
        ((f"{inside}=int({word})",), inside),
        ((f"{inside}=range(1,{rng.randrange(5, 99)})",), inside),
        ((f"{inside}",), inside),
    ]
    arguments, named = rng.choice(draws)
    return Case((*TINY, *arguments), (named,), "structure")


def _combination(rng: random.Random) -> Case:
    """Values that are allowed one by one."""
    n, odd = rng.randrange(2, 9), 2 * rng.randrange(1, 15) + 1
    strategy = rng.choice(["all", "interleaved", "lower", "upper"])
    draws: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
        ((f"fusion={strategy}", f"fusion.budget={rng.randrange(64, 10**6)}"), ("fusion.budget",)),
        ((f"fusion={strategy}", f"fusion.budget={-n}"), ("fusion.budget",)),
        ((f"fusion={strategy}", f"fusion.budget={n}.5"), ("fusion.budget",)),
        ((f"fusion={strategy}", "fusion.budget=[1,1]"), ("fusion.budget",)),
        (("fusion=custom", "fusion.budget=paper", "fusion.layers=[1]"), ("fusion.budget",)),
        (("fusion=custom", f"fusion.budget=[{','.join('1' * (n + 1))}]"), ("fusion.budget",)),
        (("fusion=custom", f"fusion.budget=[{n * 20},0]"), ("fusion.budget",)),
        (("fusion=custom", f"fusion.budget=[0,{-n}]"), ("fusion.budget",)),
        (("fusion=custom", f"fusion.layers=[{n}]"), ("fusion.layers",)),
        (("fusion=custom", "fusion.layers=[1,1]"), ("fusion.layers",)),
        (("fusion=custom", f"fusion.layers={n}"), ("fusion.layers",)),
        (("fusion=custom", "fusion.layers=[]"), ("fusion.layers",)),
        (("fusion=custom", "fusion.layers=[1]", "fusion.budget=[0,1]"), ("fusion.layers",)),
        (("fusion=upper", f"fusion.layers={rng.randrange(3, 99)}"), ("fusion.layers",)),
        (("fusion=lower", "fusion.layers=[0,1]"), ("fusion.layers",)),
        (("fusion=all", f"fusion.layers={n}"), ("fusion.layers",)),
        ((f"data.image_size={4 * rng.randrange(3, 99) + 1}",), ("data.image_size",)),
        ((f"model.patch_size={rng.choice([3, 5, 7, 9, 33, 999])}",), ("data.image_size",)),
        ((f"trainer.accumulation={rng.choice([3, 5, 7, 33, 10**6])}",), ("trainer.accumulation", "trainer.batch_size")),
        ((f"trainer.batch_size={rng.randrange(1438, 10**9)}",), ("trainer.batch_size",)),
        (("data=cifar10", f"trainer.batch_size={rng.randrange(50_001, 10**9)}"), ("trainer.batch_size",)),
        ((f"data.subset={rng.randrange(1, 32)}",), ("trainer.batch_size", "data.subset")),
        ((f"data.subset={rng.randrange(1438, 10**9)}",), ("data.subset",)),
        (("data=cifar100", f"data.subset={rng.randrange(50_001, 10**9)}"), ("data.subset",)),
        (("data.val_fraction=0.99",), ("trainer.batch_size", "data.val_fraction")),
        ((f"trainer.epochs={n}", f"recipe.warmup_epochs={n + rng.random()}"), ("recipe.warmup_epochs",)),
        ((f"trainer.batch_size={odd}", f"recipe.mixup={rng.random() + 0.1}"), ("trainer.batch_size", "recipe.mixup")),
        ((f"trainer.batch_size={odd}", "recipe.cutmix=1"), ("trainer.batch_size", "recipe.cutmix")),
        ((f"recipe.random_erasing={rng.random() + 1e-3}",), ("recipe.random_erasing",)),
        ((f"recipe.color_jitter={rng.random() + 1e-3}",), ("recipe.color_jitter",)),
        (("recipe.auto_augment=rand-m9",), ("recipe.auto_augment",)),
        (("recipe.augmentation=timm", f"recipe.crop_padding={n}"), ("recipe.crop_padding",)),
        (("recipe.augmentation=timm", f"recipe.auto_augment=rand-n{n * 10**6}"), ("recipe.auto_augment",)),
        (("recipe.augmentation=timm", f"recipe.auto_augment=rand-q{n}"), ("recipe.auto_augment",)),
        (("recipe.augmentation=timm", f"recipe.auto_augment=rnd-m{n}"), ("recipe.auto_augment",)),
        (("recipe.augmentation=timm", f"recipe.auto_augment=rand-tnone{n}"), ("recipe.auto_augment",)),
        ((f"model.depth={rng.randrange(40, 60)}", "model.embed_dim=16384", "model.d_state=1024"), ("model.embed_dim",)),
        (("data.image_size=16384", "model.patch_size=1", "model.embed_dim=1024"), ("data.image_size",)),
        ((f"model.num_classes={rng.randrange(1, 10)}",), ("model.num_classes",)),
        ((f"data.num_classes={rng.randrange(11, 99)}",), ("data.num_classes",)),
        ((f"data.num_classes={rng.randrange(1, 10)}",), ("data.num_classes",)),
        (("data=folder",), ("data.root",)),
        (("data=cifar10", f"data.root=/absent/{n}"), ("data.root",)),
        (("data=folder", f"data.root=/absent/{n}"), ("data.root",)),
        (("data=digits", f"data.root=/absent/{n}"), ("data.root",)),
        (("data.name=torch/cifar10",), ("data.root",)),
        (("data.name=wds/",), ("data.root",)),
        ((f"data.name=foo{n}/cifar10",), ("data.name",)),
        (("trainer.cuda_graphs=true",), ("trainer.cuda_graphs",)),
        ((f"trainer.device=cuda:{90 + n}",), ("trainer.device",)),
        (("ops.backend=native", "trainer.precision=fp16"), ("ops.backend",)),
        (("recipe.optimizer=adan",), ("recipe.optimizer",)),
        (("recipe.optimizer=adahessian",), ("recipe.optimizer",)),
        ((f"resume=absent{n}.pt",), ("resume",)),
        ((f"resume={'x' * 300 * n}",), ("resume",)),
        ((f"init_from=absent{n}.pt",), ("init_from",)),
        ((f"init_from={'x' * 300 * n}",), ("init_from",)),
        ((f"run_dir=/dev/null/run{n}",), ("run_dir",)),
        ((f"run_dir={'x' * (300 + n)}",), ("run_dir",)),
        (("-m", "fusion=none,upper", f"fusion.layers={n}"), ("fusion.layers",)),
        (("-m", f"trainer.batch_size=32,{odd}", "recipe.mixup=1"), ("trainer.batch_size",)),
    ]  # fmt: skip
    changes, named = rng.choice(draws)
    flags = [item for item in changes if item.startswith("-")]
    return Case((*flags, *TINY, *(item for item in changes if item not in flags)), named, "combination")


def _typo(rng: random.Random, word: str, known: list[str]) -> str:
    while True:
        place = rng.randrange(len(word))
        letter = rng.choice(string.ascii_lowercase)
        changed = rng.choice([word[:place] + letter + word[place:], word[:place] + letter + word[place + 1 :]])
        if changed not in known:
            return changed


def _rules(metadata: tuple[Any, ...]) -> list[Any]:
    return [rule for item in metadata for rule in getattr(item, "metadata", [item])]


def _holds(rule: Any, value: Any) -> bool:
    checks: dict[type, Callable[[Any], bool]] = {
        annotated_types.Ge: lambda r: value >= r.ge,
        annotated_types.Gt: lambda r: value > r.gt,
        annotated_types.Le: lambda r: value <= r.le,
        annotated_types.Lt: lambda r: value < r.lt,
        annotated_types.MinLen: lambda r: len(value) >= r.min_length,
        annotated_types.MaxLen: lambda r: len(value) <= r.max_length,
    }
    return checks.get(type(rule), lambda r: True)(rule)


def _is_plain(kind: Any, value: object, name: bool) -> bool:
    if kind is NoneType:
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if kind is str:
        return isinstance(value, str) and not name
    if kind is float:
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind)


def _beyond(kind: Any) -> list[object]:
    """Numbers just outside the bounds of an annotation, and lists of other lengths."""
    arguments = get_args(kind)
    if get_origin(kind) is not Annotated:
        return [value for member in arguments if member is not NoneType for value in _beyond(member)]
    found: list[object] = []
    for rule in _rules(arguments[1:]):
        bound = next((getattr(rule, side) for side in ("ge", "gt", "le", "lt") if hasattr(rule, side)), None)
        if bound is not None:
            found += [bound, bound - 1, bound + 1, bound - 1e-3, bound + 1e-3]
    return found


def _between(rng: random.Random, kind: type, rules: list[Any]) -> object:
    low = next((getattr(r, s) for r in rules for s in ("ge", "gt") if hasattr(r, s)), 0)
    high = next((getattr(r, s) for r in rules for s in ("le", "lt") if hasattr(r, s)), 1)
    if kind is int:
        return rng.choice([low, rng.randint(low, high), high - 1])
    return rng.choice(
        [low if hasattr(rules[0], "ge") else low + 1e-6, low + (high - low) * rng.uniform(1e-6, 1 - 1e-6)]
    )


def _is_interpolation(value: object) -> bool:
    return isinstance(value, str) and "${" in value
