"""Levels, scales and codes for one weight: how a dense weight becomes a packed one."""
