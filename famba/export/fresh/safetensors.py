"""Runs in a process of its own, as a user of timm would: arguments are a model folder, inputs and outputs as .npz."""

import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch

import famba  # registers its models with timm

file, inputs, outputs = sys.argv[1:]
model = timm.create_model(f"local-dir:{file}", pretrained=True).eval()
if not isinstance(model, famba.models.Backbone):
    fusion = json.loads(Path(file, "config.json").read_text())["famba"]["fusion"]
    settings = {name: fusion[name] for name in famba.fusion.SETTINGS}
    model = famba.models.apply_tome(model, fusion["schedule"], **settings)  # type: ignore[arg-type]  # a transformer
with torch.no_grad(), famba.ops.use_backend("reference"), np.load(inputs) as given:
    np.savez(outputs, **{name: model(torch.from_numpy(given[name])).numpy() for name in given})
