"""Loading weights: the authors' two formats at small size, our own, and what must be refused."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from nbp_reference import checkpoint
from nbp_reference.config import MODELS, TOKENIZERS, BlockShape, Latent, ModelConfig, TextCondition
from nbp_reference.errors import CheckpointError
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import VideoTokenizer
from tests.support import filled, small_generator

CONFIG = ModelConfig(layers=2, width=32, heads=4, vocab=50, positions=1280)
# 16 special, 60 text and, as the small tokenizer has them, 1,000 video token ids.
HYBRID = replace(CONFIG, vocab=1076, positions=1288, condition_latents=0, text=TextCondition(8, 60))


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
        "hybrid": config.text is not None,
        "unconditional": config.text is None,
        "starts_with_bov": config.text is not None,
        "cond_token_num": config.text.tokens if config.text else 0,
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
@pytest.mark.parametrize(("config", "unused"), [(CONFIG, 0), (HYBRID, 8)], ids=["k600", "ucf_hybrid"])
@pytest.mark.usefixtures("_small_official_tokenizer")
def test_authors_generator(
    config: ModelConfig, unused: int, inside: str | None, prefix: str, tokenizer: VideoTokenizer, tmp_path: Path
) -> None:
    """Every published layout: frame prediction and hybrid, with the tokenizer inside and without."""
    generator = filled(NextBlockTransformer(config))
    data = lightning(generator)
    state = data["state_dict"] | {
        "transformer.uncond_embedding": torch.zeros(unused, 32),
        "transformer.blocks.0.attn.mask": torch.ones(1, 1, 8, 8),
        "cond_stage_model.unrelated": torch.zeros(3),
    }
    if inside is not None:
        state |= {inside + key: value for key, value in tokenizer.state_dict().items()}
    data["state_dict"] = {prefix + key: value for key, value in state.items()}
    loaded = checkpoint.load(written(data, tmp_path / "nbp16.ckpt"))
    assert_same_weights(loaded.generator, generator)
    assert loaded.generator is not None
    assert loaded.generator.config == config
    assert not loaded.generator.training
    assert not loaded.exact_block
    if inside is None:
        assert loaded.tokenizer is None
    else:
        assert_same_weights(loaded.tokenizer, tokenizer)


def test_what_training_leaves_in_a_file_is_ignored(generator: NextBlockTransformer, tmp_path: Path) -> None:
    data = lightning(generator) | {
        "pytorch-lightning_version": "1.9.0",
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4, "completed": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "dirpath": "ckpts"}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(9.0), "exp_avg": torch.ones(50, 32)}}, "lr": 1e-4}],
        "lr_schedulers": [],
        "NativeMixedPrecisionPlugin": {"scale": 65536.0, "growth_tracker": 7},
        "hparams_name": "kwargs",
    }
    data["state_dict"] |= {"lpips._extra_state": {"calls": 3}, "discriminator.steps": torch.tensor(5)}
    assert_same_weights(checkpoint.load(written(data, tmp_path / "a.ckpt")).generator, generator)


def test_arguments_that_are_missing_are_what_the_authors_code_takes(
    generator: NextBlockTransformer, tmp_path: Path
) -> None:
    data = lightning(generator)
    args = vars(data["hyper_parameters"]["args"])
    data["hyper_parameters"]["args"] = Namespace(**{key: args[key] for key in ("n_layer", "n_head", "n_embd")})
    loaded = checkpoint.load(written(data, tmp_path / "a.ckpt")).generator
    assert loaded is not None
    assert loaded.config == replace(CONFIG, block=BlockShape(1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(dtype: torch.dtype, generator: NextBlockTransformer, tmp_path: Path) -> None:
    stored = {key: value.to(dtype) for key, value in lightning(generator)["state_dict"].items()}
    loaded = checkpoint.load(written(lightning(generator) | {"state_dict": stored}, tmp_path / "a.ckpt")).generator
    assert loaded is not None
    for key, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[f"transformer.{key}"].float())


def transposed(state: dict[str, Tensor]) -> None:
    for key, value in state.items():
        state[key] = value.T.contiguous().T if value.ndim == 2 else value


def parameters(state: dict[str, Tensor]) -> None:
    for key, value in state.items():
        state[key] = nn.Parameter(value)
        state[key].is_embedding = False  # type: ignore[attr-defined]


def shared(state: dict[str, Tensor]) -> None:
    state["transformer.head.weight"] = state["transformer.tok_emb.weight"]


def slices(state: dict[str, Tensor]) -> None:
    whole = torch.cat([value.flatten() for value in state.values()])
    parts = whole.split([value.numel() for value in state.values()])
    state |= {key: part.view(state[key].shape) for key, part in zip(list(state), parts, strict=True)}


@pytest.mark.parametrize("change", [transposed, parameters, shared, slices])
def test_weights_may_lie_in_a_file_as_they_like(
    change: Callable[[dict[str, Tensor]], None], generator: NextBlockTransformer, tmp_path: Path
) -> None:
    data = lightning(generator)
    change(data["state_dict"])
    loaded = checkpoint.load(written(data, tmp_path / "a.ckpt")).generator
    assert loaded is not None
    for key, value in loaded.state_dict().items():
        assert value.is_contiguous()
        assert torch.equal(value, data["state_dict"][f"transformer.{key}"])


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.safetensors", "a.zip", "a.onnx", "a", "a.b.c"])
def test_a_file_may_be_called_anything(name: str, generator: NextBlockTransformer, tmp_path: Path) -> None:
    theirs = checkpoint.load(written(lightning(generator), tmp_path / name))
    assert_same_weights(theirs.generator, generator)
    assert not theirs.exact_block
    checkpoint.save(small_generator("1x2x2"), tmp_path / "new")
    ours = checkpoint.load((tmp_path / "new").rename(tmp_path / name))
    assert_same_weights(ours.generator, filled(small_generator("1x2x2")).half().float())
    assert ours.exact_block


MEASURE = """
import sys
from pathlib import Path
from nbp_reference import checkpoint
from nbp_reference.config import BlockShape

def peak(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024

checkpoint.bundled(BlockShape(1, 1, 1))  # what is imported on first use
open("/proc/self/clear_refs", "w").write("5")  # the highest so far is that of now
before = peak("VmRSS")
loaded = checkpoint.load(Path(sys.argv[1]))
print(peak("VmHWM") - before, sum(p.numel() for p in loaded.generator.parameters()) * 4 / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures through /proc")
@pytest.mark.parametrize(("kind", "copies"), [("fp32", 1.0), ("fp16", 1.5), ("safetensors", 1.5)])
def test_loading_takes_no_second_copy_of_the_weights(kind: str, copies: float, tmp_path: Path) -> None:
    """Once as they lie in the file, mapped, and once in fp32 where they are not; less than a tenth beside that."""
    path = tmp_path / "a.ckpt"
    model = NextBlockTransformer(ModelConfig(layers=12, width=512, heads=8, vocab=2000, positions=1280))
    if kind == "safetensors":
        checkpoint.save(model, path)
    else:
        written(lightning(model.half() if kind == "fp16" else model), path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        env=os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, weights = map(float, done.stdout.split())
    assert weights > 150
    assert (copies - 0.1) * weights < peak < (copies + 0.1) * weights


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
    with pytest.raises(CheckpointError, match=path.name):
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
