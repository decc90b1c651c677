"""A model as a program of torch.export, which runs without famba."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from famba.export.tracing import trace_program

NOTES_FILE = "famba.json"


def write_program(model: nn.Module, shape: Sequence[int], file: Path, notes: str) -> str:
    """Write a model as a .pt2 file; return what there is to say of it.

    Args:
        model: in eval mode, float32, on the CPU; maps (b, *shape) to logits.
        shape: of one input, without the batch.
        file: to write, over what is there.
        notes: JSON for whoever loads it, kept in the file as `extra_files["famba.json"]`.

    Raises:
        ConfigError, ExportError: as `trace_program`.
    """
    program = trace_program(model, shape)
    torch.export.save(program, file, extra_files={NOTES_FILE: notes})
    operations = sum(node.op == "call_function" for node in program.graph.nodes)
    return f"torch {torch.__version__}, {operations:,} operations"
