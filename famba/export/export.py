"""Write a trained network as a folder for timm, a program of torch.export or an ONNX graph: `famba export`.

It keeps its fusion, and its operations are standard ones; programs and graphs take any batch size. What was written is
run in a fresh process on random inputs and compared with the model; it is kept only where they agree.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path

from famba.analysis.options import CHECKPOINT, Variant, add_fusion_options, own, prepare_folder, read_fusion, variants
from famba.analysis.trained import Trained, load_trained
from famba.errors import ConfigError, check_choice, some
from famba.export.check import check_file
from famba.export.folder import FILES, describe, find_summary, write_folder

FORMATS = {"safetensors": None, "torch_export": ".pt2", "onnx": ".onnx"}
"""Each format's name, and how its files' names end; None where it is a folder."""
_WRITERS = {"torch_export": "program", "onnx": "onnx_graph"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `famba export`."""
    parser.description = __doc__
    parser.epilog = "example: famba export runs/mine --format onnx --out mine.onnx"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT)
    parser.add_argument("--format", required=True, metavar="NAME", help=", ".join(FORMATS))
    text = "where to write: a folder for safetensors, a .pt2 file for torch_export, an .onnx file for onnx"
    parser.add_argument("--out", required=True, type=Path, metavar="PATH", help=text)
    add_fusion_options(parser, "without these, the schedule that the model was trained with")


def run(options: argparse.Namespace) -> int:
    """Export, and print what came of it."""
    check_choice("--format", options.format, FORMATS)
    needed = ("onnx", "onnxscript") if options.format == "onnx" else ()
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"--format onnx needs {' and '.join(missing)}; install: pip install 'famba[onnx]'")
    asked = read_fusion(options)
    out = _place(options.format, options.out)
    trained = load_trained(options.checkpoint)
    found = variants(trained, asked) or [own(trained)]
    if len(found) != 1:
        raise ConfigError(f"the options ask for {len(found)} ways of fusing; a file holds one: name one value of each")
    found[0].put_into(trained.model)
    print(export(options.format, out, trained, found[0], options.checkpoint))
    return 0


def _place(target: str, out: Path) -> Path:
    """Return where to write, in a folder that can be written to."""
    suffix = FORMATS[target]
    if suffix is None:
        if out.suffix in (*FORMATS.values(), ".safetensors"):
            raise ConfigError(f"--out {out} ends like a file; --format {target} writes a folder")
        if (taken := [name for name in FILES if (out / name).exists()]) and not _is_export(out):
            raise ConfigError(f"--out {out} holds {some(taken)} of something else; name another folder")
        return prepare_folder(out)
    if out.suffix != suffix or out.is_dir():
        told = (
            "is a folder; name a file in it" if out.is_dir() else f"does not end in {suffix}, as --format {target} does"
        )
        raise ConfigError(f"--out {out} {told}, such as {out.with_suffix('') / ('model' + suffix)}")
    prepare_folder(out.parent)
    return out


def _is_export(folder: Path) -> bool:
    try:
        return "famba" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def export(target: str, out: Path, trained: Trained, fused: Variant, checkpoint: str) -> str:
    """Write a network beside its place, try it in a fresh process, move it there, and say what came of it.

    fused: how the network fuses. checkpoint: what it was loaded from.

    Raises FambaError where it cannot be written, or computes something else; what was there before is untouched then.
    """
    summary, config = find_summary(checkpoint), trained.config
    architecture = (checkpoint if config is None else config.model.name).split(".")[0]
    said = describe(trained, architecture, fused, summary)
    model, shape = trained.model, said["input_size"]
    is_folder = FORMATS[target] is None
    folder = out if is_folder else out.parent
    checked = "NOT CHECKED: onnxruntime is not installed; pip install 'famba[onnx]', and export again"
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".famba-export-") as scratch:
            written = Path(scratch) if is_folder else Path(scratch, out.name)
            if is_folder:
                content = write_folder(trained, said, summary, written)
            else:
                # Imported here, since ONNX needs packages that may be missing.
                module = importlib.import_module(f"famba.export.{_WRITERS[target]}")
                content = module.write(model, shape, written, json.dumps(said, indent=2))
            if target != "onnx" or importlib.util.find_spec("onnxruntime"):
                checked = check_file(target, written, model, shape)
            files = [written / name for name in FILES] if is_folder else [written]
            size = sum(file.stat().st_size for file in files)
            for file in files:
                os.replace(file, folder / file.name)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror or error}") from error
    removed, sized = fused.removed, f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
    left = f"{model.num_tokens} tokens, {removed} removed, {model.num_tokens - removed} left"
    return f"{out}: {sized}, {content}\nfusion {fused.fusion.strategy}: {left}\n{checked}"
