"""The ComfyUI nodes: thin layers over nfq_core."""
