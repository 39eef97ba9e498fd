"""Size and error of our formats and of others: of random weights, of the demo model, of any model."""
