"""The commands as a user types them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import ROOT, TINY, python, start, wait_for_lines
from safetensors.torch import load_file

from famba.analysis import evaluate
from famba.analysis.trained import load_trained
from famba.cli import main as famba
from famba.data.augment import Normalize, evaluation_scaling
from famba.data.images import read_file
from famba.export import export
from famba.models.weights import weights_folder
from famba.ops.registry import resolve
from famba.training.app import main as train

Trained, Patch = tuple[Path, dict[str, Any]], pytest.MonkeyPatch
CLASSES = (weights_folder("vim_micro_patch4_32") / "classes.txt").read_text().split()  # type: ignore[operator]


def test_train_py_trains_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "trainer.max_steps=2", "fusion=upper", "fusion.budget=5", f"run_dir={tmp_path}/r"]
    done = python("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "fusion upper: 17 tokens, 5 removed, 12 left" in done.stdout
    assert f"ops by {resolve('cpu')}" in done.stdout
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "finished"
    assert train(arguments) == 0
    assert "is finished already" in capsys.readouterr().out


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start(tmp_path / "r", "trainer.epochs=40")
    wait_for_lines(tmp_path / "r", 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped after step" in errors
    assert "Traceback" not in errors
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    more = f"trainer.max_steps={summary['step'] + 1}"
    assert train([*TINY, f"run_dir={tmp_path}/r", "trainer.epochs=40", more]) == 0
    assert f"continuing after step {summary['step']}" in capsys.readouterr().out


def test_help_explains_every_group() -> None:
    done = python("train.py", "--help")
    assert done.returncode == 0, done.stderr
    said = "model=vim_ti |fusion=interleaved|data: cifar100|lr: 5.0e-4|epochs: 300|mode: disabled|nodes: 1|seed: 0|"
    said += "accumulation: 1 |famba download|hydra/launcher=slurm"
    for word in said.split("|"):
        assert word in done.stdout, word
    assert "=_" not in done.stdout, "what choices are made of is no choice"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["status", "famba/models/weights"], ["stattus"], ["--version"]])
def test_what_needs_no_torch_imports_none(arguments: list[str]) -> None:
    code = f"""
import sys
from famba.cli import main
try:
    status = main({arguments!r})
except SystemExit as end:
    status = end.code
