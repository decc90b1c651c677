"""`python -m famba` is the `famba` command."""

import sys

try:
    from famba.cli import main

    sys.exit(main())
except KeyboardInterrupt:  # during the imports; main answers it itself
    print("interrupted", file=sys.stderr)
    sys.exit(130)
