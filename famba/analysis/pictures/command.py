"""`famba visualize`: its options."""

from __future__ import annotations

import argparse
from typing import Any

from famba.analysis.fusion_options import add_fusion_options


def add_visualize(commands: Any) -> argparse.ArgumentParser:
    """Add `visualize` to the subparsers of a parser, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "visualize",
        help="draw which patches each token holds, and how similar tokens are, layer by layer",
        description="Draw, for each image, which patches each token holds, layer by layer; and over all images how "
        "similar the tokens of each layer are. Patches that share a token are outlined, in their mean colour; where "
        "they do not touch, an equal mark or letter in each part says that they are of one.",
        epilog="example: famba visualize runs/mine cat.jpg dog.jpg --fusion lower,upper --out pictures",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run folder, weights in one, a checkpoint (.pt), or a timm model"
    )
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="image files of any size (default: two photos of scikit-learn's)"
    )
    add_fusion_options(parser, "without these, the schedule that the model was trained with; a row for each")
    parser.add_argument(
        "--layers-shown", type=int, metavar="N", help="layers in a picture of patches (default: all, 8 at most)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or mps")
    parser.add_argument("--out", default="pictures", metavar="FOLDER", help="where to write (default: %(default)s)")
    return parser
