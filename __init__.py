"""ComfyUI-NFQ: the host's entry point; the nodes come with the ComfyUI layer."""
