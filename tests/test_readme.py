"""Test that what README and docs show works as it stands there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from famba.data import LOADERS
from famba.fusion import RULES, schedule, tokens_per_layer
from famba.fusion.schedules import STRATEGIES
from famba.training import compose as composing
from famba.training.config import keys
from famba.training.setup import prepare

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXTENDING = (ROOT / "docs/extending.md").read_text()
TEXTS = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]


def example(name: str) -> str:
    """Return the code block behind a marker."""
    found = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)```", EXTENDING, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", ["strategy", "rule", "model", "data"])
def test_examples_run_and_are_short(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (STRATEGIES, LOADERS):
        for key in registry:
            monkeypatch.setitem(registry, key, registry[key])
    code = example(name)
    assert len(code.splitlines()) < 20
    namespace = {"__name__": "famba.models.vim"} if name == "model" else {}
    try:
        exec(code, namespace)
    finally:
        STRATEGIES.pop("middle", None)
        RULES.pop("last", None)
        LOADERS.pop("noise", None)


def test_an_added_strategy_is_found_by_train_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(composing.config_dir(), configs)
    yaml = re.search(r"`configs/fusion/middle.yaml`:\n\n```yaml\n(.*?)```", EXTENDING, re.DOTALL)
    assert yaml is not None
    (configs / "fusion" / "middle.yaml").write_text(yaml[1])
    monkeypatch.setattr(composing, "config_dir", lambda: configs)
    monkeypatch.setitem(STRATEGIES, "middle", lambda depth, layers: list(range(depth // 4, depth - depth // 4)))
    found = prepare(composing.compose(["fusion=middle", "model=vim_micro"]))
    assert [i for i, r in enumerate(found.schedule) if r] == [2, 3, 4, 5]


def test_the_five_lines_run() -> None:
    found = re.search(r"in five lines\n\n```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    namespace: dict[str, object] = {}
    exec(found[1], namespace)
    assert tuple(namespace["logits"].shape) == (2, 100)  # type: ignore[attr-defined]
    assert len(namespace["patches"]) == 24  # type: ignore[arg-type]


@pytest.mark.parametrize("page", ["features", "transformers"])
def test_the_code_of_a_page_runs(page: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, {})


def test_links_and_files_named_in_the_documents_exist() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text()
        for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            target = path.parent / link if link else path
            assert target.exists(), (path.name, link)
            if anchor:
                heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, anchor
        for name in re.findall(r"`((?:famba|scripts|tests|docker)/[\w/.*-]+)`", text):
            assert any(ROOT.glob(name)), (path.name, name)


def test_the_table_of_strategies_is_right() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([\d, ]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert [row[0] for row in rows] == ["none", "all", "interleaved", "lower", "upper", "decreasing"]
    for strategy, left, share in rows:
        tokens = tokens_per_layer(schedule(strategy, 24, 197, 168), 197)
        assert [tokens[i - 1] for i in (1, 6, 12, 18, 24)] == [int(n) for n in left.split(",")]
        assert float(share) == pytest.approx(sum(tokens) / (24 * 197), abs=5e-4)


def test_keys_and_choices_named_in_the_documents_exist() -> None:
    choices = composing.groups()
    text = re.sub(r"```python\n.*?```", "", "\n".join(TEXTS), flags=re.DOTALL)
    for group, value in re.findall(
        r"(?<![\w.])(model|fusion|data|recipe|logger|experiment)=(\w+(?:,\w+(?![\w=]))*)", text
    ):
        for choice in value.split(","):
            assert choice in {*choices[group], "middle"}, f"{group}={choice}"
    known = set(keys())
    for key in re.findall(r"(?<![\w./])((?:model|fusion|data|recipe|trainer|logger|ops)\.\w+)=", text):
        assert key in known, key
