"""Benchmarks: run as `python -m benchmarks.NAME` from the repository's root; results go to `benchmarks/results/`."""
