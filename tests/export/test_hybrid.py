"""Class-conditional bundles: prefill of the text, the first block token by token, then block by block."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nbp_engines.bundle import Bundle
from nbp_engines.errors import EngineError
from nbp_engines.generator import Generator, Timeline
from nbp_engines.ort import OrtSession
from nbp_engines.runtime import OpenOptions
from nbp_engines.sampling import GREEDY, Sampling
from nbp_errors import UsageError
from nbp_export.cli import main
from nbp_export.onnx_bundle import export
from nbp_export.sources import Source
from nbp_reference import checkpoint
from nbp_reference.config import BlockShape, Latent, ModelConfig, TextCondition
from nbp_reference.model import NextBlockTransformer, tensor_scatter_
from nbp_reference.sampling import sample
from nbp_reference.tokenizer import VideoTokenizer
from tests.export.support import TOKENIZER, HandDriven
from tests.support import filled, golden, golden_hybrid


@pytest.fixture(scope="module")
def authors(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of the golden model that the authors' code computed with."""
    return export(
        Source("ucf", golden_hybrid(), None, True, "golden"), tmp_path_factory.mktemp("golden") / "bundle", "fp32"
    )


def small(block: BlockShape) -> Source:
    """Return a small hybrid with a latent of 5x4x4 and a text of three tokens."""
    text = TextCondition(tokens=3, vocab=3, words=("", "ball", "city"))
    config = ModelConfig(2, 64, 2, block.size + 3 + 125, 83, Latent(5, 4, 4), 0, block, text)
    return Source("small", filled(NextBlockTransformer(config)), filled(VideoTokenizer(TOKENIZER)), True, "a test's")


