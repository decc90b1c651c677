"""Train a Vision Mamba with cross-layer token fusion; `python train.py --help` explains the options."""

import sys

if __name__ == "__main__":
    try:
        from famba.cli import main

        sys.exit(main(["train", *sys.argv[1:]]))
    except KeyboardInterrupt:  # during the imports; main answers it itself
        sys.stderr.write("interrupted\n")
        sys.exit(130)
