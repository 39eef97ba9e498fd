"""Whole models: quantise, convert, load, save, compare, one by one or by the folder."""
