"""The `generate` command: what it writes, what it tells, and what it refuses."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, models

from nbp_bench import video
from nbp_bench.cli import main
from nbp_engines.bundle import RECEIPT, Bundle
from nbp_engines.generator import Generator
from nbp_engines.registry import open_session
from nbp_engines.sampling import GREEDY, Sampling
from nbp_export.onnx_bundle import export
from nbp_export.sources import Source
from nbp_reference import clips
from nbp_reference.config import BlockShape, Latent, ModelConfig, TextCondition
from nbp_reference.model import NextBlockTransformer
from nbp_reference.tokenizer import VideoTokenizer
from tests.export.support import TOKENIZER, source
from tests.reference.test_clips import film
from tests.reference.test_film import damage
from tests.support import filled

EDGE = 16 + 2 * video.BORDER  # of a tile of the small model's pictures
WORDS = ("<end>", "moving", "digit", "left", "right")
Bundles = Callable[..., Path]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """`bundles(kind)`: a small model's bundle; `frames` predicts, `words` makes two clips of a class at once."""

    @cache
    def make(kind: str) -> Path:
        model = source("1x4x4", tokenizer=True)
        if kind == "words":
            text = TextCondition(8, len(WORDS), WORDS)
            config = ModelConfig(2, 64, 2, 4 + len(WORDS) + 125, 100, Latent(5, 4, 4), 0, BlockShape(1, 1, 4), text)
            tokenizer = filled(VideoTokenizer(TOKENIZER))
            model = Source("hybrid", filled(NextBlockTransformer(config)), tokenizer, True, "a test's model")
        return export(model, tmp_path_factory.mktemp("bundles") / kind, "fp32", 1 + (kind == "words")).path

    def bundles(kind: str = "frames") -> Path:
        return make(kind)

    return bundles


def pretend(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Make every bundle's manifest say something else."""
    opened = Bundle.open

    def other(path: Path) -> Bundle:
        bundle = opened(path)
        return replace(bundle, manifest=replace(bundle.manifest, **changes))  # type: ignore[arg-type]

    monkeypatch.setattr(Bundle, "open", other)


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["generate", "--threads", "1", *map(str, args)])


def made(*args: object) -> Result:
    """A command that must succeed."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def refused(code: int, *args: object) -> str:
    """The one line of a command that exits with this code and no traceback."""
    result = run(*args)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.stdout == ""
    return line


def pictures(path: Path) -> tuple[np.ndarray, Fraction]:
    """[F,H,W,3] and frames a second of a file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), Fraction(stream.average_rate or 0)


def tile(picture: np.ndarray, row: int, column: int, edge: int = EDGE) -> np.ndarray:
    """[...,H,W,3] of one tile, border included."""
    top, left = row * (edge + video.GAP), column * (edge + video.GAP)
    return picture[..., top : top + edge, left : left + edge, :]


def kind_of(border: np.ndarray) -> str:
    """Which of the two colours a corner [H,W,3] is."""
    found = border.reshape(-1, 3).astype(int).mean(0)
    return min(("filmed", "predicted"), key=lambda n: np.abs(found - getattr(video, n.upper())).max())


def inside(tile: np.ndarray) -> np.ndarray:
    return tile[..., video.BORDER : -video.BORDER, video.BORDER : -video.BORDER, :]


