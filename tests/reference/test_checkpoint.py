"""Loading weights: small files in the authors' two formats and in our own, and files that must be refused."""

import collections
import datetime
import decimal
import fractions
import json
import os
import re
import subprocess
import sys
import types
import uuid
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from nbp_errors import printable
from nbp_reference import checkpoint
from nbp_reference.config import MODELS, TOKENIZERS, BlockShape, Latent, ModelConfig, TextCondition
from nbp_reference.errors import CheckpointError
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import VideoTokenizer
from tests.support import filled, small_generator

CONFIG = ModelConfig(layers=2, width=32, heads=4, vocab=50, positions=1280)
# Its token ids are 16 special ones, 60 for text, and the small tokenizer's 1,000.
HYBRID = replace(CONFIG, vocab=1076, positions=1288, condition_latents=0, text=TextCondition(8, 60))


@pytest.fixture(scope="module")
def generator() -> NextBlockTransformer:
    return filled(NextBlockTransformer(CONFIG))


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    return filled(VideoTokenizer(TOKENIZERS["nbp-tiny"]))


@pytest.fixture
def _small_official_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the authors' tokenizer, which no file describes and which would take 1.5 GB at full size."""
    monkeypatch.setitem(TOKENIZERS, "official", TOKENIZERS["nbp-tiny"])


def lightning(model: NextBlockTransformer, **changes: Any) -> dict[str, Any]:
    """The content of a file that the authors' training writes; `changes` replace arguments of the training."""
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
    """Save the data with torch and return the path."""
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
    """Every published layout loads: frame prediction and hybrid, with and without the tokenizer inside."""
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


def test_other_content_of_a_file_is_ignored(generator: NextBlockTransformer, tmp_path: Path) -> None:
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


