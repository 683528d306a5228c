"""What can be wrong with records."""

from nbp_errors import NbpError


class RecordError(NbpError):
    """A file that does not hold records that this version reads."""
