"""Runs in a process of its own, without famba and torch: arguments are an .onnx file, inputs and outputs as .npz."""

import sys

sys.modules["famba"] = sys.modules["torch"] = None  # type: ignore[assignment]  # an import is an error from here on

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402

file, inputs, outputs = sys.argv[1:]
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
(taken,) = session.get_inputs()
with np.load(inputs) as given:
    np.savez(outputs, **{name: session.run(None, {taken.name: given[name]})[0] for name in given})
