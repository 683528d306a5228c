"""The Fréchet video distance of files: the network's input, the protocol, the command, and bad clips."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from nbp_bench import fvd
from nbp_bench.cli import main
from nbp_bench.fvd import BadClipError, clip_files, network_input, read_clip
from nbp_errors import UsageError
from nbp_reference import clips
from tests.reference.test_clips import film

SHAPES = [(16, 64, 64), (9, 48, 80), (17, 300, 260), (16, 1, 7), (10, 224, 224), (12, 225, 447)]


def clip(seed: int, frames: int = 16, height: int = 24, width: int = 32) -> np.ndarray:
    """Coloured noise that drifts, uint8 [T,H,W,3]."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (height, width, 3), np.uint8)
    return np.stack([np.roll(picture, t * (seed % 3), axis=1) for t in range(frames)])


def folder_of(path: Path, *seeds: int) -> Path:
    path.mkdir()
    for seed in seeds:
        np.save(path / f"{seed:03}.npy", clip(seed))
    return path


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_networks_input_is_that_of_torch(shape: tuple[int, int, int]) -> None:
    video = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    pixels = torch.from_numpy(video).float().div(255).permute(0, 3, 1, 2)
    height, width = shape[1:]
    short = min(height, width)
    size = [-(-edge * 224 // short) for edge in (height, width)]
    scaled = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=False)
    top, left = ((edge - 224) // 2 for edge in size)
    expected = scaled[:, :, top : top + 224, left : left + 224].permute(1, 0, 2, 3) * 2 - 1
    np.testing.assert_allclose(network_input(video), expected.numpy(), atol=1e-4)  # torch rounds places to fp32


def test_black_and_white_are_as_far_apart_as_the_original_has_them() -> None:
    network = fvd.default_network()
    black, white = (network(network_input(np.full((30, 8, 8, 3), level, np.uint8))[None]) for level in (0, 255))
    assert ((black - white).astype(float) ** 2).sum() == pytest.approx(151.392, abs=2e-3)


def second_opinion(real: list[np.ndarray], fake: list[np.ndarray]) -> float:
    """The distance by other means: torch's resize, covariances, and the eigenvalues of their product."""
    from nbp_bench.i3d import load

    model, means, covariances = load(), [], []
    for side in (real, fake):
        rows = []
        for each in side:
            frames = torch.from_numpy(each[:16]).permute(0, 3, 1, 2) / 255
            frames = F.interpolate(frames, size=(224, 299), mode="bilinear")[..., 37:261]
            rows.append(model((frames * 2 - 1).permute(1, 0, 2, 3)[None])[0].numpy().astype(np.float64))
        means.append(np.mean(rows, axis=0))
        covariances.append(np.cov(rows, rowvar=False))
    values = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)
    shift = ((means[0] - means[1]) ** 2).sum()
    return float(shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.sqrt(values).sum())


def test_the_command_agrees_with_a_second_opinion_and_with_onnx(tmp_path: Path) -> None:
    real, fake = folder_of(tmp_path / "real", *range(4)), folder_of(tmp_path / "fake", *range(10, 13))
    options = ["fvd", "--real", str(real), "--fake", str(fake), "--json"]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    expected = second_opinion([clip(i) for i in range(4)], [clip(i) for i in range(10, 13)])
    assert found["fvd"] == pytest.approx(expected, rel=1e-3)
    assert (found["n_real"], found["n_fake"], found["n_floor"], found["interval"]) == (4, 3, 2, None)
    assert found["protocol"]["network"] == "I3D, Kinetics-400"
    assert found["protocol_sha256"] == fvd.default_protocol().sha256

    written = CliRunner().invoke(main, ["i3d", "--out", str(tmp_path / "i3d.onnx")])
    assert written.exit_code == 0, written.output
    network = ["--i3d", str(tmp_path / "i3d.onnx"), "--sha256", written.stdout.strip()]
    by_onnx = json.loads(CliRunner().invoke(main, [*options, *network]).stdout)
    assert by_onnx["fvd"] == pytest.approx(found["fvd"], rel=1e-4)
    assert by_onnx["protocol_sha256"] == found["protocol_sha256"]
    wrong = CliRunner().invoke(main, [*options, *network[:2], "--sha256", "00"])
    assert wrong.exit_code == 2
    assert "has the hash" in wrong.output


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random projection in place of the network, which takes no time."""
    matrix = np.random.default_rng(0).normal(size=(3 * 4, 8)).astype(np.float32)

    def project(video: np.ndarray) -> np.ndarray:
        corners = video[:, :, [0, -1]][..., [5, -5], 5].reshape(len(video), -1)
        return np.asarray(corners @ matrix)

    monkeypatch.setattr(fvd, "default_network", lambda: project)


@pytest.mark.usefixtures("projected")
def test_an_interval_a_floor_and_words(tmp_path: Path) -> None:
    real, fake = folder_of(tmp_path / "real", *range(40)), folder_of(tmp_path / "fake", *range(50, 70))
    (tmp_path / "list.txt").write_text("".join(f"fake/{file.name}\n\n" for file in sorted(fake.iterdir())))
    options = ["fvd", "--real", str(real), "--fake", str(tmp_path / "list.txt")]
    found = json.loads(CliRunner().invoke(main, [*options, "--json"]).stdout)
    low, high = found["interval"]
    assert low < found["fvd"] < high
    assert found["groups"] == 20
    assert found["n_floor"] == 20
    assert 0 < found["floor"] < high
    words = CliRunner().invoke(main, options).stdout
    assert words.startswith(f"FVD {found['fvd']:.1f}, 95% interval {low:.1f} to {high:.1f}, 40 real and 20 fake clips")
    assert f"protocol {found['protocol_sha256'][:12]}" in words
    same = json.loads(CliRunner().invoke(main, ["fvd", "--real", str(real), "--fake", str(real), "--json"]).stdout)
    assert same["fvd"] == pytest.approx(0, abs=1e-6)


def test_a_video_file_gives_the_frames_that_were_filmed(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", 20, size=(32, 24))
    frames = read_clip(path, 16, 9)
    assert frames.shape == (16, 24, 32, 3)
    assert read_clip(film(tmp_path / "short.mp4", 9), 16, 9).shape[0] == 9


def test_a_rate_that_varies_is_refused(tmp_path: Path) -> None:
    uneven = [0, 40, 80, 120, 160, 500, 540, 580, 620, 660, 700, 740]
    with pytest.raises(BadClipError, match="its frame rate varies"):
        read_clip(film(tmp_path / "uneven.mkv", 12, times=uneven), 16, 9)
    even = [round(n * 1000 / 30) for n in range(12)]  # milliseconds, as Matroska rounds them
    assert len(read_clip(film(tmp_path / "even.mkv", 12, times=even), 16, 9)) == 12


def bad(folder: Path, kind: str) -> Path:
    """Write a clip with a fault."""
    path = folder / ("bad.mp4" if kind in ("text", "no frames", "short film") else "bad.npy")
    match kind:
        case "text":
            path.write_text("no video")
        case "no frames":
            path.write_bytes(b"")
        case "short film":
            film(path, 8)
        case "short":
            np.save(path, clip(0, frames=8))
        case "float":
            np.save(path, clip(0).astype(np.float32))
        case "grey":
            np.save(path, clip(0)[..., 0])
        case "cut":
            np.save(path, clip(0))
            path.write_bytes(path.read_bytes()[:500])
        case "object":
            np.save(path, np.array([{}]), allow_pickle=True)
    return path


KINDS = ["text", "no frames", "short film", "short", "float", "grey", "cut", "object"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_clip_is_named(kind: str, tmp_path: Path) -> None:
    path = bad(tmp_path, kind)
    with pytest.raises(BadClipError, match=rf"{path.name}.*leave it out with --skip-bad"):
        read_clip(path, 16, 9)


@pytest.mark.usefixtures("projected")
def test_bad_clips_are_skipped_only_on_request_and_counted(tmp_path: Path) -> None:
    real, fake = folder_of(tmp_path / "real", *range(5)), folder_of(tmp_path / "fake", *range(5))
    bad(fake, "short")
    options = ["fvd", "--real", str(real), "--fake", str(fake)]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 1
    assert "bad.npy has 8 frames and needs 9" in done.output
    found = json.loads(CliRunner().invoke(main, [*options, "--skip-bad", "--json"]).stdout)
    assert found["n_fake"] == 5
    assert found["skipped"] == [f"{fake / 'bad.npy'} has 8 frames and needs 9: leave it out with --skip-bad"]


@pytest.mark.usefixtures("projected")
def test_a_set_of_bad_clips_alone_is_refused(tmp_path: Path) -> None:
    real, fake = folder_of(tmp_path / "real", *range(5)), folder_of(tmp_path / "fake")
    bad(fake, "short")
    done = CliRunner().invoke(main, ["fvd", "--real", str(real), "--fake", str(fake), "--skip-bad"])
    assert done.exit_code == 2
    assert "at least 2 clips per set, not 5 real and 0 fake" in done.output


def test_a_package_that_is_missing_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbp_export._extras.find_spec", lambda name: None if name == "scipy" else name)
    done = CliRunner().invoke(main, ["fvd", "--real", str(tmp_path), "--fake", str(tmp_path)])
    assert done.exit_code == 1
    assert "scipy is not installed: pip install" in done.output


@pytest.mark.usefixtures("projected")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nothing", "No such file or directory: name a folder of clips"),
        (lambda path: (path / "empty").mkdir() or path / "empty", "holds no clips"),
        (lambda path: (path / "list").write_text("\n") and path / "list", "lists no clips"),
        (
            lambda path: (path / "list").write_bytes(b"\xff\xfe") and path / "list",
            "is neither a folder of clips nor a list",
        ),
        (lambda path: folder_of(path / "one", 0), "at least 2 clips per set, not 5 real and 1 fake"),
    ],
)
def test_sets_that_are_none(make: Any, message: str, tmp_path: Path) -> None:
    real = folder_of(tmp_path / "real", *range(5))
    done = CliRunner().invoke(main, ["fvd", "--real", str(real), "--fake", str(make(tmp_path))])
    assert done.exit_code == 2
    assert message in done.output


def test_features_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = folder_of(tmp_path / "real", 0, 1)
    monkeypatch.setattr(fvd, "default_network", lambda: lambda _: np.full((1, 4), np.nan))
    done = CliRunner().invoke(main, ["fvd", "--real", str(real), "--fake", str(real), "--skip-bad"])
    assert done.exit_code == 1
    assert "000.npy: the network's output is not finite" in done.output


def test_other_protocols_are_not_compared() -> None:
    mine = fvd.default_protocol()
    mine.require_same(fvd.default_protocol())
    with pytest.raises(UsageError, match="frames: 16 and 17"):
        mine.require_same(replace(mine, frames=17))
    assert mine.sha256 != replace(mine, frames=17).sha256


def test_paths_in_a_list_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "real.txt").write_text("../a.npy\n/b.mp4\n")
    assert clip_files(tmp_path / "lists" / "real.txt") == [tmp_path / "lists" / ".." / "a.npy", Path("/b.mp4")]


CORRUPTIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "blur": lambda clip, severity: gaussian_filter(clip, (0, 3 * severity, 3 * severity, 0)),
    "noise": lambda clip, severity: np.clip(
        clip + np.random.default_rng(0).normal(0, 80 * severity, clip.shape), 0, 255
    ).astype(np.uint8),
    "freeze": lambda clip, severity: clip[np.minimum(np.arange(16), round(15 * (1 - severity)))],
    "shuffle": lambda clip, severity: clip[shuffled(round(16 * severity))],
}


def shuffled(count: int) -> np.ndarray:
    """The frame numbers of a clip whose first `count` frames are in another order: the odd ones, then the even ones."""
    places = np.arange(count)
    return np.concatenate([places[1::2], places[::2], np.arange(count, 16)])


@pytest.fixture(scope="module")
def real_clips() -> tuple[list[np.ndarray], np.ndarray]:
    """Clips of three real videos, and their features."""
    videos = [clips.read(clips.find(name), 96).transpose(0, 2, 3, 1) for name in ("carphone", "bikes", "bunny")]
    windows = [window for video in videos for window in clips.windows(video, 16, 30)[:4]]
    return windows, features_of(windows)


def features_of(windows: list[np.ndarray]) -> np.ndarray:
    network = fvd.default_network()
    return np.concatenate([network(network_input(window)[None]) for window in windows])


@pytest.mark.slow
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_distance_grows_with_the_severity_of_a_corruption(
    name: str, real_clips: tuple[list[np.ndarray], np.ndarray]
) -> None:
    windows, expected = real_clips
    distances = [0.0]
    for severity in (0.25, 0.5, 1.0):
        corrupted = features_of([CORRUPTIONS[name](window, severity) for window in windows])
        distances.append(fvd.distance(expected, corrupted, fvd.default_protocol()).fvd.value)
    click.echo(f"{name}: FVD {distances[1]:.0f}, {distances[2]:.0f}, {distances[3]:.0f}")
    assert distances == sorted(distances)
    assert distances[1] > 1
