"""Loading weights: the authors' two formats at small size, our own, and what must be refused."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from nbp_reference import checkpoint
from nbp_reference.config import MODELS, TOKENIZERS, BlockShape, Latent, ModelConfig
from nbp_reference.errors import CheckpointError, ReferenceError
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import VideoTokenizer
from tests.support import filled, small_generator

CONFIG = ModelConfig(layers=2, width=32, heads=4, vocab=50, positions=1280)


@pytest.fixture(scope="module")
def generator() -> NextBlockTransformer:
    return filled(NextBlockTransformer(CONFIG))


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    return filled(VideoTokenizer(TOKENIZERS["nbp-tiny"]))


@pytest.fixture
def _small_official_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' files do not describe their tokenizer; at full size it would take 1.5 GB."""
    monkeypatch.setitem(TOKENIZERS, "official", TOKENIZERS["nbp-tiny"])


def lightning(model: NextBlockTransformer, **changes: Any) -> dict[str, Any]:
    """What the authors' training wrote."""
    config = model.config
    args = {
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_embd": config.width,
        "token_number_per_step": config.block.size,
        "hybrid": False,
        "unconditional": True,
        "starts_with_bov": False,
        "cond_token_num": 0,
        "semi_ar": True,
        "block_size": config.positions,
    }
    return {
        "state_dict": {f"transformer.{key}": value for key, value in model.state_dict().items()},
        "epoch": 3,
        "global_step": 1000,
        "hyper_parameters": {"args": Namespace(**args | changes), "learning_rate": 1e-4},
    }


def written(data: object, path: Path) -> Path:
    torch.save(data, path)
    return path


