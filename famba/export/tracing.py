"""A model's computation as a graph of torch's own operations, for any batch size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from famba import ops
from famba.errors import ConfigError
from famba.export.errors import ExportError
from famba.export.plain import PlainOps, Recurrence
from famba.export.recurrence import chunked

# A batch of 1 would be taken for a constant.
_BATCH = 2
# What the tracer notes of each operation besides its meaning. It names files of this machine, and is most of a program.
_NOTES = ("stack_trace", "source_fn_stack", "torch_fn", "nn_module_stack", "from_node")


def trace_program(model: nn.Module, shape: Sequence[int], recurrence: Recurrence = chunked) -> ExportedProgram:
    """Trace a model in eval mode, whatever its ops: `recurrence` computes the states of its scans.

    Args:
        model: maps (b, *shape) to logits; its weights float32, on the CPU.
        shape: of one input without the batch, such as (3, 224, 224).
        recurrence: as `famba.export.plain.Recurrence`.

    Returns:
        The program, for any batch size from 1. What the tracer notes of files on this machine is not in it.

    Raises:
        ConfigError: weights that are not float32 on the CPU, or a model in training mode.
        ExportError: torch cannot trace the model, or an op of it has no form in torch's own.
    """
    _check(model)
    example = torch.zeros(_BATCH, *shape)
    # torch 2.6 trips over a size without a largest one.
    batch = Dim("batch", max=2**31 - 1)
    try:
        with torch.no_grad(), ops.use_backend("reference"), PlainOps(recurrence):
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)
    except (ConfigError, ExportError):
        raise
    except Exception as error:  # torch raises what it comes across
        raise ExportError(f"torch {torch.__version__} cannot trace the model: {_first_line(error)}") from error
    _tidy(program)
    foreign = sorted({str(node.target) for node in program.graph.nodes if str(node.target).startswith("famba.")})
    if foreign:
        raise ExportError(f"{', '.join(foreign)}: no form in torch's own operations is known (famba/export/plain.py)")
    return program


def _check(model: nn.Module) -> None:
    if model.training:
        raise ConfigError("the model is in training mode; call eval() first")
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise ConfigError(
                f"weight {name} is {str(weight.dtype).removeprefix('torch.')} on {weight.device}; "
                "expected float32 on the CPU: call float() and cpu() first"
            )


def _tidy(program: ExportedProgram) -> None:
    """Remove what states the obvious of this machine: where code lies, and that tensors are on the CPU."""
    # Some releases write down questions about dtypes, which they cannot read again.
    program.graph.eliminate_dead_code()
    graph = program.graph
    for node in list(graph.nodes):
        for note in _NOTES:
            node.meta.pop(note, None)
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    program.graph_module.recompile()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