def predicted(
    bundle: Path, given: np.ndarray, seed: int = 0, sampling: Sampling | None = None, clip_index: int = 0
) -> np.ndarray:
    """The frames [F,H,W,3] that the library itself predicts of a video [F,3,H,W]."""
    with open_session(bundle, 1) as session:
        clip = Generator(session, sampling or Sampling(), seed).predict(video.to_float(given[:5])[None], clip_index)
    return video.to_uint8(clip.video[0]).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("size", "rate", "summary"),
    [
        (
            (64, 48),
            25,
            "64x48 at 25 fps, 0.8 s; scaled to 21x16, cropped to the central 16x16, given frames 0-4 begin at 0.0 s",
        ),
        (
            (18, 50),
            Fraction(30000, 1001),
            "18x50 at 29.97 fps, 0.7 s; scaled to 16x44, cropped to the central 16x16, given",
        ),
        (
            (8, 10),
            7,
            "8x10 at 7 fps, 2.9 s; enlarged to 16x20, cropped to the central 16x16, given frames 0-4 begin at 0.0 s",
        ),
        ((16, 16), 10, "16x16 at 10 fps, 2.0 s; given frames 0-4 begin at 0.0 s"),
    ],
)
def test_any_size_and_rate_will_do(
    size: tuple[int, int], rate: Fraction, summary: str, bundles: Bundles, tmp_path: Path
) -> None:
    source, out = film(tmp_path / "in.mp4", size=size, rate=rate), tmp_path / "new" / "out.mp4"
    result = made("--bundle", bundles(), "--video", source, "--out", out)
    assert f"in.mp4: {summary}" in result.stderr
    assert result.stdout.startswith(f"{out}: 5 given frames (blue) and 12 predicted frames (orange), generated in ")
    assert result.stdout.endswith(" frames per second)\n")
    found, played = pictures(out)
    assert played == rate
    assert found.shape == (17, 256 + 2 * video.BORDER, 256 + 2 * video.BORDER, 3)
    corners = [picture[corner] for picture in found for corner in (np.s_[:3, :3], np.s_[-3:, -3:])]
    assert [kind_of(corner) for corner in corners] == ["filmed"] * 10 + ["predicted"] * 24
    enlarged = np.repeat(np.repeat(given_of(source), 16, 1), 16, 2)
    assert np.abs(inside(found)[:5].astype(int) - enlarged).mean() < 4


def given_of(path: Path, start: float = 0.0, rate: Fraction | None = None) -> np.ndarray:
    """The five given frames [F,H,W,3]."""
    frames = clips.footage(path, 16, 17, start, rate).frames
    return clips.centre(frames, 16)[:5].transpose(0, 2, 3, 1)


def test_a_png_holds_every_pixel_of_what_the_library_predicts(bundles: Bundles, tmp_path: Path) -> None:
    source, out = film(tmp_path / "in.mp4", 40), tmp_path / "out.png"
    options = ("--start", 1, "--rate", "5", "--seed", 3, "--temperature", 0.7, "--top-k", 40, "--top-p", 0.8)
    result = made("--bundle", bundles(), "--video", source, "--out", out, "--scale", 1, *options)
    assert "resampled to a constant 5 fps" in result.stderr
    assert "given frames 0-4 begin at 1.0 s" in result.stderr
    (sheet,), _ = pictures(out)
    assert sheet.shape == (EDGE, 17 * (EDGE + video.GAP) - video.GAP, 3)
    shown = np.stack([inside(tile(sheet, 0, i)) for i in range(17)])
    given = given_of(source, 1.0, Fraction(5))
    assert np.array_equal(shown[:5], given)
    assert np.array_equal(
        shown[5:], predicted(bundles(), given.transpose(0, 3, 1, 2), 3, Sampling(temperature=0.7, top_k=40, top_p=0.8))
    )


@pytest.mark.parametrize("frames", [20, 16])
def test_a_grid_holds_a_seed_a_tile_beside_the_truth(frames: int, bundles: Bundles, tmp_path: Path) -> None:
    source, out = film(tmp_path / "in.mp4", frames), tmp_path / "out.png"
    result = made("--bundle", bundles(), "--video", source, "--out", out, "--grid", 3, "--seed", 5)
    assert "12 predicted frames (orange) in each of 3 clips" in result.stdout
    truth = frames >= 17
    (sheet,), _ = pictures(out)
    edge = 256 + 2 * video.BORDER
    assert sheet.shape[0] == (3 + truth) * (edge + video.GAP) - video.GAP
    rows = [np.stack([tile(sheet, row, i, edge) for i in range(17)]) for row in range(3 + truth)]
    if truth:
        filmed = rows.pop(0)
        assert {kind_of(picture[:3, :3]) for picture in filmed} == {"filmed"}
        whole = clips.centre(clips.read(source, 16), 16)[:17].transpose(0, 2, 3, 1)
        assert np.array_equal(inside(filmed)[:, ::16, ::16], whole)
    given = given_of(source).transpose(0, 3, 1, 2)
    for index, row in enumerate(rows):
        assert np.array_equal(inside(row)[5:, ::16, ::16], predicted(bundles(), given, 5, clip_index=index))
    assert not np.array_equal(rows[-1], rows[-2])


