"""The goldens with their weights, and small models, for several tests."""

from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from nbp_reference.config import BlockShape, Latent, ModelConfig, TextCondition
from nbp_reference.model import NextBlockTransformer
from tests.golden.weights import fill

GOLDEN = Path(__file__).parent / "golden"
M = TypeVar("M", bound=nn.Module)


def golden(name: str) -> dict[str, Tensor]:
    """Return the arrays of one golden case."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def filled(model: M, prefix: str = "") -> M:
    """Load the goldens' weights, which depend only on the keys, into a model, which may be on `meta`; return it."""
    shapes = {prefix + key: tuple(value.shape) for key, value in model.state_dict().items()}
    weights = fill(shapes)
    state = {key.removeprefix(prefix): torch.from_numpy(value) for key, value in weights.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def golden_generator(block: str) -> NextBlockTransformer:
    """Return the small generator of the K600 goldens."""
    config = ModelConfig(layers=3, width=64, heads=4, vocab=320).with_block(block)
    return filled(NextBlockTransformer(config), "transformer.")


def golden_hybrid() -> NextBlockTransformer:
    """Return the small class-conditional generator of `ucf_L4.npz`: 4 special, 60 text and 200 video token ids."""
    text = TextCondition(tokens=8, vocab=60)
    config = ModelConfig(2, 64, 4, vocab=264, condition_latents=0, block=BlockShape(1, 1, 4), text=text)
    return filled(NextBlockTransformer(config), "transformer.")


def small_generator(block: str, layers: int = 2) -> NextBlockTransformer:
    """Return a generator of a 4x4x4 latent video, half of it given, which every kind of block tiles."""
    config = ModelConfig(
        layers, width=32, heads=2, vocab=50, positions=64, latent=Latent(4, 4, 4), block=BlockShape(1, 1, 1)
    )
    return filled(NextBlockTransformer(config.with_block(block)))
