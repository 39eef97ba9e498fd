"""Files: safetensors and `.nfq.safetensors`, read as untrusted input and written atomically."""