def test_a_grid_of_a_video_is_nearly_square(bundles: Bundles, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    made("--bundle", bundles(), "--video", film(tmp_path / "in.mp4"), "--out", out, "--grid", 4, "--scale", 1)
    found, _ = pictures(out)
    assert found.shape == (17, 2 * EDGE + video.GAP, 3 * EDGE + 2 * video.GAP, 3)
    kinds = [
        [kind_of(tile(picture, row, column)[:3, :3]) for row, column in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]]
        for picture in found
    ]
    assert kinds == [["filmed"] * 5] * 5 + [["filmed", *["predicted"] * 4]] * 12
    assert tile(found, 1, 2).min() > 230, "an empty place is white"


def test_a_gif(bundles: Bundles, tmp_path: Path) -> None:
    source, out = film(tmp_path / "in.mp4"), tmp_path / "out.GIF"
    made("--bundle", bundles(), "--video", source, "--out", out, "--temperature", 0)
    found, rate = pictures(out)
    assert rate == 10
    assert found.shape == (17, 264, 264, 3)
    assert [kind_of(picture[:3, :3]) for picture in found] == ["filmed"] * 5 + ["predicted"] * 12
    expected = predicted(bundles(), given_of(source).transpose(0, 3, 1, 2), sampling=GREEDY)
    assert np.abs(inside(found)[5:, 8::16, 8::16].astype(int) - expected).mean() < 12


def test_a_varying_rate_is_made_constant_and_reported(bundles: Bundles, tmp_path: Path) -> None:
    times = [i * 100 + (i % 3 == 1) * 80 for i in range(20)]
    source, out = film(tmp_path / "in.mkv", times=times), tmp_path / "out.mp4"
    result = made("--bundle", bundles(), "--video", source, "--out", out)
    assert "resampled to a constant" in result.stderr
    found, rate = pictures(out)
    assert len(found) == 17
    assert 9 < rate < 11


def test_a_video_filmed_upright_on_a_phone(bundles: Bundles, tmp_path: Path) -> None:
    source = film(tmp_path / "in.mp4", size=(48, 32), turned=-90)
    result = made("--bundle", bundles(), "--video", source, "--out", tmp_path / "out.png")
    assert "32x48 at 10 fps, 2.0 s; turned by 90°, scaled to 16x24" in result.stderr


