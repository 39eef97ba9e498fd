"""Correctness, time and memory on a GPU, in one run."""
