"""The package version; a file's container version and format ids are numbered separately."""

__version__ = "0.1.0"
