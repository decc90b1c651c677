"""Train a Vision Mamba with cross-layer token fusion; `python train.py --help` explains the options."""

import sys

from famba.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
