"""A trained network goes into a file, which is tried before it is kept."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from famba.errors import ConfigError
from famba.export.check import Check, check_file, missing_runtime
from famba.export.folder import FILES, write_folder
from famba.export.formats import FORMATS
from famba.export.request import Request


@dataclass(frozen=True)
class Exported:
    """What was written. size: bytes, weights and all. said: of its content. check: None where nothing could run it."""

    request: Request
    size: int
    said: str
    check: Check | None

    def __str__(self) -> str:
        fusion = self.request.description.fusion()
        removed, tokens = sum(fusion["schedule"]), fusion["tokens"]
        lines = [
            f"{self.request.out}: {_size(self.size)}, {self.said}",
            f"fusion {fusion['strategy']}: {tokens} tokens, {removed} removed, {tokens - removed} left",
        ]
        missing = missing_runtime(self.request.target)
        if missing is not None:
            lines.append(f"NOT CHECKED: {missing} is not installed; pip install 'famba[onnx]', and export again")
        return "\n".join([*lines, *([] if self.check is None else [str(self.check)])])


def export(request: Request) -> Exported:
    """Write a network beside its place, try it in a fresh process, and move it there.

    Raises FambaError where it cannot be written, or computes something else; what was there before is untouched then.
    """
    out, description = request.out, request.description
    folder = out if FORMATS[request.target] is None else out.parent
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".famba-export-") as scratch:
            written = Path(scratch) if folder == out else Path(scratch, out.name)
            _tell(f"writing {request.target}" + ("" if folder == out else "; tracing a network takes a minute or more"))
            said = _write(request, written)
            check = None
            if missing_runtime(request.target) is None:
                _tell("checking in a fresh process")
                check = check_file(request.target, written, description.model, description.shape)
            files = [written / name for name in FILES] if folder == out else [written]
            size = sum(file.stat().st_size for file in files)
            for file in files:
                os.replace(file, folder / file.name)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror or error}") from error
    return Exported(request, size, said, check)


def _tell(text: str) -> None:
    """Say on a terminal what takes its time."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{text} ...\n")


def _write(request: Request, place: Path) -> str:
    description = request.description
    if request.target == "safetensors":
        return write_folder(description, place)
    if request.target == "torch_export":
        from famba.export.program import write_program

        return write_program(description.model, description.shape, place, description.as_json())
    from famba.export.onnx_graph import write_onnx

    return write_onnx(description.model, description.shape, place, description.as_json())


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
