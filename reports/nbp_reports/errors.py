"""The errors that reading records can raise."""

from nbp_errors import NbpError


class RecordError(NbpError):
    """A file does not contain records that this version can read."""
