"""Quantisation of one weight: fitting levels, and choosing scales and codes."""
