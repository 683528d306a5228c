"""The errors and the warning about bundles and about the runtimes that run them."""

from nbp_errors import NbpError


class BundleError(NbpError):
    """A folder that is not a bundle, or whose files differ from its manifest."""


class EngineError(NbpError):
    """A runtime that is missing, or that refuses a graph or its inputs."""


class ReceiptWarning(UserWarning):
    """A bundle has no valid receipt, so nothing proves that its graphs compute what the reference computes."""
