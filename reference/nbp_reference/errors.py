"""The errors that the reference raises for invalid input of a user."""

from nbp_errors import NbpError


class BlockShapeError(NbpError):
    """A block shape cannot be parsed or does not tile its latent."""

    exit_code = 2


class CheckpointError(NbpError):
    """A checkpoint cannot be loaded; the message names the file, and the key with its shapes where one is wrong."""


class VideoError(NbpError):
    """A video cannot be found or read."""
