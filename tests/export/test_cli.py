"""The command `nbp-export onnx`: what it exports, and what it refuses."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from nbp_engines.bundle import Bundle
from nbp_engines.generator import Generator
from nbp_engines.ort import OrtSession
from nbp_engines.runtime import OpenOptions
from nbp_engines.sampling import GREEDY
from nbp_export import _extras, cli
from nbp_export.cli import main
from nbp_export.request import Request
from nbp_export.sources import find
from nbp_reference import checkpoint
from tests.export.support import Exported, HandDriven, source
from tests.reference.test_checkpoint import lightning
from tests.support import golden, golden_generator

Exporter = Callable[..., Exported]
ROOT = Path(__file__).parents[2]


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["onnx", *map(str, args)])


def refused(code: int, *args: object) -> str:
    """Run a command that must exit with this code and without a traceback; return its output on one line."""
    result = run(*args)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a temporary folder, in case a command that should be refused exports a bundle."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small model for 1x2x2 in our format and the golden models in the authors' format."""
    folder = tmp_path_factory.mktemp("weights")
    model = source("1x2x2", tokenizer=True)
    assert model.tokenizer is not None
    checkpoint.save(model.generator, folder / "small.safetensors")
    checkpoint.save(model.tokenizer, folder / "tokenizer.safetensors")
    for size in (1, 16):
        torch.save(lightning(golden_generator(str(size))), folder / f"k600_L{size}.ckpt")
    return folder


