"""Training nbp-tiny: resuming, the schedule, and the metrics that it prints."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from nbp_reference import checkpoint, clips, train
from nbp_reference.config import MODELS, TOKENIZERS
from nbp_reference.tokenizer import VideoTokenizer
from tests.support import filled

SCHEDULE = train.Schedule(steps=6, rate=1e-2, warmup=2)


class InterruptionError(Exception):
    """Interrupts a run."""


def fit(run: Path, stop_before: int | None = None, schedule: train.Schedule = SCHEDULE) -> dict[str, Tensor]:
    """Train a small network on data that depends only on the step, and return its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))

    def loss_of(step: int) -> Tensor:
        if step == stop_before:
            raise InterruptionError
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))

    train.fit(model, loss_of, lambda: 0.5, schedule, run)
    return model.state_dict()


@pytest.mark.parametrize("stop_before", [1, 3, 5])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    stop_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "CHECK_EVERY", 2)
    whole = fit(tmp_path / "whole")
    with pytest.raises(InterruptionError):
        fit(tmp_path / "parts", stop_before)
    resumed = fit(tmp_path / "parts")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    curves = [(tmp_path / f"{run}.jsonl").read_text().splitlines() for run in ("whole", "parts")]
    assert curves[0] == curves[1]
    assert [json.loads(line)["step"] for line in curves[0]] == [2, 4, 6]


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first = fit(tmp_path / "run")
    torch.testing.assert_close(fit(tmp_path / "run", stop_before=0), first, rtol=0, atol=0)


