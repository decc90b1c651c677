"""Train a Vision Mamba with cross-layer token fusion; `python train.py --help` explains the options."""

import gc
import sys

if __name__ == "__main__":
    try:
        from famba.training.app import main

        # What the imports made lives to the end: no collection, and none at the exit, has to look through it.
        gc.freeze()
        sys.exit(main())
    except KeyboardInterrupt:  # during the imports; main answers it itself
        sys.stderr.write("interrupted\n")
        sys.exit(130)
