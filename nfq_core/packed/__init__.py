"""One packed weight: its block formats, its buffer, and the exact decode on each device."""
