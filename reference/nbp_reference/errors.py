"""What can be wrong with what a user hands the reference."""

from nbp_errors import NbpError


class BlockShapeError(NbpError):
    """A block shape that cannot be read or does not tile its latent."""

    exit_code = 2


class CheckpointError(NbpError):
    """A checkpoint that cannot be loaded: the message names the file, the key and the shapes."""


class VideoError(NbpError):
    """A video that cannot be read."""
