"""Names and shapes of the models that the program knows, and the parts that their layers play; no I/O."""
