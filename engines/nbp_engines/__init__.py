"""Opens and runs bundles: numpy and one runtime, no torch."""

from nbp_engines.bundle import Bundle
from nbp_engines.generator import Clip, Generator
from nbp_engines.sampling import GREEDY, Sampling
from nbp_engines.session import Session, open_session

__all__ = ["GREEDY", "Bundle", "Clip", "Generator", "Sampling", "Session", "open_session"]
