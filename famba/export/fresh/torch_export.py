"""Runs in a process of its own, without famba: arguments are a .pt2 file, inputs and outputs as .npz."""

import sys

sys.modules["famba"] = None  # type: ignore[assignment]  # an import of it is an error from here on

import numpy as np  # noqa: E402
import torch  # noqa: E402

file, inputs, outputs = sys.argv[1:]
run = torch.export.load(file).module()
with torch.no_grad(), np.load(inputs) as given:
    np.savez(outputs, **{name: run(torch.from_numpy(given[name])).numpy() for name in given})
