"""Time and memory inside the programs that use the files: ComfyUI and diffusers."""
