"""Test that what README and docs show works as it stands there."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from runs import ROOT, python

from famba.analysis.report import gather
from famba.errors import ConfigError
from famba.fusion import schedule, tokens_per_layer
from famba.training import compose as composing
from famba.training.config import keys
from famba.training.setup import prepare

README = (ROOT / "README.md").read_text()
EXTENDING = (ROOT / "docs/extending.md").read_text()
TEXTS = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]


def test_the_files_on_extending_work_beside_a_users_own(tmp_path: Path) -> None:
    files = re.findall(r"<!-- file: (\S+) -->\n```(?:python|yaml)\n(.*?)```", EXTENDING, re.DOTALL)
    assert [name for name, _ in files if name.endswith(".py")] == ["middle.py", "last.py", "nano.py", "noise.py"]
    for name, text in files:
        assert len(text.splitlines()) < 20
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    commands = [line.split()[2:] for line in EXTENDING.splitlines() if line.startswith("python train.py")]
    short = ["model.embed_dim=16", "recipe=quick", "trainer.max_steps=1", "trainer.batch_size=32"]
    script = f"""
import json, os, sys
from famba.training.app import main
for number, command in enumerate({commands!r}):
    data = [] if "data=noise" in command else ["data=digits", "data.subset=64"]
    assert main([*command, *data, *{short!r}, f"run_dir=run{{number}}"]) == 0
print([json.load(open(f"run{{number}}/summary.json"))["schedule"] for number in range(4)])
print(os.environ["FAMBA_PLUGINS"].count(":"))
"""
    done = python("-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    schedules, others = done.stdout.splitlines()[-2:]
    upper, nano = [0, 0, 9, 9, 9, 9, 10, 9], [0, 28, 18, 9]
    assert schedules == str([[0, 0, 13, 15, 18, 9, 0, 0], upper, nano, [0] * 8])
    assert others == "3"
    assert "No pretrained configuration" not in done.stdout + done.stderr
    # A run folder does not import code; the variable does.
    for more, status in (({}, 2), ({"FAMBA_PLUGINS": "mine/middle.py"}, 0)):
        predict = ("-m", "famba", "predict", "run0", str(ROOT / "docs/results/tokens_china.png"))
        done = python(*predict, cwd=tmp_path, PYTHONPATH=str(ROOT), **more)
        assert done.returncode == status, done.stderr
    assert "FAMBA_PLUGINS" in done.stderr or status == 0


def test_plugins_that_cannot_be_imported_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAMBA_PLUGINS", "")
    (tmp_path / "broken_plugin.py").write_text("1 / 0\n")
    (tmp_path / "yaml.py").write_text("")
    for name, message in (
        ("absent.py", rf"plugin 'absent.py' cannot be imported .*looked for the file at .*{tmp_path}/absent.py"),
        ("broken_plugin.py", r"broken_plugin.py' cannot be imported \(ZeroDivisionError"),
        ("yaml.py", "a module named 'yaml' is imported already; rename the file"),
    ):
        for given in (f"plugins=[{name}]", f"plugins={name}"):
            with pytest.raises(ConfigError, match=message):
                composing.compose(["--config-dir", str(tmp_path), given])
    assert "broken_plugin" not in sys.modules


@pytest.mark.parametrize("page", ["README.md", "docs/features.md", "docs/transformers.md"])
def test_the_code_of_a_page_runs(page: str) -> None:
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        exec(code, namespace := {})
    if page == "README.md":
        assert tuple(namespace["logits"].shape) == (2, 100)


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
            assert choice in {*choices[group], "middle", "vim_nano", "noise"}, f"{group}={choice}"
    known = set(keys())
    for key in re.findall(r"(?<![\w./])((?:model|fusion|data|recipe|trainer|logger|ops)\.\w+)=", text):
        assert key in known, key


def test_the_documents_hold_the_report_of_the_kept_runs() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "keep_runs.py"))
    kept = ROOT / "docs" / "results" / "runs.csv"
    report = gather([kept])
    for (document, name), text in script["texts"](report).items():
        assert script["parts"](document, name)[1] == text, f"{name} in {document.name}"
    for name in script["PLOTS"]:
        assert any(plot.name.endswith(name) for plot in report.tables[0].plots)
    assert not any(start in kept.read_text() for start in script["PRIVATE"])


def test_the_runs_of_the_campaign_can_begin() -> None:
    campaign = runpy.run_path(str(ROOT / "scripts/campaign.py"))
    runs = [run for run in campaign["campaign"]() if "seed=0" in run.arguments]
    for run in (*runs, *map(campaign["reduced"], runs)):
        on_any_machine = [given for given in run.arguments if not given.startswith("trainer.precision")]
        prepare(composing.compose([*on_any_machine, "run_dir=unused"]), processes=1)
