"""Damaged, renamed and malicious files: each is refused with an error that names it, and none executes code.

`pytest --collect-only -q` counts the cases. None of them may need much time or memory, which is part of the test.
"""

import argparse
import builtins
import collections
import functools
import gzip
import io
import json
import operator
import os
import pickle
import struct
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from nbp_reference import checkpoint
from nbp_reference.config import TOKENIZERS, ModelConfig
from nbp_reference.errors import CheckpointError
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import VideoTokenizer
from tests.reference.test_checkpoint import lightning
from tests.support import filled, small_generator

CONFIG = ModelConfig(layers=2, width=32, heads=4, vocab=50, positions=1280)
KEY = "transformer.blocks.0.attn.key.weight"  # [32, 32]
HEAD = "transformer.head.weight"  # [50, 32]
ABSENT = object()
DOUBLED: list[Any] = []  # takes a few bytes in a file, and about 2^60 characters when printed
for _ in range(60):
    DOUBLED = [DOUBLED, DOUBLED]

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns about some of the tensors that are saved here


@pytest.fixture(scope="module")
def model() -> NextBlockTransformer:
    return filled(NextBlockTransformer(CONFIG))


@pytest.fixture(autouse=True)
def _small_official_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOKENIZERS, "official", TOKENIZERS["nbp-tiny"])


def refused(path: Path, message: str) -> None:
    """Assert that the file is refused with a short printable message that matches and names the file."""
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000
    assert str(error.value).isprintable(), "an escape sequence from a file reaches the terminal"


def test_the_file_that_the_cases_change_is_valid(model: NextBlockTransformer, tmp_path: Path) -> None:
    torch.save(lightning(model), tmp_path / "a.ckpt")
    assert checkpoint.load(tmp_path / "a.ckpt").generator is not None


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


# --- Weights ----------------------------------------------------------------------------------------------------------


