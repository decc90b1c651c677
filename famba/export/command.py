"""`famba export`: its options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from famba.analysis.fusion_options import add_fusion_options
from famba.export.formats import FORMATS


def add_export(commands: Any) -> argparse.ArgumentParser:
    """Add `export` to the subparsers of a parser, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="write a trained model for timm, torch.export or ONNX",
        description="Write a trained model as a folder that timm loads (safetensors), as a program of torch.export or "
        "as an ONNX graph, both for any batch size, with its fusion, and of standard operations alone. What was "
        "written is run in a fresh process on random inputs and compared with the model; it is kept only where they "
        "agree.",
        epilog="example: famba export runs/mine --format onnx --out mine.onnx",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run folder, weights in one, a checkpoint (.pt), or a timm model"
    )
    parser.add_argument("--format", required=True, metavar="NAME", help=", ".join(FORMATS))
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="PATH",
        help="where to write: a folder for safetensors, a .pt2 file for torch_export, an .onnx file for onnx",
    )
    add_fusion_options(parser, "without these, the schedule that the model was trained with")
    return parser