def test_pixels_that_are_not_square(bundles: Bundles, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 72, 58, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(64, 45)
        for frame in [*[av.VideoFrame.from_ndarray(np.zeros((58, 72, 3), np.uint8))] * 17, None]:
            container.mux(stream.encode(frame))
    result = made("--bundle", bundles(), "--video", tmp_path / "in.mp4", "--out", tmp_path / "out.png")
    assert "in.mp4: 72x58 of 64:45 pixels at 25 fps, 0.7 s; scaled to 28x16 of square pixels, cropped" in result.stderr


def test_what_is_damaged_is_left_out_and_reported(bundles: Bundles, tmp_path: Path) -> None:
    source = damage(film(tmp_path / "in.avi", codec="mjpeg"), 3)
    result = made("--bundle", bundles(), "--video", source, "--out", tmp_path / "out.png", "--scale", 1)
    assert "in.avi: 32x24 at 10 fps, 2.0 s; 1 damaged frame left out at 0.30 s, scaled to" in result.stderr
    worse = damage(film(tmp_path / "worse.avi", codec="mjpeg"), *range(3, 20))
    assert (
        "worse.avi has 3 undamaged frames from 0.0 s on at 10 fps, 17 damaged frames left out from 0.30 to 1.90 s, "
        "and the model needs 5 given frames, which are 0.50 s: use a longer video, another --start"
    ) in refused(2, "--bundle", bundles(), "--video", worse, "--out", tmp_path / "worse.png")


def test_the_rate_of_a_gif_is_settled_before_the_work(bundles: Bundles, tmp_path: Path) -> None:
    rest = ("--bundle", bundles(), "--scale", 1)
    for rate, summary in [(240, "4.8 times too slow"), (60, "1.2 times too slow"), (50, ""), (25, "")]:
        source, out = film(tmp_path / f"{rate}.mp4", rate=rate), tmp_path / f"{rate}.gif"
        result = made(*rest, "--video", source, "--out", out)
        assert ("so it plays at 50 fps" in result.stderr) == bool(summary)
        assert summary in result.stderr
        assert pictures(out)[1] == min(rate, 50)
        assert "written at" not in made(*rest, "--video", source, "--out", tmp_path / f"{rate}.mkv.mp4").stderr
    words = ("--bundle", bundles("words"), "--scale", 1, "--class", "left")
    result = made(*words, "--rate", "0.001", "--out", tmp_path / "slow.gif")
    assert "so it plays at 0.001526 fps, which is too fast" in result.stderr


def test_untrained_weights_are_reported(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = ("--bundle", bundles(), "--scale", 1, "--video", film(tmp_path / "in.mp4"), "--out")
    assert "expect noise" not in made(*rest, tmp_path / "a.png").stderr
    pretend(monkeypatch, model=Bundle.open(bundles()).manifest.model | {"trained": False})
    assert "were not trained for its blocks, so the clip will mean nothing (a test's model)" in (
        made(*rest, tmp_path / "b.png").stderr
    )


def test_too_small_a_temperature_is_greedy(bundles: Bundles, tmp_path: Path) -> None:
    rest = ("--bundle", bundles(), "--scale", 1, "--video", film(tmp_path / "in.mp4"), "--temperature")
    for value in ("0", "5e-324", "1e-310", "9e-7"):
        made(*rest, value, "--out", tmp_path / f"{value}.png")
        assert (tmp_path / f"{value}.png").read_bytes() == (tmp_path / "0.png").read_bytes()


@pytest.mark.parametrize(("name", "options"), [("a.mp4", (64, 400)), ("a.gif", (64, 400)), ("a.png", (64, 400))])
def test_what_is_too_large_to_be_written_is_not_made(
    name: str, options: tuple[int, int], bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Generator, "predict", None)
    scale, grid = options[0], min(options[1], 400)
    rest = ("--bundle", bundles(), "--video", film(tmp_path / "in.mp4"), "--scale", scale, "--grid", grid)
    assert "too many to write: use a smaller --scale or --grid" in refused(2, *rest, "--out", tmp_path / name)


def test_too_short_a_video_says_what_is_needed(bundles: Bundles, tmp_path: Path) -> None:
    rest = ("--bundle", bundles(), "--out", tmp_path / "out.mp4", "--video")
    needed = "and the model needs 5 given frames, which are 0.50 s"
    assert f"in.mp4 has 4 frames from 0.0 s on at 10 fps, {needed}" in refused(2, *rest, film(tmp_path / "in.mp4", 4))
    long = film(tmp_path / "long.mp4")
    assert f"has 3 frames from 1.7 s on at 10 fps, {needed}" in refused(2, *rest, long, "--start", 1.7)
    assert "has 4 frames from 0.0 s on at 2 fps, and the model needs 5 given frames, which are 2.50 s" in refused(
        2, *rest, long, "--rate", 2
    )
    assert "holds no video frames from 9 s on: it lasts 2.0 s" in refused(1, *rest, long, "--start", 9)
    assert not list(tmp_path.glob("*out*"))


def test_what_is_no_video(bundles: Bundles, tmp_path: Path) -> None:
    rest = ("--bundle", bundles(), "--out", tmp_path / "out.mp4", "--video")
    assert "nowhere.mp4 holds no readable video: No such file" in refused(1, *rest, tmp_path / "nowhere.mp4")
    (tmp_path / "in.mp4").write_bytes(b"junk" * 99)
    assert "in.mp4 holds no readable video: Invalid data" in refused(1, *rest, tmp_path / "in.mp4")
    made("--bundle", bundles(), "--video", film(tmp_path / "a.mp4"), "--out", tmp_path / "image.png", "--scale", 1)
    assert "image.png is a single picture, and the model needs 5" in refused(2, *rest, tmp_path / "image.png")
    (tmp_path / "notes.txt").write_text("Once upon a time\n" * 400)
    assert "notes.txt holds text and no video" in refused(1, *rest, tmp_path / "notes.txt")


def test_a_file_that_is_there_stays_unless_forced(bundles: Bundles, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    rest = ("--bundle", bundles(), "--video", film(tmp_path / "in.mp4"), "--out", out)
    out.write_bytes(b"precious")
    assert "out.mp4 exists: choose another --out, or use --force to replace a file" in refused(2, *rest)
    assert out.read_bytes() == b"precious"
    made(*rest, "--force")
    assert len(pictures(out)[0]) == 17
    assert {path.name for path in tmp_path.iterdir()} == {"in.mp4", "out.mp4"}
    (tmp_path / "folder.mp4").mkdir()
    assert "folder.mp4 exists" in refused(2, *rest[:-1], tmp_path / "folder.mp4", "--force")


def test_places_and_kinds_that_cannot_be_written(bundles: Bundles, tmp_path: Path) -> None:
    rest = ("--bundle", bundles(), "--video", film(tmp_path / "in.mp4"), "--out")
    for name in ("out.avi", "out", "out.mp4.txt"):
        assert f"{name} cannot be written: choose an --out that ends in .mp4, .gif, .png" in refused(
            2, *rest, tmp_path / name
        )
    assert "cannot hold out.mp4 (File exists)" in refused(2, *rest, tmp_path / "in.mp4" / "out.mp4")


@pytest.mark.parametrize("broken", ["decode", "write"])
def test_a_failure_leaves_what_was_there(
    broken: str, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = film(tmp_path / "in.mp4"), tmp_path / "out.mp4"
    out.write_bytes(b"precious")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*{"decode": (Generator, "_decode"), "write": (video, "write")}[broken], interrupt)
    result = run("--bundle", bundles(), "--video", source, "--out", out, "--force")
    assert result.exit_code == 130
    assert out.read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"in.mp4", "out.mp4"}


def test_a_class_by_name_and_by_ids(bundles: Bundles, tmp_path: Path) -> None:
    """Three clips of a bundle that makes two at once: each has the noise of its own clip index."""
    rest = ("--bundle", bundles("words"), "--grid", 3, "--seed", 4, "--scale", 1)
    result = made(*rest, "--class", "MovingDigitLeft", "--out", tmp_path / "name.png")
    assert "class MovingDigitLeft: text ids 1,2,3,0,0,0,0,0" in result.stderr
    assert "name.png: 17 predicted frames (orange) in each of 3 clips, generated in " in result.stdout
    made(*rest, "--text-ids", "1,2,3,0,0,0,0,0", "--out", tmp_path / "ids.png")
    assert (tmp_path / "name.png").read_bytes() == (tmp_path / "ids.png").read_bytes()
    made(*rest, "--class", "right", "--out", tmp_path / "other.png")
    assert (tmp_path / "name.png").read_bytes() != (tmp_path / "other.png").read_bytes()
    (sheet,), _ = pictures(tmp_path / "name.png")
    assert sheet.shape == (3 * (EDGE + video.GAP) - video.GAP, 17 * (EDGE + video.GAP) - video.GAP, 3)
    text = np.array([[1, 2, 3, 0, 0, 0, 0, 0]] * 2)
    with open_session(bundles("words"), 1) as session:
        first, second = (Generator(session, seed=4).generate(text, index).video for index in (1, 2))
    for row, clip in enumerate((first[0], first[1], second[1]), start=1):  # indices 1, 2 and 3; the grid has 0, 1 and 2
        same = [
            np.array_equal(inside(tile(sheet, place, i)), picture)
            for place in range(3)
            for i, picture in enumerate(video.to_uint8(clip).transpose(0, 2, 3, 1))
        ]
        assert same == [place == row for place in range(3) for _ in range(17)]
    assert {kind_of(tile(sheet, row, i)[:3, :3]) for row in range(3) for i in range(17)} == {"predicted"}


def test_a_class_plays_at_the_rate_that_is_asked_for(bundles: Bundles, tmp_path: Path) -> None:
    rest = ("--bundle", bundles("words"), "--class", "left", "--out")
    made(*rest, tmp_path / "a.mp4")
    made(*rest, tmp_path / "b.mp4", "--rate", "30000/1001")
    assert [pictures(tmp_path / name)[1] for name in ("a.mp4", "b.mp4")] == [25, Fraction(30000, 1001)]


def test_options_of_the_other_kind_of_model(bundles: Bundles, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out.mp4")
    source = film(tmp_path / "in.mp4")
    for option in (("--class", "left"), ("--text-ids", "1,0"), ("--text-tokenizer", source)):
        message = refused(2, "--bundle", bundles(), *out, *option)
        assert f"predicts from given frames: use --video FILE instead of {option[0]}" in message
    assert "predicts from given frames: name a video with --video FILE" in refused(2, "--bundle", bundles(), *out)
    words = ("--bundle", bundles("words"), *out)
    for option in (("--video", source), ("--start", "2")):
        assert f"use --class NAME or --text-ids instead of {option[0]}" in refused(2, *words, *option)
    assert "generates clips of a class: name one with --class NAME or --text-ids" in refused(2, *words)
    for other in (("--class", "left"), ("--text-tokenizer", source)):
        assert "leave out --class and --text-tokenizer" in refused(2, *words, "--text-ids", "1,0,0,0,0,0,0,0", *other)
    assert "no class 'lift': did you mean 'left'?" in refused(2, *words, "--class", "lift")


def test_a_class_that_is_read_through_a_file(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = ("--bundle", bundles("words"), "--out", tmp_path / "out.png", "--class", "YoYo")
    pretend(monkeypatch, words=())
    assert "or tokenizer.json as --text-tokenizer FILE, or 8 ids as --text-ids" in refused(2, *rest)
    file = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "yo": 3}, [], unk_token="<unk>", fuse_unk=True)).save(
        str(file)
    )
    assert "text ids 1,0,2,2,2,2,2,2" in made(*rest, "--text-tokenizer", file).stderr


def test_a_bundle_without_a_tokenizer_or_none_at_all(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = ("--video", film(tmp_path / "in.mp4"), "--out", tmp_path / "out.mp4", "--bundle")
    assert "is not a bundle" in refused(1, *rest, tmp_path)
    pretend(monkeypatch, graphs={"prefill": "prefill.onnx", "step": "step.onnx"})
    assert "has no decode graph: export it with --tokenizer FILE" in refused(2, *rest, bundles())


@pytest.mark.filterwarnings("default::nbp_engines.errors.ReceiptWarning")
def test_a_bundle_that_nothing_proves_is_one_line(bundles: Bundles, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundles(), tmp_path / "copy"))
    (copy / RECEIPT).unlink()
    result = made("--bundle", copy, "--video", film(tmp_path / "in.mp4"), "--out", tmp_path / "out.mp4")
    (line,) = [line for line in result.stderr.splitlines() if "Warning" in line]
    assert line.startswith(f"Warning: {copy} has no valid receipt")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *product(["--start", "--temperature", "--top-p"], ["nan", "-1", "inf", "x"]),
        *product(["--rate"], ["0", "-1", "x", "1/0", "nan", "inf", "1e9"]),
        *product(["--seed", "--grid", "--scale", "--top-k", "--threads"], ["-1", "1.5"]),
    ],
)
def test_numbers_that_are_none(option: str, value: str, tmp_path: Path) -> None:
    result = run("--bundle", tmp_path, "--out", tmp_path / "out.mp4", option, value)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.stderr


def test_generating_needs_no_torch(bundles: Bundles, tmp_path: Path) -> None:
    code = (
        "import sys; from nbp_bench.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False); assert 'torch' not in sys.modules, 'torch was imported'"
    )
    args = ["--bundle", bundles(), "--video", film(tmp_path / "in.mp4"), "--out", tmp_path / "out.mp4"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, "generate", *map(str, args)], env=environment, check=True)
    assert (tmp_path / "out.mp4").exists()