def test_training_lowers_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CHECK_EVERY", 20)
    fit(tmp_path / "run", schedule=train.Schedule(steps=100, rate=1e-2, warmup=5))
    losses = [json.loads(line)["train"] for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 4


def test_schedule_warms_up_and_comes_down_to_zero() -> None:
    schedule = train.Schedule(steps=100, rate=1.0, warmup=10)
    rates = [schedule.learning_rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 1e-3


def test_random_windows_stay_inside_and_prefer_long_videos() -> None:
    # The channels of each pixel are the numbers of its video, frame, row and column.
    short, long = (
        np.insert(np.indices((frames, 20, 24)).swapaxes(0, 1), 0, number, axis=1)
        for number, frames in ((0, 18), (1, 81))
    )
    rng = np.random.default_rng(0)
    windows = [train.random_window([short, long], rng, frames=17, side=16) for _ in range(400)]
    from_long = mirrored = 0
    for window in windows:
        assert window.shape == (17, 4, 16, 16)
        number, frame, row, column = window.transpose(1, 0, 2, 3)
        assert len(np.unique(number)) == 1
        assert (np.diff(frame, axis=0) == 1).all()
        assert (np.diff(row, axis=1) == 1).all()
        across = np.unique(np.diff(column, axis=2))
        assert across.tolist() in ([1], [-1])
        from_long += number[0, 0, 0]
        mirrored += across[0] == -1
    # The share is in proportion to the square root of the number of windows: 2 in 18 frames, 65 in 81 frames.
    share = math.sqrt(65) / (math.sqrt(65) + math.sqrt(2))
    assert from_long / 400 == pytest.approx(share, abs=0.05)
    assert mirrored / 400 == pytest.approx(0.5, abs=0.1)


def test_to_video_scales_to_one() -> None:
    frames = np.zeros((17, 3, 2, 2), np.uint8)
    frames[3, 1] = 255
    video = train.to_video([frames, frames])
    assert video.shape == (2, 3, 17, 2, 2)
    assert video.sum() == 2 * 4
    assert (video[:, 1, 3] == 1).all()


def test_unigram_entropy_of_even_tokens_is_the_logarithm_of_their_number() -> None:
    assert train.unigram_entropy(torch.arange(300).view(3, 100) % 50) == pytest.approx(math.log(50))
    assert train.unigram_entropy(torch.zeros(9, dtype=torch.int64)) == 0


def test_block_means_average_the_pixels_behind_each_token() -> None:
    video = np.random.default_rng(0).integers(0, 256, (17, 3, 128, 128)).astype(np.uint8)
    means = train.block_means([video]).reshape(5, 16, 16, 3)
    assert means[0, 2, 3] == pytest.approx(video[0, :, 16:24, 24:32].mean((1, 2)) / 255)
    assert means[4, 15, 0] == pytest.approx(video[13:, :, 120:, :8].mean((0, 2, 3)) / 255)


def test_opponent_means_are_the_block_means_in_other_axes() -> None:
    video = np.random.default_rng(0).integers(0, 256, (17, 3, 128, 128)).astype(np.uint8)
    r, g, b = train.block_means([video]).T
    expected = np.stack([(r + g + b - 1.35) / 0.75, (r - b) / 0.12, (g - (r + b) / 2) / 0.06], 1)
    means = train.opponent_means(train.to_video([video]))
    assert means.shape == (1, 5, 16, 16, 3)
    np.testing.assert_allclose(means.reshape(-1, 3).numpy(), expected, atol=1e-4)


def test_kmeans_psnr_is_that_of_the_best_colours() -> None:
    """With two flat colours and one code, the best single colour is their mean."""
    dark, light = (np.full((17, 3, 128, 128), value, np.uint8) for value in (51, 153))
    assert train.kmeans_psnr([dark, light], [dark, light], codes=1) == pytest.approx(-20 * math.log10(0.2))


def test_batches_are_drawn_by_seed_and_step() -> None:
    rows = train.batch_rows(20, 8, seed=1, step=2)
    assert rows.shape == (8,)
    assert 0 <= rows.min() <= rows.max() < 20
    assert torch.equal(rows, train.batch_rows(20, 8, seed=1, step=2))
    assert not torch.equal(rows, train.batch_rows(20, 8, seed=1, step=3))


def test_the_tiny_hybrids_words_are_the_clips() -> None:
    text = MODELS["nbp-tiny-hybrid"].text
    assert text is not None
    assert text.words == ("", *clips.CLIPS)
    assert len(text.words) <= text.vocab


@pytest.mark.slow
def test_the_commands_make_weights_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    videos = [rng.integers(0, 256, (40, 3, 128, 144)).astype(np.uint8)]
    monkeypatch.setattr(train, "split_clips", lambda: (videos, videos))
    generator = ["generator", "--block", "256", "--out", str(tmp_path), "--steps", "2", "--windows", "4"]
    early = CliRunner().invoke(train.main, generator)
    assert early.exit_code == 1
    assert f"train tokenizer --out {tmp_path}" in early.output
    monkeypatch.setattr(clips, "CLIPS", ["carphone"])
    for command in (["tokenizer", "--out", str(tmp_path), "--steps", "2"], generator, [*generator, "--hybrid"]):
        done = CliRunner().invoke(train.main, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert "below" in done.output
    assert checkpoint.load(tmp_path / "tokenizer.safetensors").tokenizer is not None
    loaded = checkpoint.load(tmp_path / "generator-256.safetensors").generator
    assert loaded is not None
    assert loaded.config.block.size == 256
    loaded = checkpoint.load(tmp_path / "hybrid-256.safetensors").generator
    assert loaded is not None
    assert loaded.config.text is not None
    assert loaded.config.vocab == 256 + 8 + 1000


def test_shrinking_to_fp16_changes_weights_but_not_the_output() -> None:
    tokenizer = filled(VideoTokenizer(TOKENIZERS["nbp-tiny"]))
    tokens, key = torch.arange(2 * 4 * 4)[None], "decoder_layers.8.conv.weight"
    with torch.no_grad():
        before, weights = tokenizer.decode(tokens, (2, 4, 4)), tokenizer.state_dict()[key].clone()
        window = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), np.uint8)
        train.shrink_to_fp16(tokenizer, [window], largest=0.5)
        factor = weights / tokenizer.state_dict()[key]
        assert factor.min() == factor.max() > 1
        assert torch.log2(factor.max()) % 1 == 0
        # The outputs differ only because of the norm's epsilon.
        torch.testing.assert_close(tokenizer.decode(tokens, (2, 4, 4)), before, atol=1e-3, rtol=0)
        once = tokenizer.state_dict()[key].clone()
        train.shrink_to_fp16(tokenizer, [window])
        assert torch.equal(tokenizer.state_dict()[key], once)
