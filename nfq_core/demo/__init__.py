"""A tiny text-to-image model of SDXL's architecture, bundled so that the demo runs offline."""
