"""The errors and the warning about bundles and about the runtimes that run them."""

from nbp_errors import NbpError


class BundleError(NbpError):
    """A folder that is not a bundle, or whose files differ from its manifest."""


class EngineError(NbpError):
    """An engine, a runtime or a GPU that is missing or fails, or that refuses a bundle or its inputs."""


class ReceiptWarning(UserWarning):
    """A bundle has no valid receipt, so nothing proves that its graphs compute what the reference computes."""
