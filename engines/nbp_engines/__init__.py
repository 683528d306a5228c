"""Opens and runs bundles. It needs numpy and one runtime, and no torch."""

from nbp_engines.bundle import Bundle
from nbp_engines.generator import Clip, Generator
from nbp_engines.registry import RUNTIMES, open_session
from nbp_engines.sampling import GREEDY, Sampling
from nbp_engines.session import Session

__all__ = ["GREEDY", "RUNTIMES", "Bundle", "Clip", "Generator", "Sampling", "Session", "open_session"]
