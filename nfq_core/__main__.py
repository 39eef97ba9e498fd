"""Lets `python -m nfq_core` stand for `nfq`."""

import sys

from .cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
