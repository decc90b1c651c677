"""Train a Vision Mamba with cross-layer token fusion; `python train.py --help` explains the options."""

import gc
import sys

from famba.training.app import main

if __name__ == "__main__":
    # What the imports made lives to the end: no collection, and none at the exit, has to look through it.
    gc.freeze()
    sys.exit(main())
