"""The version of the package; a file's container version and format ids are numbered on their own."""

__version__ = "0.1.0"