def ones_and(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor [32, 32] of ones with one other value."""
    tensor = torch.ones(32, 32, dtype=dtype)
    tensor[3, 5] = value
    return tensor


def view(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Call:
    """A tensor whose storage has 8 numbers, and that claims this size, stride and offset."""
    storage = torch.zeros(8)._typed_storage()
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})


def quietly(make: Callable[[], Tensor]) -> Tensor:
    """Call the function without torch's warnings about prototype kinds of tensors."""
    with warnings.catch_warnings(action="ignore"):
        return make()


NESTED = quietly(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
QUANTIZED = quietly(lambda: torch.quantize_per_tensor(torch.ones(32, 32), 0.1, 0, torch.qint8))
CSR = quietly(lambda: torch.eye(32).to_sparse_csr())


DAMAGED = "damaged or incomplete"
WEIGHTS: dict[str, tuple[dict[Any, Any], str]] = {
    "a_tensor_missing": ({KEY: ABSENT}, r"blocks\.0\.attn\.key\.weight: expected \[32, 32\], found nothing"),
    "an_extra_layer": ({"transformer.blocks.2.ln1.weight": torch.ones(32)}, r"expected no such key, found \[32\]"),
    "another_width": ({KEY: torch.zeros(32, 16)}, r"key\.weight: expected \[32, 32\], found \[32, 16\]"),
    "another_rank": ({KEY: torch.zeros(32 * 32)}, r"key\.weight: expected \[32, 32\], found \[1024\]"),
    "a_scalar": ({KEY: torch.zeros(())}, r"key\.weight: expected \[32, 32\], found \[\]"),
    "an_empty_tensor": ({KEY: torch.zeros(0, 32)}, r"expected \[32, 32\], found \[0, 32\]"),
    "head_of_another_vocabulary": ({HEAD: torch.zeros(60, 32)}, r"head\.weight: expected \[50, 32\], found \[60, 32\]"),
    "tok_emb_missing": ({"transformer.tok_emb.weight": ABSENT}, r"tok_emb\.weight: expected \[V, C\], found nothing"),
    "tok_emb_flat": ({"transformer.tok_emb.weight": torch.zeros(50)}, r"expected \[V, C\], found \[50\]"),
    "tok_emb_narrow": (
        {"transformer.tok_emb.weight": torch.zeros(50, 16)},
        "is 16 wide, but .*n_embd is 32",
    ),
    "pos_emb_missing": ({"transformer.pos_emb": ABSENT}, r"pos_emb: expected \[1, P, C\], found nothing"),
    "pos_emb_flat": (
        {"transformer.pos_emb": torch.zeros(1280, 32)},
        r"pos_emb: expected \[1, P, C\], found \[1280, 32",
    ),
    "pos_emb_twice": ({"transformer.pos_emb": torch.zeros(2, 1280, 32)}, r"expected \[1, 1280, 32\], found \[2, 1280"),
    "pos_emb_short": ({"transformer.pos_emb": torch.zeros(1, 8, 32)}, "8 positions do not hold a clip of 5x16x16"),
    "pos_emb_endless": (
        {"transformer.pos_emb": torch.zeros(1).expand(1, 10**12, 32)},
        r"pos_emb: expected .* found \[1, 1000000000000, 32\] in 4 bytes",
    ),
    "expanded": ({KEY: torch.ones(1).expand(32, 32)}, r"expected \[32, 32\], found \[32, 32\] in 4 bytes"),
    "expanded_beyond_memory": ({KEY: torch.ones(1).expand(10**6, 10**6)}, r"found \[1000000, 1000000\] in 4 bytes"),
    "overlapping": ({KEY: torch.ones(63).as_strided((32, 32), (1, 1))}, r"found \[32, 32\] in 252 bytes"),
    "beyond_its_storage": ({KEY: view((32, 32), (32, 1))}, DAMAGED),
    "beyond_all_storage": ({KEY: view((10**6, 10**6), (10**6, 1))}, DAMAGED),
    "a_shape_that_overflows": ({KEY: view((2**40, 2**40), (0, 0))}, DAMAGED),
    "a_negative_shape": ({KEY: view((-4,), (1,))}, DAMAGED),
    "a_negative_stride": ({KEY: view((4,), (-1,), 4)}, DAMAGED),
    "a_negative_offset": ({KEY: view((4,), (1,), -4)}, DAMAGED),
    "nan": ({KEY: ones_and(float("nan"))}, r"key\.weight: 1 of \[32, 32\] values are NaN or inf"),
    "nan_everywhere": ({KEY: torch.full((32, 32), torch.nan)}, r"key\.weight: 1024 of \[32, 32\] values are NaN"),
    "infinite": ({KEY: ones_and(float("inf"))}, r"key\.weight: 1 of \[32, 32\] values are NaN or inf"),
    "minus_infinite": ({KEY: ones_and(float("-inf"))}, r"key\.weight: 1 of \[32, 32\] values are NaN or inf"),
    "both_infinities": (
        {KEY: ones_and(float("inf")) + ones_and(float("-inf")).T},
        r"2 of \[32, 32\] values are NaN",
    ),
    "nan_in_fp16": ({KEY: ones_and(float("nan"), torch.float16)}, r"key\.weight: 1 of \[32, 32\] values"),
    "beyond_fp32": (
        {KEY: ones_and(1e300, torch.float64)},
        r"key\.weight: 1 of \[32, 32\] values are NaN or infinite",
    ),
    "integers": ({KEY: torch.ones(32, 32).long()}, r"expected \[32, 32\], found \[32, 32\] torch\.int64"),
    "booleans": ({KEY: torch.ones(32, 32).bool()}, r"expected \[32, 32\], found \[32, 32\] torch\.bool"),
    "complex": (
        {KEY: torch.ones(32, 32).to(torch.complex64)},
        r"expected \[32, 32\], found \[32, 32\] torch\.complex64",
    ),
    "negated": ({KEY: torch._neg_view(torch.ones(32, 32))}, r"expected \[32, 32\], found \[32, 32\] negated"),
    "sparse_coo": ({KEY: torch.eye(32).to_sparse()}, r"expected \[32, 32\], found \[32, 32\] torch\.sparse_coo"),
    "sparse_csr": ({KEY: CSR}, r"expected \[32, 32\], found \[32, 32\] torch\.sparse_csr"),
    "quantized": (
        {KEY: QUANTIZED},
        r"expected \[32, 32\], found \[32, 32\] torch\.qint8",
    ),
    "meta": ({KEY: torch.ones(32, 32, device="meta")}, r"expected \[32, 32\], found \[32, 32\] without content"),
    "nested": ({KEY: NESTED}, "found a nested tensor"),
    "nested_tok_emb": (
        {"transformer.tok_emb.weight": NESTED},
        r"tok_emb\.weight: expected \[V, C\], found a nested tensor",
    ),
    "text": ({KEY: "weights"}, r"key\.weight: expected \[32, 32\], found 'weights'"),
    "a_list": ({KEY: [[0.0] * 32] * 32}, r"key\.weight: expected \[32, 32\], found a list"),
    "none": ({KEY: None}, r"key\.weight: expected \[32, 32\], found nothing"),
    "a_list_that_doubles": ({KEY: DOUBLED}, "found a list"),
    "a_number_as_key": ({7: torch.zeros(2)}, "expected names as keys of the state dict, found 7"),
    "a_tuple_as_key": ({("transformer", "x"): torch.zeros(2)}, "expected names as keys of .*, found a tuple"),
    "with_and_without_prefix": (
        {f"module.{KEY}": torch.zeros(32, 32)},
        r"'transformer\.blocks\.0\.attn\.key\.weight' occurs twice, with and without `module\.`",
    ),
    "terminal_codes_in_a_key": ({"transformer.\x1b[2J\n": torch.zeros(1)}, r"x1b\[2J\\n': expected no such key"),
    "a_long_key": ({"transformer." + "x" * 10**6: torch.zeros(1)}, "xxx: expected no such key"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case: str, model: NextBlockTransformer, tmp_path: Path) -> None:
    changes, message = WEIGHTS[case]
    data = lightning(model)
    data["state_dict"] = {k: v for k, v in (data["state_dict"] | changes).items() if v is not ABSENT}
    torch.save(data, tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", message)


POSITIVE = "expected a positive integer"
ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "layers_beyond_memory": ({"n_layer": 10**9}, "has 1000000000 layers, but the file only 37 tensors"),
    "layers_beyond_64_bits": ({"n_layer": 2**200}, "layers, but the file only 37 tensors"),
    "layers_negative": ({"n_layer": -2}, f"args.n_layer is -2, {POSITIVE}"),
    "layers_none": ({"n_layer": 0}, f"args.n_layer is 0, {POSITIVE}"),
    "layers_missing": ({"n_layer": None}, f"args.n_layer is None, {POSITIVE}"),
    "layers_a_tensor": ({"n_layer": torch.tensor(2)}, f"args.n_layer is a Tensor, {POSITIVE}"),
    "layers_true": ({"n_layer": True}, f"args.n_layer is True, {POSITIVE}"),
    "a_layer_more": ({"n_layer": 3}, r"blocks\.2\.\S+: expected \[32\], found nothing.* and 13 more"),
    "a_layer_less": ({"n_layer": 1}, r"blocks\.1\.\S+ expected no such key, found \[32\].* and 13 more"),
    "heads_none": ({"n_head": 0}, f"args.n_head is 0, {POSITIVE}"),
    "heads_that_do_not_divide": ({"n_head": 3}, "3 heads do not divide a width of 32"),
    "heads_too_many": ({"n_head": 64}, "64 heads do not divide a width of 32"),
    "width_of_another_model": ({"n_embd": 64}, r"tok_emb\.weight is 32 wide, but hyper_parameters\.args\.n_embd is 64"),
    "width_a_fraction": ({"n_embd": 32.0}, f"args.n_embd is 32.0, {POSITIVE}"),
    "block_none": ({"token_number_per_step": 0}, f"args.token_number_per_step is 0, {POSITIVE}"),
    "block_negative": ({"token_number_per_step": -1}, f"args.token_number_per_step is -1, {POSITIVE}"),
    "block_a_fraction": ({"token_number_per_step": 1.5}, f"args.token_number_per_step is 1.5, {POSITIVE}"),
    "block_a_text": ({"token_number_per_step": "16"}, f"args.token_number_per_step is '16', {POSITIVE}"),
    "block_that_does_not_tile": ({"token_number_per_step": 3}, "block 1x1x3 does not tile .* these do: 1x1x1, "),
    "block_beyond_the_clip": ({"token_number_per_step": 10**9}, "block size 1000000000 does not fill|does not tile"),
    "conditional_without_hybrid": ({"unconditional": False}, "class-conditional model that is not a hybrid"),
    "hybrid_without_room_for_text": (
        {"hybrid": True, "unconditional": False, "cond_token_num": 8},
        "tok_emb.weight has 50 rows, but a hybrid needs 16 for special",
    ),
    "hybrid_without_text": ({"hybrid": True, "unconditional": False}, f"args.cond_token_num is 0, {POSITIVE}"),
    "a_list_that_doubles": (
        {"n_layer": DOUBLED},
        f"args.n_layer is a list, {POSITIVE}",
    ),
    "terminal_codes": ({"n_layer": "\x1b[2J"}, rf"args.n_layer is '\\x1b\[2J', {POSITIVE}"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str, model: NextBlockTransformer, tmp_path: Path) -> None:
    changes, message = ARGUMENTS[case]
    torch.save(lightning(model, **changes), tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", message)


def test_many_layers_that_share_a_small_storage_are_refused(tmp_path: Path) -> None:
    """Converting each to contiguous fp32 would copy it, which would take much more memory than the file has bytes."""
    with torch.device("meta"):
        large = NextBlockTransformer(replace(CONFIG, layers=80))
    data = lightning(large)
    made: dict[Any, Tensor] = {}
    for key, value in data["state_dict"].items():
        data["state_dict"][key] = made.setdefault(value.shape, torch.zeros(value.shape))
    torch.save(data, tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", "its tensors have 1060544 values, but the file has only")


@given(
    share=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), kind=st.sampled_from(["pickle", "end", "json"])
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_is_harmless_or_refused(
    share: float, byte: int, kind: str, model: NextBlockTransformer, tmp_path: Path
) -> None:
    """The byte is in what describes the weights: the pickle, the zip's directory, or the header of our own files."""
    path = tmp_path / "a.ckpt"
    if kind == "json":
        checkpoint.save(model, path)
    else:
        torch.save(lightning(model), path)
    content = bytearray(path.read_bytes())
    begin = {"pickle": 0, "end": content.rfind(b"data/0"), "json": 0}[kind]
    length = {"pickle": 5000, "end": len(content) - begin, "json": 3500}[kind]
    content[begin + int(length * share)] = byte
    path.write_bytes(content)
    with suppress(CheckpointError):
        checkpoint.load(path)


CONTENT: dict[str, tuple[object, str]] = {
    "nothing": ({}, "neither a `state_dict` .* nor a `model_state_dict`"),
    "a_bare_state_dict": ({KEY: torch.zeros(2)}, "neither a `state_dict` .* nor a `model_state_dict`"),
    "a_list": ([1, 2], "neither a `state_dict`"),
    "a_tensor": (torch.zeros(2), "neither a `state_dict`"),
    "no_arguments": ({"state_dict": {}}, "hyper_parameters.args is missing"),
    "arguments_in_a_list": ({"state_dict": {}, "hyper_parameters": [1]}, "hyper_parameters.args is missing"),
    "arguments_in_a_dictionary": (
        {"state_dict": {}, "hyper_parameters": {"args": {"n_layer": 2}}},
        "hyper_parameters.args is missing",
    ),
    "weights_in_a_list": (
        {"state_dict": [], "hyper_parameters": {"args": argparse.Namespace()}},
        "expected a dictionary of tensors, found a list",
    ),
    "no_weights": (
        {"state_dict": {}, "hyper_parameters": {"args": argparse.Namespace()}},
        r"tok_emb\.weight: expected \[V, C\], found nothing",
    ),
    "a_tokenizer_without_weights": ({"model_state_dict": {}}, "has 7 layers, but the file only 0 tensors"),
    "a_tokenizer_of_other_weights": (
        {"model_state_dict": {f"module.{i}": torch.zeros(2) for i in range(9)}},
        r"'0': expected no such key, found \[2\]",
    ),
    "a_generator_as_a_tokenizer": (
        {"model_state_dict": {key: torch.zeros(2) for key in NextBlockTransformer(CONFIG).state_dict()}},
        r"'blocks\.0\.\S+: expected no such key, found \[2\]",
    ),
}


@pytest.mark.parametrize("case", CONTENT)
def test_content(case: str, tmp_path: Path) -> None:
    content, message = CONTENT[case]
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", message)


# --- Our own format ---------------------------------------------------------------------------------------------------

OURS: dict[str, tuple[str, dict[str, Any], str]] = {
    "layers_beyond_memory": ("generator", {"layers": 10**9}, "has 1000000000 layers, but the file only 21"),
    "layers_negative": ("generator", {"layers": -1}, r"config\['layers'\] is -1, expected a count"),
    "layers_a_fraction": ("generator", {"layers": 1.5}, r"config\['layers'\] is 1.5, expected a count"),
    "layers_nan": ("generator", {"layers": float("nan")}, r"config\['layers'\] is nan, expected a count"),
    "layers_true": ("generator", {"layers": True}, r"config\['layers'\] is True, expected a count"),
    "layers_a_text": ("generator", {"layers": "1"}, "does not describe a model: TypeError"),
    "width_of_another_model": ("generator", {"width": 64}, r"expected \[64\], found \[32\]"),
    "width_beyond_memory": (
        "generator",
        {"width": 2**31 - 1},
        r"expected \[2147483647\], found \[32\]|does not describe",
    ),
    "heads_none": ("generator", {"heads": 0}, "0 heads do not divide a width of 32"),
    "heads_that_do_not_divide": ("generator", {"heads": 5}, "5 heads do not divide a width of 32"),
    "vocabulary_of_another_model": ("generator", {"vocab": 60}, r"expected \[60, 32\], found \[50, 32\]"),
    "positions_beyond_memory": (
        "generator",
        {"positions": 10**9},
        r"expected \[1, 1000000000, 32\], found \[1, 64, 32",
    ),
    "latent_beyond_the_positions": ("generator", {"latent": [8, 8, 8]}, "64 positions do not hold a clip of 8x8x8"),
    "latent_endless": ("generator", {"latent": [10**9, 1, 1]}, "64 positions do not hold a clip of 1000000000x1x1"),
    "latent_empty": ("generator", {"latent": [4, 0, 4]}, "64 positions do not hold a clip of 4x0x4"),
    "latent_flat": ("generator", {"latent": [4, 4]}, "does not describe a model: TypeError"),
    "latent_in_one_block": ("generator", {"latent": [10**9, 1, 1], "block": f"{10**9}x1x1"}, "64 positions do not"),
    "all_frames_given": ("generator", {"condition_latents": 4}, "found 4 of 4 latent frames and no text"),
    "no_frame_given": ("generator", {"condition_latents": 0}, "found 0 of 4 latent frames and no text"),
    "frames_and_text": (
        "generator",
        {"text": {"tokens": 2, "vocab": 4, "words": []}, "positions": 66},
        r"found 2 of 4 latent frames and a text|expected \[1, 66",
    ),
    "text_without_tokens": (
        "generator",
        {"text": {"tokens": 0, "vocab": 4, "words": []}, "condition_latents": 0},
        "found 0 of 4 latent frames and a text",
    ),
    "text_that_takes_all_ids": (
        "generator",
        {"text": {"tokens": 1, "vocab": 50, "words": []}, "condition_latents": 0, "latent": [3, 4, 4]},
        "50 token ids leave none for the video",
    ),
    "block_that_does_not_tile": ("generator", {"block": "1x1x3"}, "block 1x1x3 does not tile"),
    "block_none": ("generator", {"block": "0x1x1"}, "block '0x1x1' is neither"),
    "block_a_number": ("generator", {"block": 4}, "does not describe a model: AttributeError"),
    "an_unknown_field": ("generator", {"rope": 1}, "does not describe a model: TypeError"),
    "stages_beyond_memory": ("tokenizer", {"stages": [[24, 10**9]] * 4}, "has 4000000004 layers, but the file only"),
    "stages_of_another_width": (
        "tokenizer",
        {"stages": [[48, 0], [24, 1], [48, 1], [48, 1]]},
        r"expected \[48.*found \[24",
    ),
    "stages_missing": ("tokenizer", {"stages": []}, "does not describe a model: IndexError"),
    "levels_endless": ("tokenizer", {"levels": [2] * 30_000}, "no tokenizer has the groups"),
    "levels_of_one": ("tokenizer", {"levels": [1] * 30_000}, "no tokenizer has the groups"),
    "levels_fewer": ("tokenizer", {"levels": [8, 5, 5]}, r"expected \[3, 48, 1, 1, 1\], found \[4, 48, 1, 1, 1\]"),
    "levels_missing": ("tokenizer", {"levels": []}, "does not describe a model: ValueError"),
    "groups_none": ("tokenizer", {"groups": 0}, "no tokenizer has the groups"),
    "groups_that_do_not_divide": ("tokenizer", {"groups": 7}, "does not describe a model: ValueError"),
    "strides_none": ("tokenizer", {"strides": [[1, 0, 2], [2, 2, 2], [2, 2, 2]]}, "no tokenizer has the groups"),
    "strides_negative": ("tokenizer", {"strides": [[1, -2, -2], [2, 2, 2], [2, 2, 2]]}, "is -2, expected a count"),
    "strides_fewer": ("tokenizer", {"strides": [[1, 2, 2], [2, 2, 2]]}, "does not describe a model: ValueError"),
    "strides_flat": ("tokenizer", {"strides": [1, 2, 2]}, "does not describe a model: TypeError"),
}


@pytest.mark.parametrize("case", OURS)
def test_our_own_config(case: str, tmp_path: Path) -> None:
    kind, changes, message = OURS[case]
    saved = (
        small_generator("1x1x4", layers=1) if kind == "generator" else filled(VideoTokenizer(TOKENIZERS["nbp-tiny"]))
    )
    config = json.dumps(saved.config.to_json() | changes)
    save_file({k: v.contiguous() for k, v in saved.state_dict().items()}, tmp_path / "a.safetensors", {kind: config})
    refused(tmp_path / "a.safetensors", message)


def tensors_file(header: bytes, content: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file, which may lie about the length of its header."""
    return struct.pack("<Q", len(header) if length is None else length) + header + content


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BYTES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "neither a PyTorch checkpoint nor safetensors"),
    "one_byte": (b"P", "neither a PyTorch checkpoint nor safetensors"),
    "zeros": (bytes(5000), "neither a PyTorch checkpoint nor safetensors"),
    "noise": (bytes(range(1, 256)) * 40, "neither a PyTorch checkpoint nor safetensors"),
    "a_text": (b"weights will follow", "neither a PyTorch checkpoint nor safetensors"),
    "a_picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG picture"),
    "a_web_page": (b"<!DOCTYPE html><html>404</html>", "a web page .* the download went wrong"),
    "a_git_lfs_pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "an_onnx_graph": (b"\x08\x0a\x12\x07pytorch" + bytes(100), "probably an ONNX graph"),
    "gzip": (gzip.compress(b"weights"), "compressed: run `gunzip`"),
    "a_pickle": (pickle.dumps({"state_dict": {}}), "torch's old format.*torch.save"),
    "a_zips_first_bytes": (b"PK\x03\x04", DAMAGED),
    "an_empty_zip": (b"PK\x05\x06" + bytes(18), "neither a PyTorch checkpoint nor safetensors"),
    "header_length_alone": (tensors_file(b"{", length=2**63), DAMAGED),
    "header_beyond_the_file": (tensors_file(header(x=F32), bytes(8), 10**6), DAMAGED),
    "header_of_gigabytes": (tensors_file(header(x=F32), bytes(8), 2**40), DAMAGED),
    "header_too_short": (tensors_file(header(x=F32), bytes(8), 5), DAMAGED),
    "header_that_is_no_json": (tensors_file(b"{'x'}"), DAMAGED),
    "header_of_nothing": (tensors_file(b"{}"), "its metadata names neither"),
    "header_nested": (tensors_file(b'{"x":' + b"[" * 10_000), DAMAGED),
    "content_missing": (tensors_file(header(x=F32)), DAMAGED),
    "content_left_over": (tensors_file(header(x=F32), bytes(9)), DAMAGED),
    "offsets_backwards": (tensors_file(header(x=F32 | {"data_offsets": [8, 0]}), bytes(8)), DAMAGED),
    "offsets_that_overlap": (
        tensors_file(header(x=F32, y=F32 | {"data_offsets": [4, 12]}), bytes(12)),
        "damaged or incomplete",
    ),
    "a_shape_beyond_the_content": (
        tensors_file(header(x=F32 | {"shape": [10**12]}), bytes(8)),
        "damaged or incomplete",
    ),
    "a_shape_that_overflows": (tensors_file(header(x=F32 | {"shape": [2**40] * 3}), bytes(8)), DAMAGED),
    "a_negative_shape": (tensors_file(header(x=F32 | {"shape": [-2]}), bytes(8)), DAMAGED),
    "an_unknown_dtype": (tensors_file(header(x=F32 | {"dtype": "F7"}), bytes(8)), DAMAGED),
    "metadata_that_is_no_json": (tensors_file(header(__metadata__={"generator": "{"})), "does not describe a model"),
    "metadata_nested": (
        tensors_file(header(__metadata__={"generator": "[" * 100_000})),
        "does not describe a model: RecursionError",
    ),
    "metadata_a_list": (tensors_file(header(__metadata__={"generator": "[]"})), "does not describe a model: TypeError"),
    "metadata_a_number": (
        tensors_file(header(__metadata__={"tokenizer": "9"})),
        "does not describe a model: TypeError",
    ),
    "metadata_empty": (tensors_file(header(__metadata__={"generator": "{}"})), "does not describe a model: KeyError"),
    "metadata_of_digits": (
        tensors_file(header(__metadata__={"generator": '{"layers": ' + "9" * 10_000 + "}"})),
        "does not describe a model: ValueError",
    ),
}


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
@pytest.mark.parametrize("case", BYTES)
def test_bytes(case: str, suffix: str, tmp_path: Path) -> None:
    """The message does not depend on the name of the file."""
    content, message = BYTES[case]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    refused(path, message)


# --- Zips -------------------------------------------------------------------------------------------------------------


def rezipped(path: Path, changes: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the zip again with changed entries; None removes an entry."""
    with zipfile.ZipFile(path) as archive:
        entries: dict[str, bytes | None] = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    entries |= {f"{path.stem}/{name}": content for name, content in changes.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            if content is not None:
                archive.writestr(name, content)


def with_claim(path: Path, claim: bytes) -> None:
    """Replace the size of a storage with 1024 numbers by another pickled number."""
    with zipfile.ZipFile(path) as archive:
        content = archive.read("a/data.pkl")
    true_size = b"M\x00\x04t"  # 1024, and the end of the tuple that describes the storage
    assert true_size in content
    rezipped(path, {"data.pkl": content.replace(true_size, claim + b"t", 1)})


ZIPS: dict[str, tuple[Callable[[Path], None], str]] = {
    "compressed": (lambda path: rezipped(path, {}, zipfile.ZIP_DEFLATED), "in it is compressed.*get the original"),
    "a_bomb": (
        lambda path: rezipped(path, {"data.pkl": bytes(10**8)}, zipfile.ZIP_DEFLATED),
        "in it is compressed.*get the original",
    ),
    "no_pickle": (lambda path: rezipped(path, {"data.pkl": None}), "a zip file that torch.save did not write"),
    "torchscript": (lambda path: rezipped(path, {"constants.pkl": b"."}), "a zip file that torch.save did not write"),
    "weights_missing": (lambda path: rezipped(path, {"data/0": None}), DAMAGED),
    "an_empty_pickle": (lambda path: rezipped(path, {"data.pkl": b""}), DAMAGED),
    "half_a_pickle": (lambda path: rezipped(path, {"data.pkl": b"\x80\x02}q\x00("}), DAMAGED),
    "another_byte_order": (lambda path: rezipped(path, {"byteorder": b"middle"}), DAMAGED),
    "fewer_numbers_than_claimed": (lambda path: with_claim(path, b"K\x02"), DAMAGED),
    "a_negative_claim": (lambda path: with_claim(path, b"J" + struct.pack("<i", -1024)), DAMAGED),
}


@pytest.mark.parametrize("case", ZIPS)
def test_zips(case: str, model: NextBlockTransformer, tmp_path: Path) -> None:
    damage, message = ZIPS[case]
    torch.save(lightning(model), tmp_path / "a.ckpt")
    damage(tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", message)


def test_a_zip_of_other_things(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("notes.txt", "weights will follow")
    refused(tmp_path / "a.ckpt", "a zip file that torch.save did not write")


@pytest.mark.parametrize("share", [*range(0, 100, 4), 99, 99.9])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_truncated(share: float, suffix: str, model: NextBlockTransformer, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".ckpt":
        torch.save(lightning(model), path)
    else:
        checkpoint.save(model, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share / 100)])
    refused(path, "damaged or incomplete|neither a PyTorch checkpoint nor safetensors")


# --- Paths ------------------------------------------------------------------------------------------------------------


def test_paths_that_are_not_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")  # opening it would wait forever
    (tmp_path / "link.ckpt").symlink_to(tmp_path / "nowhere")
    for path, message in {
        tmp_path: "not a regular file",
        tmp_path / "pipe.ckpt": "not a regular file",
        Path("/dev/zero"): "not a regular file",
        tmp_path / "link.ckpt": "no such file",
        tmp_path / "nowhere.ckpt": "no such file",
        tmp_path / ("x" * 5000): "cannot be read: File name too long",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(path)


@contextmanager
def nobody() -> Iterator[None]:
    """Run the block as an unprivileged user, because root may read every file."""
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_file_without_read_permission(model: NextBlockTransformer, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").chmod(0)
    with nobody():
        refused(tmp_path / "a.safetensors", "cannot be read: Permission denied")


# --- Code -------------------------------------------------------------------------------------------------------------


class Arguments(argparse.Namespace):
    """A namespace that acts when its attributes are restored."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["marker"]).touch()


def torch_bytes(data: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(data, buffer)
    return buffer.getvalue()


def written(data: object, marker: Path) -> str:
    """The path of an inner file with the data, beside the marker."""
    torch.save(data, marker.with_suffix(".inner"))
    return str(marker.with_suffix(".inner"))


# Objects that create the marker file when they are unpickled without protection.
GADGETS: dict[str, Callable[[Path], object]] = {
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "os.mkdir": lambda marker: Call(os.mkdir, str(marker)),
    "eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"),
    "exec": lambda marker: Call(exec, f"open({str(marker)!r}, 'w')"),
    "pickle.loads": lambda marker: Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(marker)))),
    "torch.load": lambda marker: Call(
        functools.partial(torch.load, weights_only=False), written(Call(os.mkdir, str(marker)), marker)
    ),
    "torch.storage._load_from_bytes": lambda marker: Call(
        torch.storage._load_from_bytes, torch_bytes(Call(os.mkdir, str(marker)))
    ),
    "functools.partial": lambda marker: Call(functools.partial(os.mkdir, str(marker))),
    "operator.methodcaller": lambda marker: Call(operator.methodcaller("touch"), marker),
    "argparse.FileType": lambda marker: Call(argparse.FileType("w"), str(marker)),
    "namespace_subclass": lambda marker: Arguments(marker=str(marker)),
    "builtins.open": lambda marker: Call(builtins.open, str(marker), "w"),
    "numpy.save": lambda marker: Call(__import__("numpy").save, str(marker), 0),
    "numpy.memmap": lambda marker: Call(np.memmap, str(marker), "u1", "w+", 0, 1),
    "numpy.load": lambda marker: Call(np.load, pickled_array(marker), None, True),
    "pathlib.Path.touch": lambda marker: Call(Path.touch, marker),
    "pathlib.Path.write_text": lambda marker: Call(Path.write_text, marker, "here"),
}


def pickled_array(marker: Path) -> str:
    """The path of a numpy file whose array is a gadget."""
    path = marker.with_suffix(".inner")
    with path.open("wb") as file:
        np.save(file, np.array(Call(os.mkdir, str(marker)), dtype=object), allow_pickle=True)
    return str(path)


def inside_harmless(gadget: object) -> dict[str, object]:
    """A gadget in the arguments of each kind of allowed constructor."""
    return {
        "array": np.array([gadget], dtype=object),
        "default_dictionary": collections.defaultdict(list, {"a": gadget}),
        "queue": collections.deque([gadget]),
        "namespace": types.SimpleNamespace(a=gadget),
        "named_arguments": argparse.Namespace(a=gadget),
    }


def attribute(data: dict[str, Any], gadget: object) -> object:
    weight = torch.nn.Parameter(torch.zeros(32, 32))
    weight.gadget = gadget  # type: ignore[attr-defined]
    data["state_dict"][KEY] = weight
    return data


PLACES: dict[str, Callable[[dict[str, Any], object], object]] = {
    "the_whole_file": lambda _, gadget: gadget,
    "a_weight": lambda data, gadget: data["state_dict"].update({KEY: gadget}) or data,
    "a_weights_attribute": attribute,
    "an_unused_key": lambda data, gadget: data["state_dict"].update({"lpips.net": gadget}) or data,
    "the_state_dict": lambda data, gadget: data | {"state_dict": gadget},
    "a_tokenizer": lambda _, gadget: {"model_state_dict": {"module.x": gadget}},
    "hyper_parameters": lambda data, gadget: data | {"hyper_parameters": gadget},
    "the_arguments": lambda data, gadget: data | {"hyper_parameters": {"args": gadget}},
    "an_argument": lambda data, gadget: vars(data["hyper_parameters"]["args"]).update(hybrid=gadget) or data,
    "callbacks": lambda data, gadget: data | {"callbacks": {"ModelCheckpoint": {"best": gadget}}},
    "optimizer_states": lambda data, gadget: data | {"optimizer_states": [{"state": [gadget]}]},
}


@pytest.mark.parametrize("gadget", GADGETS)
def test_the_gadgets_work(gadget: str, tmp_path: Path) -> None:
    """Each gadget works on an unprotected reader; otherwise the tests below would prove nothing."""
    torch.save(GADGETS[gadget](tmp_path / "marker"), tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("marker") and path.suffix != ".inner"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("gadget", GADGETS)
def test_no_code_runs(gadget: str, place: str, model: NextBlockTransformer, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    data = PLACES[place](lightning(model), GADGETS[gadget](tmp_path / "made" / "marker"))
    torch.save(data, tmp_path / "a.ckpt")
    (tmp_path / "made" / "marker.inner").unlink(missing_ok=True)
    refused(tmp_path / "a.ckpt", "cannot be read without running code from it: it names '")
    assert not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize("place", inside_harmless(0))
@pytest.mark.parametrize("gadget", ["os.system", "eval", "functools.partial", "numpy.save", "pathlib.Path.touch"])
def test_no_code_runs_inside_harmless_objects(
    gadget: str, place: str, model: NextBlockTransformer, tmp_path: Path
) -> None:
    (tmp_path / "made").mkdir()
    data = lightning(model, extra=inside_harmless(GADGETS[gadget](tmp_path / "made" / "marker"))[place])
    torch.save(data, tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", "cannot be read without running code from it: it names '")
    assert not list((tmp_path / "made").iterdir())


class TrainerObject:
    """An object of a class that the user's own training script defines."""

    def __init__(self) -> None:
        self.learning_rate = 1e-4


@pytest.mark.parametrize("kind", ["generator", "tokenizer"])
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_the_script_in_the_error_makes_a_file_that_loads(
    kind: str, place: str, model: NextBlockTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = filled(VideoTokenizer(TOKENIZERS["nbp-tiny"]))
    data: dict[str, Any] = lightning(model) if kind == "generator" else {"model_state_dict": tokenizer.state_dict()}
    if place == "beside":
        data["callbacks"] = TrainerObject()
    elif kind == "generator":
        data["hyper_parameters"]["args"].extra = TrainerObject()
    else:
        data["model_state_dict"] = {**data["model_state_dict"], "extra": TrainerObject()}
    torch.save(data, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match="If you trust its source") as error:
        checkpoint.load(tmp_path / "old.ckpt")
    script = error.value.message.partition("with Python: ")[2]
    assert len(script.split("; ")) == 3
    monkeypatch.chdir(tmp_path)
    exec(script.replace("OLD", "old.ckpt").replace("NEW", "new.ckpt"), {})
    loaded = checkpoint.load(tmp_path / "new.ckpt")
    repaired = loaded.generator if kind == "generator" else loaded.tokenizer
    assert repaired is not None
    expected = (model if kind == "generator" else tokenizer).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in repaired.state_dict().items())


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", ["old_torch", "pickle", "zip"])
def test_no_code_runs_in_any_form_of_pickle(
    form: str, protocol: int, model: NextBlockTransformer, tmp_path: Path
) -> None:
    path, marker = tmp_path / "a.ckpt", tmp_path / "marker"
    data = lightning(model) | {"callbacks": Call(os.mkdir, str(marker))}
    if form == "pickle":
        path.write_bytes(pickle.dumps(data, protocol))
    else:
        torch.save(data, path, pickle_protocol=max(protocol, 1), _use_new_zipfile_serialization=form == "zip")
    refused(path, "without running code|torch's old format|neither a PyTorch|damaged")
    assert not marker.exists()


TOUCH = b"(X\x0c\x00\x00\x00touch marker"
OPCODES: dict[str, bytes] = {
    "global_of_os": b"cos\nsystem\n" + TOUCH + b"tR",
    "global_of_posix": b"cposix\nsystem\n" + TOUCH + b"tR",
    "global_of_python_2": b"c__builtin__\neval\n(X\x12\x00\x00\x00open('marker','w')tR",
    "global_through_a_module": b"cargparse\n_os.system\n" + TOUCH + b"tR",
    "global_through_torch": b"ctorch\nos.system\n" + TOUCH + b"tR",
    "global_through_an_alias": b"cposixpath\nos.system\n" + TOUCH + b"tR",
    "global_of_a_method": b"cargparse\nNamespace.__class__\n" + TOUCH + b"tR",
    "an_array_beyond_memory": b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
    b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ftX\x01\x00\x00\x00btR",
    "an_array_of_a_class_that_writes": b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nmemmap\n"
    b"(K\x01tX\x06\x00\x00\x00markertR",
    "a_function_of_numpys": b"cnumpy\nsave\n" + TOUCH + b"tR",
    "a_function_of_an_allowed_class": b"cnumpy\nndarray.tofile\n" + TOUCH + b"tR",
    "a_method_of_a_path": b"cpathlib\nPosixPath.touch\n(X\x06\x00\x00\x00markertR",
    "a_path_that_is_built": b"cpathlib\nPosixPath\n(X\x06\x00\x00\x00markertR}X\x05\x00\x00\x00touch"
    b"X\x06\x00\x00\x00markersb",
    "our_own_function": b"cnbp_reference.pickled\nunpickle\n" + TOUCH + b"tR",
    "a_dtype_of_nonsense": b"cnumpy\ndtype\n(K\x01K\x02K\x03tR(K\x01tb",
    "a_scalar_of_nonsense": b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00i8tR"
    b"X\x02\x00\x00\x00i8tR",
    "an_argument_parser": b"cargparse\nArgumentParser\n)R",
    "a_file_type": b"cargparse\nFileType\n)R",
    "a_new_argument_parser": b"cargparse\nArgumentParser\n)\x81",
    "inst": b"(X\x0c\x00\x00\x00touch markerios\nsystem\n",
    "obj": b"(cos\nsystem\nX\x0c\x00\x00\x00touch markero",
    "stack_global": b"\x8c\x02os\x8c\x06system\x93(X\x0c\x00\x00\x00touch markertR",
    "extension": b"\x82\x01",
    "persistent_text": b"Psystem\n",
    "persistent_tuple": b"(X\x06\x00\x00\x00moduleK\x00tQ",
    "reduce_of_a_text": b"X\x02\x00\x00\x00os(tR",
    "build_of_a_class": b"cargparse\nNamespace\n}X\x05\x00\x00\x00x\x00\x00\x00\x00K\x01sb",
    "a_namespace_of_another_class": b"cargparse\nNamespace\n)\x81N}X\x09\x00\x00\x00__class__"
    b"ctorch.storage\nTypedStorage\ns\x86b",
    "a_namespace_of_another_dict": b"cargparse\nNamespace\n)\x81N}X\x08\x00\x00\x00__dict__K\x01s\x86b",
    "a_namespace_that_fills_itself": b"cargparse\nNamespace\n)\x81}X\x0c\x00\x00\x00__setstate__"
    b"cbuiltins\nbytearray\nsbK\x08b",
    "a_namespace_with_arguments": b"cargparse\nNamespace\n(K\x01tR",
    "an_unknown_opcode": b"\xff",
    "nothing_on_the_stack": b"R",
    "a_memo_that_is_not_there": b"h\x07",
}


@pytest.mark.parametrize("case", OPCODES)
def test_opcodes(case: str, model: NextBlockTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opcodes that no pickler would write, in place of the arguments of an otherwise valid file."""
    monkeypatch.chdir(tmp_path)
    data = lightning(model)
    data["hyper_parameters"] = {"args": "HERE"}
    torch.save(data, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        content = archive.read("a/data.pkl")
    here = b"X\x04\x00\x00\x00HERE"
    assert content.count(here) == 1
    rezipped(tmp_path / "a.ckpt", {"data.pkl": content.replace(here, OPCODES[case], 1)})
    refused(tmp_path / "a.ckpt", "without running code|damaged or incomplete|args is missing|args.n_layer is None")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