print(sorted(sys.modules.keys() & {{"torch", "timm", "hydra", "pandas", "matplotlib", "numpy"}}), status)
"""
    done = python("-W", "error", "-c", code)
    assert done.stdout.splitlines()[-1] == ("[] 2" if arguments == ["stattus"] else "[] 0"), done.stderr
    assert arguments not in ([], ["--help"]) or "predict" in done.stdout
    assert arguments != ["stattus"] or "unknown command 'stattus', did you mean 'status'?" in done.stderr


@pytest.mark.parametrize(
    "code", ["import timm, famba", "import famba; from timm.models import create_model; import timm"]
)
def test_importing_famba_registers_its_models_whenever_timm_is_imported(code: str) -> None:
    told = python("-W", "error", "-c", f"{code}; print(len(timm.list_models('vim_*')), famba.fusion.RULES.keys())")
    assert told.stdout.startswith("4 dict_keys(['bipartite'"), told.stderr


def test_a_script_beside_a_clone_called_famba_finds_the_package_in_it(tmp_path: Path) -> None:
    clone = tmp_path / "famba"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name.startswith(("famba/", "configs/")) or name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    build = f"import setuptools.build_meta as b; b.build_editable({str(tmp_path)!r})"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"CXX": "false"}
    subprocess.run([sys.executable, "-c", build], cwd=clone, env=clean, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    # As if this clone alone were installed.
    alone = "sys.path[1:] = [path for path in sys.path[1:] if not os.path.exists(path + '/famba/cli.py')]"
    added = f"site.addsitedir({str(tmp_path / 'site')!r})"
    script = ["import os, site, sys", alone, added, "import famba.cli", "print(famba.__file__)"]
    (tmp_path / "script.py").write_text("\n".join(script))
    told = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert told.stdout.strip() == str(clone / "famba" / "__init__.py"), told.stderr


def test_files_of_a_run_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o007)
    try:
        assert train([*TINY, "trainer.max_steps=1", f"run_dir={tmp_path}/run"]) == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"]
    assert {"model.safetensors", "metrics.jsonl", "train.log", "step_00000001.pt"} <= {path.name for path in files}
    assert {str(path): oct(path.stat().st_mode & 0o777) for path in files} == {str(path): "0o660" for path in files}


OPTIONS = {
    "--epochs 5": "KEY=VALUE, did you mean 'trainer.epochs'?",
    "--batch-size 64": "did you mean 'trainer.batch_size'?",
    "--seeds 1 --cfg job": "did you mean 'seed'?",
    "--fusion upper": "did you mean 'fusion'?",
    "--name x": "did you mean 'model.name' or 'data.name' or 'logger.name'?",
    "--amp": "train.py --help` lists all",
    "epochs=5": "did you mean 'trainer.epochs'?",
}


@pytest.mark.parametrize("given", OPTIONS)
def test_options_of_other_programs_are_answered_with_the_override(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(given.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {given.split()[0]} is no option" if given[0] == "-" else "error: unknown key")
    assert OPTIONS[given] in error


# Arguments, where RUN stands for the folder of a run, and what the error says.
REFUSED = [
    ("evaluate RUN --fusion uper", "did you mean 'upper'"),
    ("evaluate RUN --fusion adaptive --budget 8", "no fixed schedule.*was trained with upper; name another"),
    ("evaluate RUN --fusion all --budget 65", "--budget.*does not fit"),
    ("evaluate RUN --order tom", "unknown --order 'tom', did you mean 'tome'"),
    ("evaluate RUN --subset 361", "--subset is 361; allowed: 1 to 360"),
    ("evaluate RUN --device tpu", "--device 'tpu' is .*on this machine"),
    ("visualize RUN absent.png", "absent.png is not there"),
    ("visualize RUN .", "broken.png: not a readable image"),
    ("visualize RUN broken.png", "broken.png: not a readable image"),
    ("visualize RUN text.png", "text.png: not a readable image .of no kind that Pillow knows"),
    ("export RUN --format onyx --out m.onnx", "unknown --format 'onyx', did you mean 'onnx'"),
    ("export RUN --format onnx --out m.pt2", "m.pt2 does not end in .onnx, as --format onnx does"),
    ("export RUN --format safetensors --out m.onnx", "--format safetensors writes a folder"),
    ("export RUN --format torch_export --out folder.pt2", "is a folder; name a file in it"),
    ("export RUN --format torch_export --out text.png/m.pt2", "is a file; name a folder to write to"),
    ("export RUN --format onnx --out m.onnx --fusion all,lower --budget 4", "ask for 2 ways of fusing"),
    ("plan trainer.device=cudo", "trainer.device 'cudo' is .*on this machine"),
    ("plan trainer.device=mps trainer.precision=fp16", "this mps device has no .*16"),
    ("plan trainer.cuda_graphs=true", "cannot be: the device is cpu"),
    ("plan fusion=all fusion.budget=5000", "a budget of 5000 tokens does not fit"),
    ("plan model=vim_micro --out text.png", "is a file; name a folder to write to"),
    ("benchmark ops --rounds 0", "argument --rounds: 0; allowed: whole numbers from 1"),
    ("benchmark ops --precision fp16 --device cpu", "fp16 is timed on CUDA devices alone, this is a cpu device"),
    ("benchmark ops --length 2", "--length is 2; match_tokens and fuse_tokens need 3 tokens"),
    ("benchmark model --json /nowhere/found.json", "--json /nowhere/found.json cannot be written"),
    ("benchmark gpu --device cpu", "famba benchmark gpu measures a CUDA device, and was given cpu"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED)
def test_what_cannot_work_is_refused_before_any_work(
    given: str, said: str, upper: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "_race", None)
    monkeypatch.setattr(export, "_WRITERS", None)
    Path("folder.pt2").mkdir()
    Path("text.png").write_text("no image")
    Image.effect_noise((64, 64), 50).save("whole.png")
    Path("broken.png").write_bytes(Path("whole.png").read_bytes()[:1000])
    try:
        status = famba(given.replace("RUN", str(upper[0])).split())
    except SystemExit as error:  # of the parser
        status = error.code  # type: ignore[assignment]
    error = capsys.readouterr().err.replace("\n", " ")
    assert status == 2
    assert re.search(said, error), error
    assert {path.name for path in tmp_path.iterdir()} == {"broken.png", "folder.pt2", "text.png", "whole.png"}


def test_predict_names_what_is_in_images_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [tmp_path / name for name in ("a.png", "deep/10.jpg", "deep/2.png", ".hidden.png")]
    for file in images:
        file.parent.mkdir(exist_ok=True)
        Image.effect_noise((50, 40), 50).convert("RGB").save(file)
    other, empty = tmp_path / "deep" / "notes.txt", tmp_path / "empty"
    other.write_text("no image")
    empty.mkdir()
    shown, name = [str(images[0]), str(images[2]), str(images[1])], "vim_micro_patch4_32"
    assert famba(["predict", name, shown[0], str(tmp_path / "deep"), shown[0]]) == 0
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if "/" in line] == shown
    assert famba(["predict", name, str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    trained = load_trained(name)
    pixels = evaluation_scaling(trained.scaling, 32).image(read_file(images[0], trained.reading.colour))[None]
    with torch.inference_mode():
        wanted = trained.model(Normalize(trained.mean, trained.std)(pixels)).softmax(1)[0]
    assert [one["image"] for one in found] == shown
    numbers = [likely["number"] for likely in found[0]["classes"]]
    assert numbers == wanted.argsort(descending=True)[:5].tolist()
    for likely in found[0]["classes"]:
        assert likely["probability"] == pytest.approx(wanted[likely["number"]].item(), abs=1e-5)
        assert likely["class"] == CLASSES[likely["number"]]
        assert f"{100 * likely['probability']:.1f} %  {likely['class']}" in told
    for path, said in ((empty, "is a folder without images; give image files"), (other, "not a readable image")):
        assert famba(["predict", name, shown[0], str(path)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one(tmp_path: Path) -> None:
    settings = [*TINY, "fusion=upper", "fusion.budget=5", "recipe.ema_decay=0.9", "trainer.epochs=1",
                "recipe.warmup_epochs=0", "recipe.clip_grad=1", "trainer.precision=fp32"]  # fmt: skip
    one = python("train.py", *settings, f"run_dir={tmp_path}/one", "trainer.accumulation=2")
    assert one.returncode == 0, one.stderr
    two = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                 "train.py", *settings, f"run_dir={tmp_path}/two", OMP_NUM_THREADS="1")  # fmt: skip
    assert two.returncode == 0, two.stderr
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[1]["provenance"]["processes"] == 2
    assert summaries[0]["top1"] == pytest.approx(summaries[1]["top1"], abs=0.6), "each image is counted once"
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("two", "one")]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=2e-5)
