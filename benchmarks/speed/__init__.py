"""Time and memory: decoding, a full-size conversion, int8 activations, everything on a GPU."""
