"""Write a model as an ONNX graph of standard operators. Imported only then, since it needs the package onnxscript."""

# Annotations are evaluated here, not postponed: onnxscript and torch read types from them.
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op
from torch import Tensor, nn

from famba.errors import ConfigError
from famba.export.check import ExportError
from famba.export.program import chunked, trace_program

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
NOTES_KEY = "famba"
OPSET = 18
"""The lowest that has all that is used (Reduce operators take axes since 18), and what torch's translations are for."""
_MESSAGE_LIMIT = 2**31 - 2**20  # a protobuf message, with room for the graph around the weights


def write(model: nn.Module, shape: Sequence[int], file: Path, notes: str) -> str:
    """Write a model as an ONNX file, over what is there; return what there is to say of it.

    Its input is `images` (batch, *shape), its output `logits` (batch, classes), float32, for any batch from 1. model,
    shape: as of `trace_program`. notes: JSON for whoever loads it, kept as the metadata property "famba". Raises
    ConfigError for more weights than one file holds, ExportError as `trace_program`, or for what has no translation.
    """
    size = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
    if size > _MESSAGE_LIMIT:
        raise ConfigError(f"the weights take {size / 2**30:.1f} GiB; an ONNX file holds less than 2; use torch_export")
    message = _translate(model, shape)
    given, made = (ends[0].type.tensor_type.shape.dim[0] for ends in (message.graph.input, message.graph.output))
    if not given.dim_param:
        raise ExportError("the batch size has become fixed; please report the model")
    given.dim_param = made.dim_param = BATCH
    parts = list(_graphs(message.graph))
    nodes = [node for part in parts for node in part.node]
    for part in parts:  # remove what names files of this machine or can be worked out again
        del part.value_info[:]
        for piece in (part, *part.node, *part.input, *part.output, *part.initializer):
            del piece.metadata_props[:]
            piece.doc_string = ""
    del message.metadata_props[:]
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in nodes if node.domain})
    if foreign or message.functions:
        raise ExportError(f"not all operators are ONNX's own: {', '.join(foreign) or 'functions are left'}")
    message.metadata_props.add(key=NOTES_KEY, value=notes)
    file.write_bytes(message.SerializeToString())
    return f"opset {OPSET}, {len(nodes):,} operators"


def _translate(model: nn.Module, shape: Sequence[int]) -> Any:
    """Return the model as an onnx.ModelProto, and keep from the user what the exporter says of itself."""
    program = trace_program(model, shape, recurrence)
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of constants that it does not work out beforehand
    try:
        with warnings.catch_warnings():
            # torch's and onnxscript's own code uses what they themselves have deprecated.
            for kind in (DeprecationWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=kind, module=r"(torch|onnxscript|onnx_ir)\b")
            translated = torch.onnx.export(
                program, (), dynamo=True, verbose=False, opset_version=OPSET, input_names=[INPUT],
                output_names=[OUTPUT], custom_translation_table=TRANSLATIONS,
            )  # fmt: skip
    except Exception as error:  # torch.onnx raises what it comes across
        raise ExportError(f"torch {torch.__version__} cannot write the model as ONNX: {error}") from error
    finally:
        log.setLevel(level)
    assert translated is not None
    return translated.model_proto


def _graphs(whole: Any) -> Iterator[Any]:
    """Yield a graph and those inside its operators, such as the body of a Scan."""
    yield whole
    for node in whole.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


@torch.library.custom_op("famba_export::recurrence", mutates_args=())
def recurrence(delta: Tensor, gain: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """Compute what `famba.export.program.chunked` does, in one op that stays one while a model is traced."""
    return chunked(delta, gain, A, B, C, reverse)


@recurrence.register_fake
def _shape(delta: Tensor, gain: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    return delta.new_empty(delta.shape)


@script(default_opset=op)
def _scan(
    delta: FLOAT, gain: FLOAT, rates: FLOAT, B: FLOAT, C: FLOAT, inward: Sequence[int], outward: Sequence[int]
) -> FLOAT:
    @graph()
    def step(h: FLOAT[...], delta_t: FLOAT[...], gain_t: FLOAT[...], B_t: FLOAT[...], C_t: FLOAT[...]):  # type: ignore[no-untyped-def]
        # States are (b, n, d), rates (n, d): with the channels innermost.
        decay = op.Exp(op.Mul(op.Unsqueeze(delta_t, op.Constant(value_ints=[1])), rates))
        gain_row = op.Unsqueeze(gain_t, op.Constant(value_ints=[1]))
        B_column = op.Unsqueeze(B_t, op.Constant(value_ints=[2]))
        after = op.Add(op.Mul(decay, h), op.Mul(gain_row, B_column))
        read = op.MatMul(op.Unsqueeze(C_t, op.Constant(value_ints=[1])), after)
        return after, op.Squeeze(read, op.Constant(value_ints=[1]))

    batch = op.Shape(delta, start=0, end=1)
    start = op.Expand(op.Constant(value_float=0.0), op.Concat(batch, op.Shape(rates), axis=0))
    _, y = op.Scan(
        start, delta, gain, B, C, body=step, num_scan_inputs=4, scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1],
        scan_input_directions=inward, scan_output_directions=outward,
    )  # fmt: skip
    return y


def _recurrence(delta: FLOAT, gain: FLOAT, A: FLOAT, B: FLOAT, C: FLOAT, reverse: bool) -> FLOAT:
    way = int(reverse)  # as ONNX numbers a Scan's directions
    return _scan(delta, gain, op.Transpose(A, perm=[1, 0]), B, C, inward=[way] * 4, outward=[way])


def _sort(values: FLOAT, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    # Of equal values, TopK has the one of lower index first: it sorts stably, in both directions.
    sizes = op.Shape(values)
    count = op.Gather(sizes, op.Constant(value_ints=[dim]), axis=0)
    return op.TopK(values, count, axis=dim, largest=int(descending), sorted=1)


def _argsort(values: FLOAT, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    return _sort(values, stable=stable, dim=dim, descending=descending)[1]


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.famba_export.recurrence.default: _recurrence,
    torch.ops.aten.sort.stable: _sort,
    torch.ops.aten.argsort.stable: _argsort,
}
"""Map operations of a traced program to what writes them in ONNX, as torch.onnx's custom_translation_table."""
