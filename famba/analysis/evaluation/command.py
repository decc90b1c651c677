"""`famba evaluate`: its options."""

from __future__ import annotations

import argparse
from typing import Any

from famba.analysis.fusion_options import add_fusion_options


def add_evaluate(commands: Any) -> argparse.ArgumentParser:
    """Add `evaluate` to the subparsers of a parser, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help="evaluate a trained model, with other ways of fusing if asked",
        description="Evaluate a trained model on test images: Top-1, Top-5 and loss, throughput, memory and "
        "multiply-adds, with the schedule that it was trained with and with others. All of them see the same images, "
        "taking each batch in turn. Top-1 has 95 % intervals over test images: its own, and that of the paired "
        "difference to the model as it was trained.",
        epilog="example: famba evaluate runs/mine --fusion all,upper --budget 0.2,0.4,0.6,0.8 --out curves",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run folder, weights in one, a checkpoint (.pt), or a timm model"
    )
    parser.add_argument("--data", metavar="NAME", help="a choice or a name as in training (default: the run's own)")
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds the data (default: the run's own)")
    parser.add_argument("--subset", type=int, metavar="N", help="N test images, spread evenly over all")
    add_fusion_options(
        parser,
        "the schedule that the model was trained with is always evaluated, and beside any other the model without "
        "fusion, from which curves over budgets begin",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at once (default: as the run's)")
    parser.add_argument("--backend", metavar="NAME", help="what computes the ops (default: as the run's)")
    parser.add_argument("--precision", metavar="NAME", help="auto, fp32, bf16 or fp16 (default: as the run's)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or mps")
    parser.add_argument("--out", metavar="FOLDER", help="write evaluate.csv, evaluate.json and plots there")
    parser.add_argument("--json", action="store_true", help="print evaluate.json instead of a table")
    return parser
