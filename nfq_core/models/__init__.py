"""Tensor names and shapes of the known models, and the roles of their layers; no I/O."""
