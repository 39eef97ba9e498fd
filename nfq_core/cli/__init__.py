"""The command `nfq`: arguments in, one call of the core, text or JSON out."""

from .commands import main

__all__ = ["main"]