def assert_same_weights(left: nn.Module | None, right: nn.Module) -> None:
    assert left is not None
    torch.testing.assert_close(left.state_dict(), right.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("inside", [None, "first_stage_model.", "first_stage_model.module."])
@pytest.mark.usefixtures("_small_official_tokenizer")
def test_authors_generator(
    prefix: str, inside: str | None, generator: NextBlockTransformer, tokenizer: VideoTokenizer, tmp_path: Path
) -> None:
    data = lightning(generator)
    state = data["state_dict"] | {
        "transformer.uncond_embedding": torch.zeros(0, 32),
        "transformer.blocks.0.attn.mask": torch.ones(1, 1, 8, 8),
        "cond_stage_model.unrelated": torch.zeros(3),
    }
    if inside is not None:
        state |= {inside + key: value for key, value in tokenizer.state_dict().items()}
    data["state_dict"] = {prefix + key: value for key, value in state.items()}
    loaded = checkpoint.load(written(data, tmp_path / "nbp16.ckpt"))
    assert_same_weights(loaded.generator, generator)
    assert loaded.generator is not None
    assert loaded.generator.config == CONFIG
    assert not loaded.generator.training
    if inside is None:
        assert loaded.tokenizer is None
    else:
        assert_same_weights(loaded.tokenizer, tokenizer)


@torch.inference_mode()
def test_a_loaded_generator_computes_the_same(generator: NextBlockTransformer, tmp_path: Path) -> None:
    loaded = checkpoint.load(written(lightning(generator), tmp_path / "a.ckpt")).generator
    tokens = torch.arange(64)[None] % 50
    assert loaded is not None
    assert torch.equal(loaded(tokens), generator(tokens))


@pytest.mark.parametrize(("size", "shape"), [(1, "1x1x1"), (256, "1x16x16")])
def test_the_block_is_the_one_the_file_names(
    size: int, shape: str, generator: NextBlockTransformer, tmp_path: Path
) -> None:
    loaded = checkpoint.load(written(lightning(generator, token_number_per_step=size), tmp_path / "a.ckpt")).generator
    assert loaded is not None
    assert str(loaded.config.block) == shape


@pytest.mark.usefixtures("_small_official_tokenizer")
def test_authors_tokenizer(tokenizer: VideoTokenizer, tmp_path: Path) -> None:
    state = {f"module.{key}": value for key, value in tokenizer.state_dict().items()}
    loaded = checkpoint.load(written({"model_state_dict": state}, tmp_path / "magvit2.pt"))
    assert loaded.generator is None
    assert_same_weights(loaded.tokenizer, tokenizer)


@torch.inference_mode()
def test_a_loaded_tokenizer_encodes_the_same(tmp_path: Path) -> None:
    half = filled(VideoTokenizer(TOKENIZERS["nbp-tiny"])).half().float()  # what fp16 weights can hold
    checkpoint.save(half, tmp_path / "tokenizer.safetensors")
    loaded = checkpoint.load(tmp_path / "tokenizer.safetensors").tokenizer
    assert loaded is not None
    video = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = loaded.encode(video)
    assert torch.equal(tokens, half.encode(video))
    assert torch.equal(loaded.decode(tokens, Latent(2, 4, 4)), half.decode(tokens, Latent(2, 4, 4)))


@pytest.mark.parametrize("kind", ["generator", "tokenizer"])
def test_our_own_format_holds_weights_in_half_precision_and_the_config(kind: str, tmp_path: Path) -> None:
    model: NextBlockTransformer | VideoTokenizer
    model = small_generator("2x2x2") if kind == "generator" else filled(VideoTokenizer(TOKENIZERS["nbp-tiny"]))
    path = tmp_path / "new" / f"{kind}.safetensors"
    checkpoint.save(model, path)
    loaded = getattr(checkpoint.load(path), kind)
    assert loaded.config == model.config
    assert not loaded.training
    assert_same_weights(loaded, model.half().float())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def drop(state: dict[str, Tensor]) -> str:
    del state["transformer.blocks.1.mlp.2.bias"]
    return r"blocks\.1\.mlp\.2\.bias: expected \[32\], found nothing"


def reshape(state: dict[str, Tensor]) -> str:
    state["transformer.blocks.0.attn.key.weight"] = torch.zeros(32, 16)
    return r"blocks\.0\.attn\.key\.weight: expected \[32, 32\], found \[32, 16\]"


def add(state: dict[str, Tensor]) -> str:
    state["transformer.blocks.2.ln1.weight"] = torch.ones(32)
    return r"'blocks\.2\.ln1\.weight': expected no such key, found \[32\]"


def empty(state: dict[str, Tensor]) -> str:
    state.clear()
    return "tok_emb.weight"


def flatten(state: dict[str, Tensor]) -> str:
    state["transformer.pos_emb"] = torch.zeros(32)
    return r"pos_emb: expected \[1, P, C\], found \[32\]"


@pytest.mark.parametrize("damage", [drop, reshape, add, empty, flatten], ids=lambda f: str(f.__name__))
def test_weights_that_do_not_fit_are_named(damage: Any, generator: NextBlockTransformer, tmp_path: Path) -> None:
    data = lightning(generator)
    message = damage(data["state_dict"])
    path = written(data, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)


def test_a_long_list_of_misfits_is_cut(generator: NextBlockTransformer, tmp_path: Path) -> None:
    data = lightning(generator, n_layer=3)
    with pytest.raises(CheckpointError, match=r"and 13 more$"):
        checkpoint.load(written(data, tmp_path / "a.ckpt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid": True, "cond_token_num": 8}, "tok_emb.weight has 50 rows, a hybrid has more: 16 special"),
        ({"n_embd": 64}, "tok_emb is 32 wide, its own arguments say n_embd=64"),
        ({"token_number_per_step": 3}, "block 1x1x3 does not tile"),
        ({"token_number_per_step": None}, "args.token_number_per_step is None, expected a positive integer"),
        ({"n_layer": "two"}, "args.n_layer is 'two', expected a positive integer"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    changes: dict[str, Any], message: str, generator: NextBlockTransformer, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(written(lightning(generator, **changes), tmp_path / "a.ckpt"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"state_dict": {}}, "hyper_parameters.args is missing"),
        ({"state_dict": {}, "hyper_parameters": [1]}, "hyper_parameters.args is missing"),
        ({"state_dict": [], "hyper_parameters": {"args": Namespace()}}, "expected a dictionary of tensors, found a list"),
        ({"model_state_dict": {"module.x": 1}}, "5 layers, expected at most one for each of 1 tensors"),
        ({"weights": {}}, "no `state_dict`"),
        ([1, 2], "no `state_dict`"),
        (torch.zeros(2), "no `state_dict`"),
    ],
)
@pytest.mark.usefixtures("_small_official_tokenizer")
def test_other_content_is_refused(data: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(written(data, tmp_path / "a.ckpt"))


@given(share=st.floats(0, 0.999))
@settings(max_examples=30)
def test_a_truncated_file_is_refused(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("truncated")
    model = small_generator("1x1x4", layers=1)
    checkpoint.save(model, folder / "a.safetensors")
    written(lightning(model), folder / "a.ckpt")
    for path in (folder / "a.safetensors", folder / "a.ckpt"):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.ckpt", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path}: (no such file|not a file)"):
            checkpoint.load(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@given(field=st.sampled_from(sorted(MODELS["nbp-tiny"].to_json())), value=json_values)
def test_metadata_that_describes_no_model_is_refused(
    field: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("metadata") / "a.safetensors"
    config = small_generator("1x1x4", layers=1).config.to_json()
    save_file({"tok_emb.weight": torch.zeros(50, 32)}, path, {"generator": json.dumps(config | {field: value})})
    with pytest.raises(ReferenceError, match=path.name):
        checkpoint.load(path)


def test_a_stranger_s_safetensors_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="names neither a generator nor a tokenizer"):
        checkpoint.load(tmp_path / "a.safetensors")


def test_the_bundled_model_is_the_one_for_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    with pytest.raises(CheckpointError, match="there are: none"):
        checkpoint.bundled(BlockShape(1, 1, 4))
    checkpoint.save(filled(VideoTokenizer(TOKENIZERS["nbp-tiny"])), tmp_path / "tokenizer.safetensors")
    for block in ("2x2x2", "1x1x4"):
        checkpoint.save(small_generator(block), tmp_path / f"generator-{block}.safetensors")
    generator, tokenizer = checkpoint.bundled(BlockShape(1, 1, 4))
    assert generator.config == small_generator("1x1x4").config
    assert tokenizer.config == TOKENIZERS["nbp-tiny"]
    with pytest.raises(CheckpointError, match=r"block 1x4x4; there are: (1x1x4, 2x2x2|2x2x2, 1x1x4)"):
        checkpoint.bundled(BlockShape(1, 4, 4))
