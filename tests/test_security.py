"""Files from elsewhere run no code and write nowhere else; secrets stay out of run folders."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from runs import ROOT, TINY, Hostile, python, run

from famba.data.published import unpack
from famba.errors import CheckpointError, ConfigError, DataError, FambaError
from famba.models import load_vim_checkpoint
from famba.training.compose import compose
from famba.training.measure import provenance
from famba.training.setup import prepare


def test_the_hostile_pickle_works_where_nothing_stops_it(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Hostile(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("by_torch", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_hostile_checkpoint_is_refused_and_its_code_does_not_run(tmp_path: Path, by_torch: bool, suffix: str) -> None:
    path, marker = tmp_path / f"weights{suffix}", tmp_path / "ran"
    content = {"model": {"head.weight": Hostile(marker)}, "step": 1}
    torch.save(content, path) if by_torch else path.write_bytes(pickle.dumps(content))
    model = timm.create_model("vim_micro_patch4_32", depth=1, embed_dim=16)
    with pytest.raises(CheckpointError):
        load_vim_checkpoint(model, path)
    with pytest.raises(FambaError):
        run(tmp_path / "begun", f"init_from={path}")
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    path.rename(checkpoints / "step_00000001.pt")
    with pytest.raises(FambaError):
        run(tmp_path / "run")
    assert not marker.exists()


def test_a_hostile_configuration_beside_weights_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("vim_micro_patch4_32", depth=2, embed_dim=16, d_state=2, patch_size=8, num_classes=10)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    marker = tmp_path / "ran"
    (tmp_path / "config.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        run(tmp_path / "run", f"init_from={tmp_path / 'weights.pt'}")
    assert not marker.exists()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    found.size = 4 if kind == tarfile.REGTYPE else 0
    return found


ESCAPES = {
    "a folder above": [member("../escaped")],
    "above, by way of below": [member("a/../../escaped")],
    "a symbolic link": [member("link", tarfile.SYMTYPE, ".."), member("link/escaped")],
    "an absolute symbolic link": [member("link", tarfile.SYMTYPE, "/"), member("link/tmp/escaped")],
    "a hard link": [member("link", tarfile.LNKTYPE, "../outside")],
    "a device": [member("device", tarfile.CHRTYPE)],
    "a pipe": [member("pipe", tarfile.FIFOTYPE)],
}


@pytest.mark.parametrize("members", ESCAPES.values(), ids=ESCAPES)
def test_nothing_in_an_archive_gets_out_of_its_folder(tmp_path: Path, members: list[tarfile.TarInfo]) -> None:
    (tmp_path / "outside").write_text("safe")
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as tar:
        for item in members:
            tar.addfile(item, io.BytesIO(b"evil") if item.isreg() else None)
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(tmp_path / "archive.tar.gz", folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive.tar.gz", "data", "outside"]
    assert (tmp_path / "outside").read_text() == "safe"
    assert not any(path.is_symlink() or path.is_fifo() or path.is_char_device() for path in folder.iterdir())


SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_secretsecretsecretsecretsecret",
    "MY_PASSWORD": "correct-horse-battery",
    "WANDB_HOST": "secret-host-name",  # what wandb takes for the machine's own name
}
REMOTE = "https://user:glpat-secretremote@example.org/x.git"


@pytest.mark.slow
def test_a_run_writes_no_secret_and_no_name_of_the_machine(tmp_path: Path) -> None:
    for command in (["init", "-q"], ["remote", "add", "origin", REMOTE]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    settings = (*TINY, "logger=wandb", "run_dir=run", "trainer.epochs=1")
    done = python(str(ROOT / "train.py"), *settings, cwd=tmp_path, **SECRETS)
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    forbidden = [*SECRETS.values(), "glpat-secretremote"]
    texts = {"the terminal": (done.stdout + done.stderr).encode(), **{str(path): path.read_bytes() for path in files}}
    leaks = [(secret, name) for name, text in texts.items() for secret in forbidden if secret.encode() in text]
    assert not leaks


ADDRESS = "https://user:hunter2@example.org/data"


@pytest.mark.parametrize("key", ["data.root", "run_dir", "init_from", "logger.entity", "data.name"])
def test_an_address_with_a_password_is_refused_without_repeating_it(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} .*password") as caught:
        prepare(compose([f"{key}='{ADDRESS}'"]))
    assert "hunter2" not in str(caught.value)


def test_provenance_keeps_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["train.py", "seed=1", f"hydra.x={ADDRESS}", "data.root=https://token@example.org"]
    )
    kept = provenance(torch.device("cpu"), seed=1, world_size=1)["arguments"]
    assert kept == ["seed=1", "hydra.x=https://***@example.org/data", "data.root=https://***@example.org"]
