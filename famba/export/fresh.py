"""Run an exported file in a process of its own; `famba.export.check` starts this by its text, with four arguments.

They are the format, the file or folder, and the inputs and outputs as .npz files.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

target, file, given, computed = sys.argv[1:]
for name in {"torch_export": ["famba"], "onnx": ["famba", "torch"], "safetensors": []}[target]:
    sys.modules[name] = None  # type: ignore[assignment]  # an import of it is an error from here on

import numpy as np  # noqa: E402

run: Callable[[Any], Any]
if target == "onnx":
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    run = lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]  # noqa: E731
else:
    import torch

    if target == "torch_export":
        model: Any = torch.export.load(file).module()
    else:  # as a user of timm would
        import timm

        import famba  # registers its models with timm

        famba.ops.use_backend("reference")
        model = timm.create_model(f"local-dir:{file}", pretrained=True).eval()
        if not isinstance(model, famba.models.Backbone):
            fusion = json.loads(Path(file, "config.json").read_text())["famba"]["fusion"]
            settings = {name: fusion[name] for name in famba.fusion.SETTINGS}
            model = famba.models.apply_tome(model, fusion["schedule"], **settings)
    run = lambda x: model(torch.from_numpy(x)).detach().numpy()  # noqa: E731

with np.load(given) as inputs:
    np.savez(computed, **{name: run(inputs[name]) for name in inputs})
