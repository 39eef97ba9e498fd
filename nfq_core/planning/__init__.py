"""Which tensors of a model are quantised, and to which format."""
