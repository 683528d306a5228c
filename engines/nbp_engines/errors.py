"""What can be wrong with a bundle or with a runtime that should run it."""

from nbp_errors import NbpError


class BundleError(NbpError):
    """A folder that is not a bundle, or not the one that its manifest describes."""


class EngineError(NbpError):
    """A runtime that is missing, or refuses a graph or its inputs."""


class ReceiptWarning(UserWarning):
    """A bundle without a valid receipt: nothing proves that its graphs compute what the reference does."""
