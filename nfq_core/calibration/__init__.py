"""Statistics of the inputs of a model's layers: collecting, storing and merging them, and measuring sensitivities."""