@pytest.fixture(scope="module", params=["1x1x1", "1x2x2", "5x1x2", "1x2x2 one graph"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Source]:
    shape, _, one_graph = request.param.partition(" ")
    block = BlockShape.parse(shape, Latent(5, 4, 4))
    out = tmp_path_factory.mktemp("bundles") / f"small-{block}"
    return export(small(block), out, "fp32", batch=2, one_graph=bool(one_graph)), small(block)


def test_the_authors_greedy_tokens_by_hand(authors: Bundle) -> None:
    """Plain ONNX Runtime, with garbage in every unused slot."""
    case = golden("ucf_L4")
    hand = HandDriven(authors, "prefill", "step_1", "step")
    hand.call("prefill", case["text"].numpy().astype(np.int64) + 4, 0)
    tokens, found = np.zeros((1, 1), np.int64), np.empty((1, 0), np.int64)
    for position in range(8, 12):
        tokens = hand.call("step_1", tokens, position).argmax(-1)
        found = np.concatenate([found, tokens], 1)
    tokens = np.array([[found[0, -1], 1, 2, 3]])
    for position in range(12, 1288, 4):
        tokens = hand.call("step", tokens, position).argmax(-1)
        found = np.concatenate([found, tokens], 1)
    assert np.array_equal(found, case["greedy"].numpy())


def test_the_authors_greedy_tokens_by_our_loop(authors: Bundle) -> None:
    case, timeline = golden("ucf_L4"), Timeline()
    with OrtSession(authors, OpenOptions(threads=1)) as session:
        for clip in Generator(session, GREEDY).blocks(case["text"].numpy().astype(np.int64), timeline=timeline):
            found = clip
        assert np.array_equal(found, case["greedy"].numpy())
        assert sum(stage == "step" for stage, _ in timeline.spans) == case["steps"] == session.spec.steps
        codes = session.spec.codes(found)
    shifted = case["greedy"].numpy() - 64
    assert (shifted < 0).any(), "without ids that are not video ids, the case would not test the clamp"
    assert np.array_equal(codes, shifted.clip(0, 199))


def test_the_graphs_of_a_hybrid(made: tuple[Bundle, Source]) -> None:
    bundle, _ = made
    single = {"step_1"} if bundle.manifest.spec.block_size > 1 else set()
    assert set(bundle.manifest.graphs) == {"prefill", "step", "decode"} | single
    specs = bundle.manifest.graph_specs()
    assert specs["prefill"].inputs[0].shape == (2, 3)
    assert {specs[name].inputs[2:] for name in {"prefill", "step"} | single} == {bundle.manifest.spec.caches()}
    assert bundle.manifest.spec.capacity == 83
    assert bundle.manifest.words == ("", "ball", "city")
    assert {c["graph"] for c in (bundle.receipt() or {})["checks"]} == set(bundle.manifest.graphs)


@torch.inference_mode()
def test_sampled_clips_are_the_references(made: tuple[Bundle, Source]) -> None:
    bundle, source = made
    spec, settings = bundle.manifest.spec, Sampling(top_k=60)
    noises: list[np.ndarray] = []
    text, L = np.array([[1, 0, 0], [2, 0, 0]]), bundle.manifest.spec.block_size

    class Recording(OrtSession):
        def sample(self, logits: np.ndarray, uniforms: np.ndarray, settings: Sampling) -> np.ndarray:
            noises.append(uniforms)
            return super().sample(logits, uniforms, settings)

    with Recording(bundle, OpenOptions(threads=1)) as session:
        clip = Generator(session, settings, seed=5).generate(text)
        streamed = list(Generator(session, settings, seed=5).stream(text))
    assert clip.video.shape == (2, 3, 17, 16, 16)
    assert np.array_equal(np.concatenate([c.video for c in streamed], axis=2), clip.video)
    k, v = source.generator.empty_caches(2)

    def logits(tokens: torch.Tensor, position: int) -> torch.Tensor:
        at = torch.full((2,), position)
        return source.generator.block_step(tokens, at, k, v, write=tensor_scatter_)[0]

    logits(torch.from_numpy(text) + L, 0)
    tokens, position = torch.zeros(2, 1, dtype=torch.long), 3
    ids: list[torch.Tensor] = []
    for number, noise in enumerate(noises[: L + spec.blocks - 1]):
        if number == L:
            first = torch.cat(ids[-1:], 1)[:, -1:]
            tokens = torch.cat([first, torch.arange(1, L).expand(2, -1)], 1)
        predicted = sample(logits(tokens, position), torch.from_numpy(noise), top_k=60)
        position += tokens.shape[1]
        tokens = predicted
        ids.append(predicted)
    expected = np.empty_like(clip.tokens)
    expected[:, spec.block_order()] = (torch.cat(ids, 1).numpy() - spec.code_shift).clip(0, 124)
    assert np.array_equal(clip.tokens, expected)
    assert source.tokenizer is not None
    video = source.tokenizer.decode(torch.from_numpy(expected), (5, 4, 4)).numpy()
    np.testing.assert_allclose(clip.video, video, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (np.zeros((2, 8), np.int64), r"text tokens have shape \(2, 8\), expected \(2, 3\)"),
        (np.full((2, 3), 3), "range from 3 to 3, but the model.s ids are 0 to 2"),
        (np.full((2, 3), -1), "from -1 to -1"),
    ],
)
def test_other_texts_are_refused(made: tuple[Bundle, Source], text: np.ndarray, message: str) -> None:
    with (
        OrtSession(made[0], OpenOptions(threads=1, graphs=["prefill"])) as session,
        pytest.raises(UsageError, match=message),
    ):
        Generator(session).generate(text)


def test_a_hybrid_takes_no_frames_and_frame_prediction_no_text(made: tuple[Bundle, Source]) -> None:
    with OrtSession(made[0], OpenOptions(threads=1, graphs=["prefill"])) as session:
        with pytest.raises(UsageError, match=r"call generate\(text\)"):
            Generator(session).predict(np.zeros((2, 3, 5, 16, 16), np.float32))
        with pytest.raises(EngineError, match="there is no graph 'encode'"):
            session.encode(np.zeros((2, 3, 5, 16, 16), np.float32))


def test_a_checkpoints_block_size_is_fixed_by_its_special_tokens(tmp_path: Path) -> None:
    checkpoint.save(golden_hybrid(), tmp_path / "ucf.safetensors")
    command = ["onnx", "--checkpoint", str(tmp_path / "ucf.safetensors"), "--timing-only", "--out", str(tmp_path / "b")]
    done = CliRunner().invoke(main, [*command, "--block", "1x1x8"])
    assert done.exit_code == 2
    assert "has 4 special tokens that begin a video" in done.output
    assert "--block 1x1x4" in done.output
    assert not (tmp_path / "b").exists()
