"""Packed weights: block formats, the packed buffer, and its exact decode on every device."""
