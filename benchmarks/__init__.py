"""Benchmarks; README.md in this folder lists the commands, their duration, results files and tables."""
