"""Traces the reference into static ONNX graphs whose inputs and outputs are those of the spec.

Shape legend: B batch, T tokens in the call, P condition tokens, L tokens in a block, S cache slots.
"""

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nbp_engines.spec import GraphSpec, SystemSpec
from nbp_reference.config import ModelConfig, TokenizerConfig
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import VideoTokenizer

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 24  # the first with TensorScatter
FREE = "T"  # the number of tokens, where a graph leaves it open
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int64": torch.int64}


def system_spec(model: ModelConfig, tokenizer: TokenizerConfig | None, dtype: str, batch: int) -> SystemSpec:
    """All static numbers of a bundle. Without a tokenizer the video's size is unknown, and zero."""
    video, condition_frames = (0, 0, 0), 0
    if tokenizer:
        _, high, wide = tokenizer.compression
        video = (tokenizer.frames(model.latent.t), model.latent.h * high, model.latent.w * wide)
        condition_frames = tokenizer.frames(model.condition_latents) if model.condition_latents else 0
    return SystemSpec(
        block=(model.block.t, model.block.h, model.block.w),
        latent=(model.latent.t, model.latent.h, model.latent.w),
        condition_latents=model.condition_latents,
        video=video,
        condition_frames=condition_frames,
        batch=batch,
        dtype=dtype,
        layers=model.layers,
        heads=model.heads,
        head_dim=model.head_dim,
        vocab=model.vocab,
        text_tokens=model.text.tokens if model.text else 0,
        text_vocab=model.text.vocab if model.text else 0,
    )


class _BlockStep(nn.Module):
    """`block_step` with the caches as flat arguments k_0, v_0, k_1 …; serves prefill and steps alike."""

    def __init__(self, model: NextBlockTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, cache_pos: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        logits, k_out, v_out = self.model.block_step(tokens, cache_pos, caches[0::2], caches[1::2])
        return logits, *(cache for pair in zip(k_out, v_out, strict=True) for cache in pair)


class _Encode(nn.Module):
    def __init__(self, tokenizer: VideoTokenizer, dtype: torch.dtype) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.dtype = dtype

    def forward(self, video: Tensor) -> Tensor:
        return self.tokenizer.encode(video.to(self.dtype))


class _Decode(nn.Module):
    def __init__(self, tokenizer: VideoTokenizer, latent: tuple[int, int, int]) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.latent = latent

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tokenizer.decode(tokens, self.latent).float()


def graph_module(spec: SystemSpec, name: str, model: nn.Module) -> nn.Module:
    """The function behind the named graph, weights in the spec's dtype (the model is converted in place)."""
    dtype = TORCH_DTYPES[spec.dtype]
    model = model.to(dtype).eval()
    if isinstance(model, NextBlockTransformer):
        return _BlockStep(model)
    assert isinstance(model, VideoTokenizer)
    return _Encode(model, dtype) if name == "encode" else _Decode(model, spec.latent)


def trace(module: nn.Module, spec: GraphSpec, free_tokens: bool = False) -> "ir.Model":
    """One graph of opset 24 with the spec's names; the weights stay where torch has them.

    All static, or with `free_tokens`, for a block step, its tokens in any number: the same graph is then prefill and
    steps, fewer tokens than a block included, though torch traces it for a block and more.
    """
    import onnx_ir as ir

    # One tensor for each input: torch.export merges inputs that are the same object, silently.
    example = tuple(torch.zeros(t.shape, dtype=TORCH_DTYPES[t.dtype]) for t in spec.inputs)
    traced: nn.Module | torch.export.ExportedProgram = module.eval()
    if free_tokens:
        (batch, size), slots = spec.inputs[0].shape, spec.inputs[2].shape[2]
        # An example of a size that nothing else has; torch takes a 1, and equal sizes, for constants.
        example = (torch.zeros(batch, 2 * size + 1, dtype=torch.int64), *example[1:])
        free = {1: torch.export.Dim(FREE, min=size + 1, max=slots)}
        shapes = {"tokens": free, "cache_pos": None, "caches": tuple(None for _ in example[2:])}
        traced = torch.export.export(module.eval(), example, dynamic_shapes=shapes)
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # wants torchvision
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, about its pytrees
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        program = torch.onnx.export(
            traced,
            () if free_tokens else example,
            dynamo=True,
            opset_version=OPSET,
            input_names=[t.name for t in spec.inputs],
            output_names=[t.name for t in spec.outputs],
            custom_translation_table={torch.ops.nbp.tensor_scatter.default: _tensor_scatter},
            verbose=False,
        )
    assert program is not None
    model, graph = program.model, program.model.graph
    graph.name = spec.name
    _clear_metadata(model)
    if free_tokens:
        # Torch has fixed the sizes behind the last block's rows, which are fewer for fewer tokens.
        for value in (v for node in graph for v in node.outputs if v not in graph.outputs):
            value.shape = None
        (batch, _), (_, _, vocab) = spec.inputs[0].shape, spec.outputs[0].shape
        graph.inputs[0].shape = ir.Shape([batch, FREE])
        graph.outputs[0].shape = ir.Shape([batch, f"min({FREE}, L)", vocab])
    return model


def _tensor_scatter(cache: Any, update: Any, cache_pos: Any) -> Any:
    """The cache write as one node, straight on the graph's input."""
    from onnxscript.values import Opset

    return Opset("", OPSET).TensorScatter(cache, update, cache_pos, axis=2, mode="linear")


def _clear_metadata(model: "ir.Model") -> None:
    """Remove the exporter's metadata, which includes stack traces with the paths of this machine."""
    # onnx_ir's ClearMetadataAndDocStringPass would leave the metadata of the model and of all values.
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
