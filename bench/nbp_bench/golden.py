"""The self-check before any measurement: this machine must compute the tokens of the authors' implementation."""

import runpy
from pathlib import Path

import numpy as np
import torch

from nbp_bench.torch_sessions import EagerSession
from nbp_engines.generator import Generator
from nbp_engines.sampling import GREEDY
from nbp_export.graphs import system_spec
from nbp_reference.config import ModelConfig
from nbp_reference.model import NextBlockTransformer

SIZES = (1, 16)


def folder() -> Path:
    """Return the folder of the golden files: inside the installed package, or among the tests of a clone."""
    packaged = Path(__file__).parent / "golden"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "tests" / "golden"


def golden_model(size: int) -> NextBlockTransformer:
    """Return the small model of `k600_L{size}.npz`, with the weights that `weights.py` beside it generates."""
    config = ModelConfig(layers=3, width=64, heads=4, vocab=320).with_block(str(size))
    model = NextBlockTransformer(config)
    recipe = runpy.run_path(str(folder() / "weights.py"))["fill"]
    filled = recipe({f"transformer.{key}": tuple(value.shape) for key, value in model.state_dict().items()})
    model.load_state_dict({key.removeprefix("transformer."): torch.from_numpy(v) for key, v in filled.items()})
    return model.eval()


def agreement(size: int) -> float:
    """Return the share of the authors' 768 greedy tokens that the reference reproduces on this machine."""
    torch.set_num_threads(1)  # more threads would slow down so small a model
    golden = np.load(folder() / f"k600_L{size}.npz")
    model = golden_model(size)
    with EagerSession(system_spec(model.config, None, "fp32", 1), model, None) as session:
        condition = golden["tokens"][:, : model.config.condition_tokens]
        for clip in Generator(session, GREEDY).blocks(condition):
            tokens = clip
    return float((tokens[:, condition.shape[1] :] == golden["greedy"]).mean())
