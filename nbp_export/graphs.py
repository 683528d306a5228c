"""Traces the reference into ONNX graphs whose inputs and outputs are those of the spec.

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

OPSET = 24  # the first opset with TensorScatter
FREE = "T"  # the name of the dynamic dimension: the number of tokens
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int64": torch.int64}


def system_spec(model: ModelConfig, tokenizer: TokenizerConfig | None, dtype: str, batch: int) -> SystemSpec:
    """Return the spec of a bundle. Without a tokenizer the size of the video is unknown and set to zero."""
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
    """`block_step` with the caches as separate arguments k_0, v_0, k_1 …; the module of prefill and step."""

    def __init__(self, model: NextBlockTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, cache_pos: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        logits, k_out, v_out = self.model.block_step(tokens, cache_pos, caches[0::2], caches[1::2])
        return logits, *(cache for pair in zip(k_out, v_out, strict=True) for cache in pair)


class _Encode(nn.Module):
    """The tokenizer from an fp32 video to tokens, in any dtype of the weights."""

    def __init__(self, tokenizer: VideoTokenizer, dtype: torch.dtype) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.dtype = dtype

    def forward(self, video: Tensor) -> Tensor:
        return self.tokenizer.encode(video.to(self.dtype))


class _Decode(nn.Module):
    """The tokenizer from tokens to an fp32 video."""

    def __init__(self, tokenizer: VideoTokenizer, latent: tuple[int, int, int]) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.latent = latent

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tokenizer.decode(tokens, self.latent).float()


def graph_module(spec: SystemSpec, name: str, model: nn.Module) -> nn.Module:
    """Return the module that computes the named graph. The model is converted to the spec's dtype in place."""
    dtype = TORCH_DTYPES[spec.dtype]
    model = model.to(dtype).eval()
    if isinstance(model, NextBlockTransformer):
        return _BlockStep(model)
    assert isinstance(model, VideoTokenizer)
    return _Encode(model, dtype) if name == "encode" else _Decode(model, spec.latent)


def trace(module: nn.Module, spec: GraphSpec, free_tokens: bool = False) -> "ir.Model":
    """Trace a module into one graph of opset 24 with the spec's names, which shares torch's memory for the weights.

    All shapes are static, except with `free_tokens`: then a block step takes any number of tokens, so that one graph
    serves as prefill, `step` and `step_1`. Torch traces it for more tokens than one block, but it is also valid for
    fewer.
    """
    import onnx_ir as ir

    # Each input has its own tensor, because torch.export silently merges inputs that are the same object.
    example = tuple(torch.zeros(t.shape, dtype=TORCH_DTYPES[t.dtype]) for t in spec.inputs)
    traced: nn.Module | torch.export.ExportedProgram = module.eval()
    if free_tokens:
        (batch, size), slots = spec.inputs[0].shape, spec.inputs[2].shape[2]
        # The example has a size that occurs nowhere else: torch makes a size of 1 a constant and ties equal sizes.
        example = (torch.zeros(batch, 2 * size + 1, dtype=torch.int64), *example[1:])
        free = {1: torch.export.Dim(FREE, min=size + 1, max=slots)}
        shapes = {"tokens": free, "cache_pos": None, "caches": tuple(None for _ in example[2:])}
        traced = torch.export.export(module.eval(), example, dynamic_shapes=shapes)
    # This logger warns that torchvision is missing, which is not needed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # from torch itself, about its pytrees
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
        # Torch assumes that the last L rows always exist. Fewer tokens give fewer rows, so the shapes that it inferred
        # after the selection of these rows are wrong.
        for value in (v for node in graph for v in node.outputs if v not in graph.outputs):
            value.shape = None
        (batch, _), (_, _, vocab) = spec.inputs[0].shape, spec.outputs[0].shape
        graph.inputs[0].shape = ir.Shape([batch, FREE])
        graph.outputs[0].shape = ir.Shape([batch, f"min({FREE}, L)", vocab])
    return model


def _tensor_scatter(cache: Any, update: Any, cache_pos: Any) -> Any:
    """Translate a cache update to a single TensorScatter node on the graph's input."""
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
