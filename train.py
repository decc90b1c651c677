"""Train a Vision Mamba with cross-layer token fusion; `python train.py --help` explains the options."""

import gc
import sys

if __name__ == "__main__":
    # What the imports make lives to the end: no collection, and none at the exit, has to look through it.
    gc.disable()
    try:
        from famba.training.app import main

        gc.freeze()
        gc.enable()
        sys.exit(main())
    except KeyboardInterrupt:  # during the imports; main answers it itself
        sys.stderr.write("interrupted\n")
        sys.exit(130)
