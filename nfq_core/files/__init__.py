"""Bytes on disk: safetensors files and containers, read as untrusted input and written whole or not at all."""
