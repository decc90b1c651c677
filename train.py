"""Train a Vision Mamba with cross-layer token fusion; `python train.py --help` explains the options."""

import sys

from famba.training.app import main

if __name__ == "__main__":
    sys.exit(main())