@pytest.mark.parametrize("size", [1, 16])
def test_an_authors_checkpoint_generates_the_golden_tokens(size: int, weights: Path, tmp_path: Path) -> None:
    """From the authors' file format by the command to plain ONNX Runtime, with garbage in unused slots."""
    out = tmp_path / "bundle"
    result = run("--checkpoint", weights / f"k600_L{size}.ckpt", "--dtype", "fp32", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    assert "The checkpoint has no tokenizer, so encode and decode are not exported: --tokenizer FILE adds them." in (
        " ".join(result.stderr.split())
    )
    bundle = Bundle.open(out)
    assert bundle.receipt() is not None
    assert bundle.manifest.spec.block == (1, 1, size)
    case = golden(f"k600_L{size}")
    condition = case["tokens"][:, :512].long().numpy()
    assert np.array_equal(HandDriven(bundle).greedy(condition), case["greedy"].numpy())
    with OrtSession(bundle, OpenOptions(threads=1)) as session:
        for clip in Generator(session, GREEDY).blocks(condition):
            tokens = clip
    assert np.array_equal(tokens[:, 512:], case["greedy"].numpy())


def test_our_own_files_with_a_tokenizer_and_the_defaults(weights: Path, tmp_path: Path) -> None:
    files = ("--checkpoint", weights / "small.safetensors", "--tokenizer", weights / "tokenizer.safetensors")
    result = run(*files)
    assert result.exit_code == 0, result.output
    assert result.stdout == "small-1x2x2-fp16\n"
    bundle = Bundle.open(tmp_path / "small-1x2x2-fp16")
    assert set(bundle.manifest.graphs) == {"encode", "prefill", "step", "decode"}
    assert bundle.manifest.spec.dtype == "fp16"
    assert bundle.manifest.spec.batch == 1
    assert bundle.manifest.model["trained"]
    receipt = bundle.receipt()
    assert receipt is not None
    assert f"{len(receipt['checks'])} checks against the reference passed" in result.stderr
    assert receipt["worst"]["graph"] in result.stderr
    for stage in ("trace step", "lint decode", "check encode"):
        assert stage in result.stderr
    before = {path.name: path.stat().st_mtime_ns for path in bundle.path.iterdir()}
    assert "small-1x2x2-fp16 exists: choose another --out" in refused(2, *files)
    assert {path.name: path.stat().st_mtime_ns for path in bundle.path.iterdir()} == before


def test_a_checkpoint_for_another_block_is_refused_unless_only_timed(weights: Path, tmp_path: Path) -> None:
    other = ("--checkpoint", weights / "small.safetensors", "--block", "1x1x4", "--out", tmp_path / "bundle")
    message = refused(2, *other)
    assert "trained for block 1x2x2, not 1x1x4" in message
    assert "--block 1x2x2" in message
    assert "--timing-only" in message
    assert not (tmp_path / "bundle").exists()
    result = run(*other, "--timing-only", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    assert "trained for 1x2x2: timing only" in result.stderr
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.spec.block == (1, 1, 4)
    assert not manifest.model["trained"]
    assert "timing only" in manifest.provenance["note"]


def test_an_authors_file_fixes_the_block_size_but_not_the_shape(weights: Path) -> None:
    file = weights / "k600_L16.ckpt"
    for block in (None, "16", "1x1x16", "1x4x4"):
        found = find(Request(checkpoint=file, block=block))
        assert found.trained
        assert str(found.generator.config.block) == ("1x4x4" if block == "1x4x4" else "1x1x16")
    assert "trained for block 1x1x16, not 1x1x8" in refused(2, "--checkpoint", file, "--block", 8)


def test_our_own_file_fixes_the_block_shape_under_any_name(weights: Path, tmp_path: Path) -> None:
    shutil.copy(weights / "small.safetensors", tmp_path / "small.ckpt")
    assert "trained for block 1x2x2, not 1x1x4" in refused(
        2, "--checkpoint", tmp_path / "small.ckpt", "--block", "1x1x4"
    )


def test_random_weights_are_the_same_every_time_and_say_so() -> None:
    first, second = (find(Request(model="nbp-tiny", weights="random", block="1x2x16")) for _ in range(2))
    assert not first.trained
    assert "quality is not measured" in first.note
    assert str(first.generator.config.block) == "1x2x16"
    torch.testing.assert_close(first.generator.state_dict(), second.generator.state_dict(), rtol=0, atol=0)
    drawn = [p.flatten()[0].item() for p in first.generator.parameters() if p.ndim > 1]
    assert len({*drawn}) == len(drawn)
    assert first.tokenizer is not None
    assert second.tokenizer is not None
    torch.testing.assert_close(first.tokenizer.state_dict(), second.tokenizer.state_dict(), rtol=0, atol=0)


def test_random_weights_of_a_checkpoints_size_take_any_block_and_are_not_trained(weights: Path) -> None:
    found = find(Request(checkpoint=weights / "small.safetensors", weights="random", block="1x4x4"))
    assert not found.trained
    assert str(found.generator.config.block) == "1x4x4"
    assert "random weights" in found.note
    stored = checkpoint.load(weights / "small.safetensors").generator
    assert stored is not None
    assert not torch.equal(found.generator.head.weight, stored.head.weight)
    assert found.generator.head.weight.shape == stored.head.weight.shape


def test_an_unknown_model() -> None:
    message = refused(2, "--model", "nbp-xs")
    for name in ("'nbp-xs'", "nbp-xl", "nbp-xxl", "nbp-3b", "nbp-tiny"):
        assert name in message


def test_a_model_that_has_no_weights() -> None:
    message = refused(2, "--model", "nbp-xl")
    assert "--checkpoint FILE" in message
    assert "--weights random" in message


def test_a_checkpoint_and_a_model(weights: Path) -> None:
    assert "leave out --model" in refused(2, "--checkpoint", weights / "small.safetensors", "--model", "nbp-xl")


def test_a_tokenizer_without_a_checkpoint(weights: Path) -> None:
    message = refused(2, "--model", "nbp-tiny", "--weights", "random", "--tokenizer", weights / "tokenizer.safetensors")
    assert "--tokenizer" in message
    assert "--checkpoint" in message


@pytest.mark.parametrize("block", ["1x3x5", "2x1x8", "1x1x32"])
def test_a_block_that_does_not_tile_lists_those_that_do(block: str) -> None:
    message = refused(2, "--model", "nbp-tiny", "--weights", "random", "--block", block)
    assert f"block {block} does not tile" in message
    for shape in ("1x1x1", "1x1x16", "1x4x4", "1x16x16"):
        assert f"{shape}" in message
    assert "2x1x1" not in message


@pytest.mark.parametrize("block", ["banana", "0", "1x16", "24"])
def test_an_invalid_block(block: str) -> None:
    assert "block" in refused(2, "--model", "nbp-tiny", "--weights", "random", "--block", block)


def test_files_with_other_content(weights: Path, tmp_path: Path) -> None:
    generator, tokenizer = weights / "small.safetensors", weights / "tokenizer.safetensors"
    assert "holds only a tokenizer" in refused(2, "--checkpoint", tokenizer)
    assert "holds no tokenizer" in refused(2, "--checkpoint", generator, "--tokenizer", generator)
    message = refused(2, "--checkpoint", weights / "k600_L16.ckpt", "--tokenizer", tokenizer)
    assert "the tokenizer has 125 codes but the generator has 320 video ids" in message
    assert "nowhere.ckpt is neither a file nor a Hub id" in refused(1, "--checkpoint", tmp_path / "nowhere.ckpt")
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    assert "junk.ckpt" in refused(1, "--checkpoint", tmp_path / "junk.ckpt")


@pytest.mark.parametrize(("batch", "code"), [(10**6, 1), (10**20, 2)])
def test_a_batch_that_no_memory_holds_is_one_line(batch: int, code: int, tmp_path: Path) -> None:
    message = refused(code, "--batch", batch)
    assert message.count("Error: ") == 1
    assert "--batch" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "code"), [("--help >&-", 0), ("--help >/dev/full", 1), ("verify . >&- 2>&-", 1)])
