"""`python -m famba` is the `famba` command."""

import sys

try:
    from famba.cli import main

    sys.exit(main())
except KeyboardInterrupt:  # during the imports; main answers it itself
    sys.stderr.write("interrupted\n")
    sys.exit(130)
