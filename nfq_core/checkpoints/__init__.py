"""Whole models: quantise, convert, load, save and compare single files or whole folders."""
