"""The `nfq` command for people who have only this folder: `python FOLDER`, also where Python runs in isolated mode."""

import sys

from nfq_core.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
