"""A model as an ONNX graph of standard operators."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from famba.errors import ConfigError
from famba.export.errors import ExportError
from famba.export.tracing import trace_program

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
NOTES_KEY = "famba"
OPSET = 18
"""The lowest that has all that is used: ScatterElements adds since 16, Reduce operators take axes since 18.

So most runtimes read it. It is also what torch's translations are written for, so that nothing is converted.
"""

_NEEDED = ("onnx", "onnxscript")
_MESSAGE_LIMIT = 2**31 - 2**20  # a protobuf message, with room for the graph around the weights


def check_packages() -> None:
    """Raise ConfigError where a package that writes ONNX is not installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format onnx needs {' and '.join(missing)}; install: pip install 'famba[onnx]'")


def write_onnx(model: nn.Module, shape: Sequence[int], file: Path, notes: str) -> str:
    """Write a model as an ONNX file; return what there is to say of it.

    Its input is `images` (batch, *shape), its output `logits` (batch, classes), float32, for any batch from 1.

    Args:
        model: in eval mode, float32, on the CPU; maps (b, *shape) to logits.
        shape: of one input, without the batch.
        file: to write, over what is there.
        notes: JSON for whoever loads it, kept as the metadata property "famba".

    Raises:
        ConfigError: a package is missing, or the weights are too many for one file.
        ExportError: as `trace_program`, or an operation of the model has no translation.
    """
    check_packages()
    size = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
    if size > _MESSAGE_LIMIT:
        raise ConfigError(f"the weights take {size / 2**30:.1f} GiB; an ONNX file holds less than 2; use torch_export")
    message = _translate(model, shape)
    _tidy(message)
    _check_operators(message)
    message.metadata_props.add(key=NOTES_KEY, value=notes)
    file.write_bytes(message.SerializeToString())
    return f"opset {OPSET}, {sum(1 for _ in _nodes(message.graph)):,} operators"


def _translate(model: nn.Module, shape: Sequence[int]) -> Any:
    """The model as an onnx.ModelProto."""
    # Here, not above: these need packages that may be missing.
    from famba.export.onnx_scan import TRANSLATIONS, recurrence

    program = trace_program(model, shape, recurrence)
    with _quietly():
        try:
            translated = torch.onnx.export(
                program,
                (),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                custom_translation_table=TRANSLATIONS,
            )
        except Exception as error:  # torch.onnx raises what it comes across
            raise ExportError(f"torch {torch.__version__} cannot write the model as ONNX: {error}") from error
    assert translated is not None
    return translated.model_proto


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep from the user what the exporter says of itself."""
    log = logging.getLogger("onnxscript")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of constants that it does not work out beforehand
    try:
        with warnings.catch_warnings():
            # torch's and onnxscript's own code uses what they themselves have deprecated.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnxscript|onnx_ir)\b")
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|onnxscript|onnx_ir)\b")
            yield
    finally:
        log.setLevel(level)


def _tidy(message: Any) -> None:
    """Call the batch by its name, and remove what names files of this machine or can be worked out again."""
    given = message.graph.input[0].type.tensor_type.shape.dim[0]
    if not given.dim_param:
        raise ExportError("the batch size has become fixed; please report the model")
    given.dim_param = message.graph.output[0].type.tensor_type.shape.dim[0].dim_param = BATCH
    for graph in _graphs(message.graph):
        del graph.value_info[:]
        for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
            del part.metadata_props[:]
            part.doc_string = ""
    del message.metadata_props[:]


def _check_operators(message: Any) -> None:
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in _nodes(message.graph) if node.domain})
    if foreign or message.functions:
        raise ExportError(f"not all operators are ONNX's own: {', '.join(foreign) or 'functions are left'}")


def _nodes(graph: Any) -> Iterator[Any]:
    for part in _graphs(graph):
        yield from part.node


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and those inside its operators, such as the body of a Scan."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