def test_missing_arguments_have_the_defaults_of_the_authors_code(
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
def test_weights_load_whatever_their_storage(
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
    authors = checkpoint.load(written(lightning(generator), tmp_path / name))
    assert_same_weights(authors.generator, generator)
    assert not authors.exact_block
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

checkpoint.bundled(BlockShape(1, 1, 1))  # imports what loading needs
open("/proc/self/clear_refs", "w").write("5")  # resets the peak to the present size
before = peak("VmRSS")
loaded = checkpoint.load(Path(sys.argv[1]))
print(peak("VmHWM") - before, sum(p.numel() for p in loaded.generator.parameters()) * 4 / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures through /proc")
@pytest.mark.parametrize(("kind", "copies"), [("fp32", 1.0), ("fp16", 1.5), ("safetensors", 1.5)])
def test_loading_takes_no_second_copy_of_the_weights(kind: str, copies: float, tmp_path: Path) -> None:
    """The weights are in memory once as mapped from the file, and once more in fp32 if the file has another dtype.

    Everything else takes less than a tenth of their size.
    """
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
    half = filled(VideoTokenizer(TOKENIZERS["nbp-tiny"])).half().float()  # weights that fp16 represents exactly
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


def test_safetensors_of_other_programs_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="names neither a generator nor a tokenizer"):
        checkpoint.load(tmp_path / "a.safetensors")


def test_the_bundled_model_is_the_one_for_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    with pytest.raises(CheckpointError, match="bundled shapes: none"):
        checkpoint.bundled(BlockShape(1, 1, 4))
    checkpoint.save(filled(VideoTokenizer(TOKENIZERS["nbp-tiny"])), tmp_path / "tokenizer.safetensors")
    for block in ("2x2x2", "1x1x4"):
        checkpoint.save(small_generator(block), tmp_path / f"generator-{block}.safetensors")
    generator, tokenizer = checkpoint.bundled(BlockShape(1, 1, 4))
    assert generator.config == small_generator("1x1x4").config
    assert tokenizer.config == TOKENIZERS["nbp-tiny"]
    with pytest.raises(CheckpointError, match=r"block 1x4x4; bundled shapes: (1x1x4, 2x2x2|2x2x2, 1x1x4)"):
        checkpoint.bundled(BlockShape(1, 4, 4))


# How wrappers change the authors' keys, as pattern and replacement: around the whole module, the generator or a layer.
WRAPPED: dict[str, tuple[str, str]] = {
    "compiled": ("^", "_orig_mod."),
    "compiled_inside": ("^transformer.", "transformer._orig_mod."),
    "deepspeed": ("^", "_forward_module."),
    "deepspeed_over_parallel": ("^", "_forward_module.module."),
    "parallel_over_compiled": ("^", "module._orig_mod."),
    "a_module_of_their_own": ("^", "model."),
    "a_module_of_their_own_compiled": ("^", "model._orig_mod."),
    "a_module_in_place_of_the_transformer": ("^transformer.", "model."),
    "inside_and_outside": ("^transformer.", "_forward_module.transformer._orig_mod."),
    "parallel_inside": ("^transformer.", "transformer.module."),
    "each_layer_compiled": (r"(blocks\.\d+)\.", r"\1._orig_mod."),
    "each_layer_sharded_and_checkpointed": (
        r"(blocks\.\d+)\.",
        r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.",
    ),
    "no_prefix_at_all": ("^transformer.", ""),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_the_prefixes_of_wrappers(case: str, generator: NextBlockTransformer, tmp_path: Path) -> None:
    data = lightning(generator)
    data["state_dict"] = {re.sub(*WRAPPED[case], key): value for key, value in data["state_dict"].items()}
    assert_same_weights(checkpoint.load(written(data, tmp_path / "a.ckpt")).generator, generator)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "_forward_module."])
@pytest.mark.usefixtures("_small_official_tokenizer")
def test_the_prefixes_of_a_tokenizers_wrappers(prefix: str, tokenizer: VideoTokenizer, tmp_path: Path) -> None:
    state = {prefix + key: value for key, value in tokenizer.state_dict().items()}
    loaded = checkpoint.load(written({"model_state_dict": state}, tmp_path / "a.pt"))
    assert_same_weights(loaded.tokenizer, tokenizer)


@pytest.mark.usefixtures("_small_official_tokenizer")
def test_generator_and_tokenizer_may_be_wrapped_differently(
    generator: NextBlockTransformer, tokenizer: VideoTokenizer, tmp_path: Path
) -> None:
    data = lightning(generator)
    state = {f"_orig_mod.{key}": value for key, value in data["state_dict"].items()}
    state |= {f"first_stage_model.module.{key}": value for key, value in tokenizer.state_dict().items()}
    loaded = checkpoint.load(written(data | {"state_dict": state}, tmp_path / "a.ckpt"))
    assert_same_weights(loaded.generator, generator)
    assert_same_weights(loaded.tokenizer, tokenizer)


DIFFERENT_PREFIXES: dict[str, tuple[str, str, list[str]]] = {
    "one_key_has_it": (
        r"^transformer\.head",
        "_orig_mod.transformer.head",
        ["different prefixes", "'transformer.pos_emb'", "'_orig_mod.transformer.head.weight'"],
    ),
    "one_key_of_a_layer": (
        r"(blocks\.1)\.ln1\.bias",
        r"\1._orig_mod.ln1.bias",
        ["different prefixes", "'transformer.blocks.1._orig_mod.ln1.bias'"],
    ),
    "an_unknown_prefix": (
        "^",
        "net.",
        ["no weights of a generator", "'net.transformer.tok_emb.weight'", "and 34 more"],
    ),
}


@pytest.mark.parametrize("case", DIFFERENT_PREFIXES)
def test_keys_with_different_prefixes_are_listed(case: str, generator: NextBlockTransformer, tmp_path: Path) -> None:
    pattern, replacement, parts = DIFFERENT_PREFIXES[case]
    data = lightning(generator)
    data["state_dict"] = {re.sub(pattern, replacement, key): value for key, value in data["state_dict"].items()}
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(written(data, tmp_path / "a.ckpt"))
    assert not [part for part in parts if part not in error.value.message], error.value.message


def halved(model: NextBlockTransformer) -> NextBlockTransformer:
    """A model that stands for the EMA copy of another: half its weights."""
    copy = NextBlockTransformer(model.config).eval()
    copy.load_state_dict({key: value * 0.5 for key, value in model.state_dict().items()})
    return copy


def dotless(key: str) -> str:
    return key.replace(".", "")


# Where training code keeps an EMA copy of the weights, and the name under which it is found: among the keys of the
# state dict, or beside it.
Layout = Callable[[dict[str, Any], dict[str, Tensor]], dict[str, Any]]
EMA_LAYOUTS: dict[str, tuple[str, Layout]] = {
    "buffers_without_dots": (
        "model_ema.",
        lambda data, ema: inside(data, {f"model_ema.{dotless(key)}": value for key, value in ema.items()}),
    ),
    "buffers_of_the_whole_module": (
        "model_ema.",
        lambda data, ema: inside(data, {f"model_ema.transformer{dotless(key)}": value for key, value in ema.items()}),
    ),
    "an_averaged_model": (
        "ema_model.",
        lambda data, ema: inside(data, {f"ema_model.module.transformer.{key}": value for key, value in ema.items()}),
    ),
    "a_second_transformer": (
        "transformer_ema.",
        lambda data, ema: inside(data, {f"transformer_ema.{key}": value for key, value in ema.items()}),
    ),
    "compiled": (
        "_orig_mod.ema.",
        lambda data, ema: inside(data, {f"_orig_mod.ema.transformer.{key}": value for key, value in ema.items()}),
    ),
    "beside": ("ema", lambda data, ema: data | {"ema": {f"transformer.{key}": value for key, value in ema.items()}}),
    "beside_as_a_state_dict": ("state_dict_ema", lambda data, ema: data | {"state_dict_ema": ema}),
    "beside_with_its_decay": (
        "model_ema",
        lambda data, ema: data | {"model_ema": {"decay": 0.999, "n_averaged": 4, "module": ema}},
    ),
    "kept_by_a_callback": (
        "ema_weights",
        lambda data, ema: data | {"callbacks": {"Averaging": {"ema_weights": ema}, "Other": {"best": 1}}},
    ),
}


def inside(data: dict[str, Any], copy: dict[str, Tensor]) -> dict[str, Any]:
    """Add an EMA copy, with its decay and counters, to the keys of the state dict."""
    name = next(iter(copy)).partition("ema")[0] + "ema."
    counts = {f"{name}decay": torch.tensor(0.999), f"{name}num_updates": torch.tensor(7)}
    if name not in next(iter(copy)):
        name = next(iter(copy)).partition(".")[0]
        counts = {f"{name}.n_averaged": torch.tensor(7), f"{name}.initted": torch.tensor([True])}
    return data | {"state_dict": counts | data["state_dict"] | copy}


@pytest.mark.parametrize("case", EMA_LAYOUTS)
def test_an_ema_copy_beside_the_weights(case: str, generator: NextBlockTransformer, tmp_path: Path) -> None:
    name, layout = EMA_LAYOUTS[case]
    ema = halved(generator)
    path = written(layout(lightning(generator), dict(ema.state_dict())), tmp_path / "a.ckpt")
    plain, averaged = checkpoint.load(path), checkpoint.load(path, ema=True)
    assert plain.ema_copies == averaged.ema_copies == (name,)
    assert_same_weights(plain.generator, generator)
    assert_same_weights(averaged.generator, ema)


def test_a_missing_or_incomplete_ema_copy_is_refused(generator: NextBlockTransformer, tmp_path: Path) -> None:
    data, ema = lightning(generator), dict(halved(generator).state_dict())
    copy = {f"ema.{key}": value for key, value in ema.items()}

    def refused(changes: dict[str, Any], message: str, ema: bool = True) -> None:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(written(data | changes, tmp_path / "a.ckpt"), ema=ema)

    refused({}, "holds no EMA copy of the weights: leave out --ema")
    refused({"ema": {0: torch.zeros(2)}}, "holds no EMA copy")
    refused({"ema": {"other.weight": torch.zeros(2)}}, "holds no EMA copy")
    refused({"ema": {"shadow_params": [*ema.values()]}}, "holds no EMA copy")
    refused({"ema_1": ema, "ema_2": ema}, "several EMA copies of the weights, 'ema_1', 'ema_2'")
    refused({"state_dict": copy}, "all weights in it belong to an EMA copy, 'ema.': give --ema", ema=False)
    del copy["ema.ln_f.bias"]
    refused({"state_dict": data["state_dict"] | copy}, r"ln_f\.bias: expected \[32\], found nothing")
    checkpoint.save(generator, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="holds no EMA copy"):
        checkpoint.load(tmp_path / "a.safetensors", ema=True)


@pytest.mark.usefixtures("_small_official_tokenizer")
def test_an_ema_copy_of_a_tokenizer(tokenizer: VideoTokenizer, tmp_path: Path) -> None:
    state = {f"module.{key}": value for key, value in tokenizer.state_dict().items()}
    ema = {key: value * 2 for key, value in state.items()}
    path = written({"model_state_dict": state, "ema_state_dict": ema}, tmp_path / "a.pt")
    assert_same_weights(checkpoint.load(path).tokenizer, tokenizer)
    averaged = checkpoint.load(path, ema=True).tokenizer
    assert averaged is not None
    first = next(iter(tokenizer.state_dict()))
    assert torch.equal(averaged.state_dict()[first], tokenizer.state_dict()[first] * 2)


# Objects that arguments of a training may contain besides numbers; no model needs them, and none is code.
HARMLESS: dict[str, object] = {
    "numpy_float": np.float64(1e-4),
    "numpy_float_of_32_bits": np.float32(0.5),
    "numpy_integer": np.int64(3),
    "numpy_true": np.True_,
    "numpy_text": np.str_("a"),
    "numpy_array": np.array([0.9, 0.95]),
    "numpy_array_of_big_endians": np.arange(3, dtype=">i4"),
    "numpy_array_of_nothing": np.zeros(0),
    "numpy_array_of_objects": np.array([None, "a"], dtype=object),
    "numpy_dtype": np.dtype("float32"),
    "numpy_kind": np.float32,
    "posix_path": PurePosixPath("/data/k600"),
    "windows_path": PureWindowsPath("C:/data"),
    "path_of_this_system": Path("/data/k600"),
    "torch_dtype": torch.bfloat16,
    "torch_device": torch.device("cuda", 0),
    "torch_size": torch.Size([2, 3]),
    "date": datetime.datetime(2025, 2, 11, tzinfo=datetime.UTC),
    "duration": datetime.timedelta(hours=3),
    "decimal": decimal.Decimal("0.1"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=7),
    "default_dictionary": collections.defaultdict(list, {"a": [1]}),
    "queue": collections.deque([1, 2], maxlen=3),
    "range": range(5),
    "slice": slice(1, None),
    "frozen_set": frozenset(["a"]),
    "set": {"a"},
    "bytes": b"",
    "complex": 1j,
    "namespace": types.SimpleNamespace(a=1),
    "nested": {"paths": [Path("/a"), {"lr": np.float32(1)}]},
}


@pytest.mark.parametrize("place", ["args", "hyper_parameters", "callbacks"])
@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_objects(case: str, place: str, generator: NextBlockTransformer, tmp_path: Path) -> None:
    value = HARMLESS[case]
    data = lightning(generator, **({"extra": value} if place == "args" else {}))
    if place == "hyper_parameters":
        data["hyper_parameters"]["extra"] = value
    if place == "callbacks":
        data["callbacks"] = {"ModelCheckpoint": {"best": value}}
    assert_same_weights(checkpoint.load(written(data, tmp_path / "a.ckpt")).generator, generator)


@pytest.mark.parametrize("names", ["numpy.core.multiarray", "pathlib._local"])
def test_harmless_objects_as_other_versions_write_them(
    names: str, generator: NextBlockTransformer, tmp_path: Path
) -> None:
    """numpy 1 and Python 3.13 have different names for the same constructors."""
    present = {"numpy.core.multiarray": "numpy._core.multiarray", "pathlib._local": "pathlib"}[names]
    path = written(lightning(generator, lr=np.float64(1), root=Path("/x")), tmp_path / "a.ckpt")
    with ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    renamed = entries["a/data.pkl"].replace(f"c{present}\n".encode(), f"c{names}\n".encode())
    assert renamed != entries["a/data.pkl"]
    with ZipFile(path, "w") as archive:
        for name, content in (entries | {"a/data.pkl": renamed}).items():
            archive.writestr(name, content)
    assert_same_weights(checkpoint.load(path).generator, generator)


def test_numpy_scalars_count_as_numbers(generator: NextBlockTransformer, tmp_path: Path) -> None:
    changes = {"n_layer": np.int64(2), "n_head": np.uint8(4), "hybrid": np.False_, "unconditional": np.True_}
    data = lightning(generator, **changes, token_number_per_step=np.array([16], ">i4")[0])
    loaded = checkpoint.load(written(data, tmp_path / "a.ckpt"))
    assert loaded.generator is not None
    assert loaded.generator.config == replace(CONFIG, block=BlockShape(1, 1, 16))
    for name, value, message in [
        ("n_layer", np.float64(2), "n_layer is 2.0, expected a positive integer"),
        ("n_layer", np.array([2]), "n_layer is an object, expected a number"),
        ("hybrid", np.array([0]), "hybrid is an object, expected a number or a boolean"),
        ("unconditional", np.str_("no"), "unconditional is an object"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(written(lightning(generator, **{name: value}), tmp_path / "a.ckpt"))


@pytest.mark.parametrize(
    "name",
    [
        "with:colon.ckpt",
        "x[ema].ckpt",
        "[bold]x[red].ckpt",
        "new\nline.ckpt",
        "-dash.ckpt",
        "a b'c\"d$e.ckpt",
        "narrow\u202fspace.ckpt",
        "ключ.ckpt",
        os.fsdecode(b"caf\xe9.ckpt"),
        os.fsdecode(b"caf\xe9.safetensors"),
        "x" * 250 + ".ckpt",
    ],
    ids=ascii,
)
@pytest.mark.parametrize("kind", ["authors", "ours"])
def test_a_file_name_may_have_any_characters(
    name: str, kind: str, generator: NextBlockTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "authors":
        written(lightning(generator), tmp_path / "a")
    else:
        checkpoint.save(generator, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert checkpoint.load(Path(name)).generator is not None
    Path(name).write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="neither") as error:
        checkpoint.load(Path(name))
    assert error.value.message == printable(error.value.message)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_saving_respects_the_umask(umask: int, mode: int, generator: NextBlockTransformer, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        checkpoint.save(generator, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


def test_saving_on_a_full_disk_leaves_no_partial_file(
    generator: NextBlockTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: Path) -> None:
        assert path.exists()
        raise OSError(28, "No space left on device")

    checkpoint.save(generator, tmp_path / "old.safetensors")
    before = (tmp_path / "old.safetensors").read_bytes()
    monkeypatch.setattr(Path, "replace", full)
    for name in ("old.safetensors", "new.safetensors"):
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(generator, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old.safetensors"]
    assert (tmp_path / "old.safetensors").read_bytes() == before
