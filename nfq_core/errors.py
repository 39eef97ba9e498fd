"""The errors that bad input raises; each message is one line that names the file or tensor and says what to do."""


class NFQError(Exception):
    """Base of every error that a user can cause; its text is fit to be shown as it is."""


class CorruptFileError(NFQError):
    """A file is damaged, cut short, or its header contradicts its contents."""


class UnsupportedFileError(NFQError):
    """A file is sound, but not one that this version reads (foreign, or written by a newer version)."""


class TargetExistsError(NFQError):
    """The target of a write exists and overwriting it was not asked for."""


class DiskFullError(NFQError):
    """A file could not be written because the disk, or the user's share of it, is full."""


class CannotQuantizeError(NFQError, ValueError):
    """A tensor holds nothing that a block format can represent (NaN, Inf, integers, too few or too large weights)."""
