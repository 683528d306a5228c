"""What the authors' loop costs beside a well-written eager step: `python -m nbp_bench.naive_cost`.

The growing cache and the Python loop over a block's tokens, at the paper's vocabulary. On two cores of a Xeon the naive
step took 1.5, 3.1 and 7.2 times an eager greedy one at L = 1, 16, 256. Compare ratios, not milliseconds: a busy machine
multiplies both.
"""

import time
from statistics import median

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from nbp_bench.torch_sessions import EagerSession, NaiveSession
from nbp_engines.noise import uniforms
from nbp_engines.sampling import GREEDY, Sampling
from nbp_export.graphs import system_spec
from nbp_reference.config import ModelConfig
from nbp_reference.model import NextBlockTransformer

ROUNDS = 5


def step_ms(session: NaiveSession | EagerSession, sampling: Sampling, position: int) -> float:
    """Milliseconds of one step and the sampling of its block, at a cache position."""
    spec = session.spec
    tokens = np.zeros((1, spec.block_size), np.int64)
    noise = uniforms(0, 0, 0, spec.block_size)[None]
    begin = time.perf_counter()
    session.sample(session.step(tokens, np.array([position])), noise, sampling)
    return (time.perf_counter() - begin) * 1e3


@click.command()
def main() -> None:
    """Time one step of each engine, taking turns, for C = 512, 8 layers, V = 64,000."""
    table = Table("L", "naive ms", "eager ms", "eager greedy ms", "naive / eager", "naive / eager greedy")
    for size in (1, 16, 256):
        config = ModelConfig(layers=8, width=512, heads=8, vocab=64_000, positions=1280).with_block(str(size))
        model = NextBlockTransformer(config)
        model.reset(seed=0)
        spec = system_spec(config, None, "fp32", 1)
        naive, eager = NaiveSession(spec, model, None), EagerSession(spec, model, None)
        condition = np.zeros((1, config.condition_tokens), np.int64)
        naive.prefill(condition)
        eager.prefill(condition)
        samples: dict[str, list[float]] = {"naive": [], "eager": [], "greedy": []}
        position, past = config.condition_tokens, naive.past
        for turn in range(ROUNDS + 1):
            naive.past = past  # every turn the same step, the first after the condition
            ms = {
                "naive": step_ms(naive, Sampling(), position),
                "eager": step_ms(eager, Sampling(), position),
                "greedy": step_ms(eager, GREEDY, position),
            }
            if turn:  # the first warms up
                for name, value in ms.items():
                    samples[name].append(value)
        a, b, c = (median(samples[name]) for name in ("naive", "eager", "greedy"))
        table.add_row(str(size), f"{a:.1f}", f"{b:.1f}", f"{c:.1f}", f"{a / b:.1f}", f"{a / c:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
