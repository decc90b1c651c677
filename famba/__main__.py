"""`python -m famba` is the `famba` command."""

import sys

from famba.cli import main

sys.exit(main())
