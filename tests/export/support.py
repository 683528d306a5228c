"""Small models to export, and generation in plain ONNX Runtime, without our own session code."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import nn

from nbp_engines.bundle import MANIFEST, Bundle
from nbp_engines.manifest import File
from nbp_engines.spec import GraphSpec
from nbp_export.graphs import trace
from nbp_export.sources import Source
from nbp_reference.config import BlockShape, Latent, ModelConfig, Stage, TokenizerConfig
from nbp_reference.model import NextBlockTransformer, tensor_scatter_
from nbp_reference.tokenizer import VideoTokenizer
from tests.support import filled

# 17 frames of 16×16 become 5x4x4 tokens of 125 codes.
TOKENIZER = TokenizerConfig(
    stages=(Stage(8, 0), Stage(8, 1), Stage(8, 1)), strides=((2, 2, 2), (2, 2, 2)), levels=(5, 5, 5), groups=1
)
GARBAGE = 3000.0  # finite in half precision


class Exported(NamedTuple):
    """A bundle and its model, which is in fp32 with weights rounded to the bundle's dtype."""

    bundle: Bundle
    source: Source


def source(block: str, tokenizer: bool = False, latent: tuple[int, int, int] = (5, 4, 4)) -> Source:
    """Return a small model with widely spread logits and two given latent frames."""
    config = ModelConfig(
        2, width=64, heads=2, vocab=125, positions=80, latent=Latent(*latent), block=BlockShape(1, 1, 1)
    )
    generator = filled(NextBlockTransformer(config.with_block(block)))
    parts = generator, filled(VideoTokenizer(TOKENIZER)) if tokenizer else None
    return Source("small", *parts, True, "a test's model", ("--checkpoint", "small.ckpt"))


def resealed(bundle: Bundle) -> Bundle:
    """Update a bundle's manifest to the present content of its files, and return the bundle."""
    files = tuple(File.of(bundle.path / file.path) for file in bundle.manifest.files)
    content = replace(bundle.manifest, files=files).to_bytes()
    (bundle.path / MANIFEST).write_bytes(content)
    return Bundle.of(bundle.path, content)


def by_hand(bundle: Bundle, graph: str) -> ort.InferenceSession:
    """Open a graph in ONNX Runtime with default settings."""
    return ort.InferenceSession(str(bundle.graph_file(graph)), providers=["CPUExecutionProvider"])


def rubbish(bundle: Bundle) -> dict[str, np.ndarray]:
    """Return caches full of large finite numbers."""
    rng = np.random.default_rng(11)
    spec = bundle.manifest.spec
    shape = (spec.batch, spec.heads, spec.capacity, spec.head_dim)
    dtype = {"fp32": np.float32, "fp16": np.float16}[spec.dtype]
    return {
        f"{kv}_cache_{layer}": (rng.choice([-1, 1], shape) * rng.uniform(GARBAGE / 3, GARBAGE, shape)).astype(dtype)
        for layer in range(spec.layers)
        for kv in "kv"
    }


def traced_once(traced: Callable[..., ir.Model] = trace) -> Callable[..., ir.Model]:
    """Return a replacement for `trace` that traces each graph once. It may be used only with one model."""
    traces: dict[tuple[GraphSpec, bool], bytes] = {}

    def trace_or_read(module: nn.Module, spec: GraphSpec, free_tokens: bool = False) -> ir.Model:
        if (spec, free_tokens) not in traces:
            graph = ir.to_proto(traced(module, spec, free_tokens))
            traces[spec, free_tokens] = graph.SerializeToString()
        return ir.from_proto(onnx.load_from_string(traces[spec, free_tokens]))

    return trace_or_read


class HandDriven:
    """The block loop as plain calls of ONNX Runtime; the caches are passed from call to call as arrays."""

    def __init__(self, bundle: Bundle, *graphs: str) -> None:
        self.spec = bundle.manifest.spec
        self.graphs = {name: by_hand(bundle, name) for name in graphs or ("prefill", "step")}
        self.caches = rubbish(bundle)

    def call(self, graph: str, tokens: np.ndarray, position: int) -> np.ndarray:
        """Run a graph, and return its logits [B,L,V]."""
        feeds: dict[str, Any] = {"tokens": tokens, "cache_pos": np.full(len(tokens), position), **self.caches}
        session = self.graphs[graph]
        outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
        self.caches = {name: outputs[f"{name}_out"] for name in self.caches}
        return np.asarray(outputs["logits"])

    def greedy(self, condition: np.ndarray) -> np.ndarray:
        """Return the greedy continuation [B,predicted] of a condition [B,P], both in block order."""
        blocks = [self.call("prefill", condition, 0).argmax(-1)]
        position = condition.shape[1]
        while position < self.spec.capacity:
            blocks.append(self.call("step", blocks[-1], position).argmax(-1))
            position += self.spec.block_size
        return np.concatenate(blocks, axis=1)


class Continuation(NamedTuple):
    """Tokens [B,predicted] in block order, and the smallest margin between the two largest logits of a position."""

    tokens: np.ndarray
    margin: float


@torch.inference_mode()
def greedy_reference(generator: NextBlockTransformer, condition: np.ndarray) -> Continuation:
    """Return the reference's greedy continuation."""
    k, v = generator.empty_caches(len(condition))
    tokens, position, blocks, margin = torch.from_numpy(condition), 0, [], np.inf
    while True:
        at = torch.full((len(condition),), position)
        logits, k, v = generator.block_step(tokens, at, k, v, write=tensor_scatter_)
        best = logits.topk(2).values
        margin = min(margin, float((best[..., 0] - best[..., 1]).min()))
        position += tokens.shape[1]
        tokens = logits.argmax(-1)
        blocks.append(tokens)
        if position == generator.config.capacity:
            return Continuation(torch.cat(blocks, 1).numpy(), margin)
