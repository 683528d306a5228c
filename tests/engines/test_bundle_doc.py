"""Checks that docs/bundle.md suffices to run a bundle.

A program that was written from it alone has to generate the same tokens as our loop, and to reproduce the trace.
"""

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from nbp_engines.bundle import MANIFEST, Bundle
from nbp_engines.generator import Generator
from nbp_engines.noise import uniforms
from nbp_engines.ort import OrtSession
from nbp_engines.runtime import OpenOptions
from nbp_engines.sampling import GREEDY, Sampling
from nbp_export.onnx_bundle import export
from nbp_export.parity import TOLERANCE
from nbp_export.sources import Source
from nbp_export.trace import TRACE
from nbp_reference.config import BlockShape, Latent, ModelConfig, TextCondition
from nbp_reference.model import NextBlockTransformer
from tests.engines import by_the_book
from tests.support import filled

PAGE = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text()
# With these settings, top-k and top-p both remove some of the 125 ids.
SETTINGS = Sampling(temperature=0.9, top_k=60, top_p=0.8)


class Case(NamedTuple):
    block: tuple[int, int, int]
    latent: tuple[int, int, int]
    dtype: str = "fp32"
    batch: int = 1
    text: TextCondition | None = None


CASES = {
    "L = 1": Case((1, 1, 1), (3, 4, 4)),
    "L = 16": Case((1, 4, 4), (3, 8, 8), "fp16", 2),
    "L = 256": Case((1, 16, 16), (3, 16, 16)),
    "hybrid": Case((1, 2, 2), (3, 4, 4), batch=2, text=TextCondition(tokens=3, vocab=5)),
    "hybrid, L = 1": Case((1, 1, 1), (1, 4, 4), text=TextCondition(tokens=3, vocab=5)),
}


@pytest.fixture(scope="module", params=CASES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    case = CASES[request.param]
    block, latent = BlockShape(*case.block), Latent(*case.latent)
    special = block.size + case.text.vocab if case.text else 0
    positions = latent.t * latent.h * latent.w + (case.text.tokens if case.text else 0)
    config = ModelConfig(1, 32, 2, special + 125, positions, latent, 0 if case.text else 1, block, case.text)
    source = Source("small", filled(NextBlockTransformer(config)), None, True, "a test's")
    return export(source, tmp_path_factory.mktemp("book") / "bundle", case.dtype, case.batch)


def condition(bundle: Bundle) -> np.ndarray:
    spec = bundle.manifest.spec
    ids = spec.text_vocab if spec.hybrid else spec.vocab
    return np.random.default_rng(1).integers(0, ids, (spec.batch, spec.condition_tokens))


@pytest.mark.parametrize("settings", [SETTINGS, GREEDY], ids=["sampled", "greedy"])
def test_a_program_that_follows_the_page_gets_the_same_clips(bundle: Bundle, settings: Sampling) -> None:
    manifest = replace(bundle.manifest, sampling=settings)
    (bundle.path / MANIFEST).write_bytes(manifest.to_bytes())
    clip, codes = by_the_book.generate(bundle.path, condition(bundle), seed=2**63 + 5, sample=7)
    (bundle.path / MANIFEST).write_bytes(bundle.manifest.to_bytes())
    with OrtSession(replace(bundle, manifest=manifest), OpenOptions(threads=1)) as session:
        for raster in Generator(session, seed=2**63 + 5).blocks(condition(bundle), clip_index=7):
            tokens = raster
    assert np.array_equal(clip, tokens)
    assert np.array_equal(codes, bundle.manifest.spec.codes(tokens))
    spec = bundle.manifest.spec
    predicted = clip[:, spec.block_order()[-spec.blocks * spec.block_size :]]
    assert settings == GREEDY or np.unique(predicted).size > 5


def test_a_program_that_follows_the_page_repeats_the_trace(bundle: Bundle) -> None:
    assert by_the_book.differences(bundle.path) == []


def test_a_program_with_a_fault_does_not_repeat_the_trace(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_the_book, "philox", lambda counter, key: (counter[0] * 2**60, *counter[1:], *key))
    lines = by_the_book.differences(bundle.path)
    assert any("uniforms differ" in line for line in lines)
    assert any("drawn differ" in line for line in lines)
    assert not [line for line in lines if "logits" in line]  # because the trace's tokens are fed


def test_the_program_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(by_the_book.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    roots = {name.partition(".")[0] for name in names}
    assert roots - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


@pytest.mark.parametrize(("seed", "sample", "block"), [(0, 0, 0), (2**64 - 1, 2**63, 767), (5, 2**40, 1)])
def test_the_noise_of_the_page_is_ours(seed: int, sample: int, block: int) -> None:
    noise = by_the_book.noise(seed, sample, 1, block, range(9))
    assert np.array_equal(noise[0], uniforms(seed, sample, block, 9))


def test_the_page_names_every_field(bundle: Bundle) -> None:
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    trace = json.loads((bundle.path / TRACE).read_text())
    call, loop = trace["calls"][0], manifest["loop"]
    parts = (manifest, manifest["graphs"], manifest["signatures"]["step"], loop, loop["counts"], trace, call)
    names = {name for part in (*parts, call["logits"][0]) for name in part} - {"name"}
    assert not [name for name in names if f"`{name}`" not in PAGE]


def test_the_page_has_the_tolerances() -> None:
    parts = [f"{value:g} in {dtype}".replace("e-0", "e-") for dtype, value in TOLERANCE.items()]
    assert ", ".join(parts).replace("0.01", "1e-2").replace("0.05", "5e-2") in PAGE
