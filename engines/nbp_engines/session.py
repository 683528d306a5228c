"""What every runtime looks like from outside: five calls on numpy arrays.

Shape legend: B batch, T tokens in the call, L tokens in a block, P condition tokens, V vocabulary, F video frames.
"""

from pathlib import Path
from typing import Protocol, Self

import numpy as np

from nbp_engines.bundle import Bundle
from nbp_engines.errors import EngineError
from nbp_engines.sampling import Sampling
from nbp_engines.spec import SystemSpec


class Session(Protocol):
    """One loaded system with its buffers. Arrays that a call returns are valid until the next call of that name."""

    spec: SystemSpec

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Condition tokens int64 [B,P], raster order, of the given frames float32 [B,3,F,H,W] in [0,1]."""
        ...

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Start over with the condition [B,P] in block order; logits [B,L,V] of the first block.

        After a hybrid's text the logits mean nothing: begin-of-video is yet to come.
        """
        ...

    def step(self, tokens: np.ndarray, cache_pos: np.ndarray) -> np.ndarray:
        """Read a block, or one token of a hybrid's start, [B,T] at cache_pos int64 [B]; logits [B,T,V] of the next."""
        ...

    def sample(self, logits: np.ndarray, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
        """Tokens int64 [B,T] from logits [B,T,V] and uniforms float64 [B,T]."""
        ...

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Video float32 [B,3,F,H,W] in [0,1] of a clip's tokens [B,T·H·W], raster order."""
        ...

    def close(self) -> None:
        """Give the buffers back."""
        ...

    def __enter__(self) -> Self:
        """The session itself."""
        ...

    def __exit__(self, *_: object) -> None:
        """Close it."""
        ...


def open_session(bundle: Bundle | Path | str, threads: int | None = None, require_receipt: bool = False) -> Session:
    """Open a bundle with the runtime it was made for.

    Raises BundleError if it is not an intact bundle, or has no valid receipt where one is required, EngineError if its
    runtime is not installed or refuses it.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle), require_receipt)
    if require_receipt:
        opened.prove()
    if opened.manifest.runtime == "onnx":
        from nbp_engines.ort import OrtSession

        return OrtSession(opened, threads)
    raise EngineError(f"{opened.path} was made for runtime {opened.manifest.runtime!r}, which this version cannot run")