def test_an_output_that_is_closed_or_full(words: str, code: int) -> None:
    homes = ":".join(str(ROOT / home) for home in (".", "reference", "engines"))
    line = f"PYTHONPATH={homes} exec {sys.executable} -m nbp_export {words}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == (code if "full" in words else 0)


@pytest.mark.parametrize("words", ["onnx", "verify bundle"])
def test_a_current_folder_that_was_deleted(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = CliRunner().invoke(main, words.split())
    assert (result.exit_code, result.output) == (
        2,
        "Error: the current folder was deleted: change to another folder\n",
    )


def test_a_user_without_a_home_has_the_commands(tmp_path: Path) -> None:
    """As one whom the system does not know: `expanduser` finds no home for it."""
    homes = [str(ROOT / home) for home in (".", "reference", "engines")]
    code = (
        f"import os, pwd, sys; sys.path[:0] = {homes}; os.environ.pop('HOME', None); "
        "os.environ.pop('XDG_CACHE_HOME', None); pwd.getpwuid = {}.__getitem__; from nbp_export.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "inspect", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: nothing is not a bundle")
    code = code.replace("from nbp_export.cli import main; main()", "import nbp_export.trt_library")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_path_is_printed_where_there_is_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    cli._echo_path(Path("bundle"))


@pytest.mark.parametrize("option", [("--batch", 0), ("--dtype", "fp8"), ("--weights", "good"), ("--blocks", 16)])
def test_invalid_options(option: tuple[str, object]) -> None:
    assert str(option[0]) in refused(2, *option)


def test_a_folder_that_cannot_be_made(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refused(2, "--checkpoint", weights / "small.safetensors", "--out", tmp_path / "file" / "bundle")
    assert "choose another --out" in message


def test_a_refused_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    paths = [str(ROOT / home) for home in (".", "reference", "engines")]
    code = f"import sys; sys.path[:0] = {paths}; from nbp_export.cli import main; main()"
    command = [sys.executable, "-c", code, "onnx", "--model", "nbp-xl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith("Error: nbp-xl has no bundled weights")
    assert "Traceback" not in done.stderr


def test_missing_extras_are_one_line_and_the_command_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[str] = []

    def nothing(name: str, package: str | None = None) -> ModuleSpec | None:  # noqa: ARG001
        requested.append(name)
        return None

    monkeypatch.setattr(_extras, "find_spec", nothing)
    message = refused(1, "--model", "nbp-tiny", "--weights", "random")
    assert "torch" in requested
    assert f"{', '.join(dict.fromkeys(requested))} are not installed: pip install 'nbp-export[export,cpu]'" in message
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    installed = {re.split(r"[<>=\[ ]", line)[0] for line in extras["export"] + extras["cpu"]}
    assert set(requested) <= installed
