"""`python -m nfq_core` runs the `nfq` command."""

import sys

from .cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
