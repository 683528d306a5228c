"""Unusual file names work or are refused at the start, and printed names contain no control characters."""

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from nbp_engines.bundle import RECEIPT, Bundle
from nbp_engines.shell import command_line
from nbp_errors import NbpError, UsageError, printable
from nbp_export.cli import main
from nbp_export.onnx_bundle import export, refuse_out
from nbp_export.request import Request
from nbp_export.sources import find
from nbp_reference import checkpoint
from tests.export.support import Exported, source
from tests.reference.test_checkpoint import halved, lightning
from tests.support import golden_generator

Exporter = Callable[..., Exported]

NOT_UTF_8 = os.fsdecode(b"caf\xe9")
NAMES = [
    "with:colon",
    "x[ema]",
    "[bold]x[red]",
    ":smile:",
    "new\nline",
    "\x1b[2Jclear",
    "right\u202eleft",
    "narrow\u202fspace",
    "-dash",
    "it's $HOME `date` \\n",
    "ключ",
    NOT_UTF_8,
    "x" * 240,
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    checkpoint.save(source("1x4x4").generator, path)
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [*map(str, args)])


def assert_harmless(result: Result) -> None:
    """Assert that there is no traceback and that no line contains control characters."""
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert "Traceback" not in result.output
    for line in result.stderr.splitlines():
        assert line == printable(line)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_checkpoint_of_any_name_is_exported_from_its_folder(name: str, weights: Path, tmp_path: Path) -> None:
    """Without --out, the name of the bundle's folder is easy to type."""
    Path(f"{name}.ckpt").write_bytes(weights.read_bytes())
    result = run("onnx", "--checkpoint", f"{name}.ckpt", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    assert_harmless(result)
    assert f"{printable(name)}.ckpt, block 1x4x4" in result.stderr.replace("\n", " ")
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert result.stdout_bytes == os.fsencode(folder.name) + b"\n"
    assert folder.name.isprintable()
    assert not folder.name.startswith("-")
    bundle = Bundle.open(folder, require_receipt=True)
    assert bundle.manifest.model["name"] == printable(name)
    command = bundle.manifest.provenance["command"]
    output = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    words = [os.fsdecode(word) for word in output.split(b"\0")]
    again = words[words.index("--checkpoint") + 1]
    assert Path(again).samefile(f"{name}.ckpt")
    assert command in bundle.manifest.origin
    assert_harmless(run("inspect", folder))
    assert_harmless(run("inspect", "--json", folder))


@pytest.mark.parametrize("name", ["with:colon", "[bold]x[red]", "new\nline", "-dash", "x" * 240], ids=ascii)
def test_a_bundle_of_any_name(name: str, weights: Path) -> None:
    path = Path(name)
    result = run("onnx", "--checkpoint", weights, "--dtype", "fp32", "--out", path)
    assert result.exit_code == 0, result.output
    assert_harmless(result)
    assert result.stdout_bytes == os.fsencode(name) + b"\n"
    assert "exists: choose another --out" in run("onnx", "--checkpoint", weights, "--out", path).stderr
    (path / RECEIPT).unlink()
    result = run("inspect", "--", path)
    assert_harmless(result)
    hint = result.stdout.replace("\n", "").partition("receipt missing: run `")[2].partition("` to check the bundle")[0]
    output = subprocess.run(["bash", "-c", f"printf '%s\\0' {hint}"], capture_output=True, check=True).stdout
    assert Path(os.fsdecode(output.split(b"\0")[2])).samefile(path)
    result = run("verify", "--", path)
    assert result.exit_code == 0, result.output
    assert_harmless(result)
    assert result.stdout_bytes == os.fsencode(name) + b"\n"
    (path / "step.onnx").write_bytes(b"junk")
    result = run("verify", "--", path)
    assert result.exit_code == 1
    assert f"{printable(name)}/step.onnx is not the file" in result.stderr
    assert_harmless(result)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (NOT_UTF_8, r"caf\udce9 is not UTF-8, which the runtimes require: choose another --out"),
        (f"{NOT_UTF_8}/bundle", "is not UTF-8, which the runtimes require: choose another --out"),
        ("x" * 300, "cannot be the name of a folder (File name too long): choose another --out"),
        ("there", "there exists: choose another --out"),
    ],
    ids=ascii,
)
def test_an_impossible_folder_is_refused_before_anything_is_loaded(name: str, message: str) -> None:
    Path("there").mkdir()
    result = run("onnx", "--checkpoint", "nowhere.ckpt", "--out", name)
    assert result.exit_code == 2
    assert message in result.stderr
    assert_harmless(result)
    with pytest.raises(UsageError):
        refuse_out(Path(name))
    with pytest.raises(UsageError):
        export(source("1x4x4"), Path(name), "fp32")
    assert [path.name for path in Path().iterdir()] == ["there"]


def test_a_folder_that_is_not_utf_8_is_refused_where_a_bundle_was_moved_to_it(
    exported: Exporter, tmp_path: Path
) -> None:
    folder = tmp_path / NOT_UTF_8
    folder.symlink_to(exported("1x2x2", batch=2).bundle.path)
    for command in ("inspect", "verify"):
        result = run(command, folder)
        assert result.exit_code == 1
        assert r"caf\udce9 is not UTF-8, which the runtimes need in the name of a bundle's folder" in result.stderr
        assert_harmless(result)


@pytest.mark.parametrize("name", [*NAMES, "x" * 300], ids=ascii)
@pytest.mark.parametrize("suffix", ["", ".ckpt"])
@pytest.mark.parametrize("content", [None, b"junk"])
def test_a_file_that_is_not_a_checkpoint_is_refused_in_one_line(name: str, suffix: str, content: bytes | None) -> None:
    if content and len(name) < 300:
        Path(name + suffix).write_bytes(content)
    for options in (["--checkpoint", name + suffix], ["--checkpoint", "other.ckpt", "--tokenizer", name + suffix]):
        result = run("onnx", *options)
        assert result.exit_code == 1, result.output
        assert_harmless(result)
        assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1


def test_a_shell_reads_back_the_quoted_words() -> None:
    words = [*NAMES, "", "a b", "'", '"', "\\", "\t", "\x7f", "\U0001f600", "\u200d", "é\udc80f", "\U000e0001"]
    line = command_line(*words)
    assert line == printable(line)
    output = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    assert [os.fsdecode(word) for word in output.split(b"\0")[:-1]] == words
    plain = [word for word in words if word == printable(word)]
    assert shlex.split(command_line(*plain)) == plain
    assert command_line("verify", Path("-x")) == "verify ./-x"


def test_messages_keep_lists_and_escape_control_characters() -> None:
    error = NbpError("a\nb \x1b[31m\x9b\u202e caf\udce9 \u202f é\n  first\n  second\r")
    assert error.message == str(error) == "a\\nb \\x1b[31m\\x9b\\u202e caf\\udce9 \u202f é\n  first\n  second\\r"
    assert NbpError(error.message).message == error.message


def test_an_ema_copy_is_loaded_or_mentioned() -> None:
    model = golden_generator("16")
    ema = {f"model_ema.transformer.{key}": value for key, value in halved(model).state_dict().items()}
    data = lightning(model)
    torch.save(data | {"state_dict": data["state_dict"] | ema}, "a.ckpt")
    torch.save(data, "plain.ckpt")
    plain, ema_model = find(Request(checkpoint=Path("a.ckpt"))), find(Request(checkpoint=Path("a.ckpt"), ema=True))
    assert plain.note == (
        "a.ckpt, block 1x1x16; it also holds an EMA copy of its weights (model_ema.), which --ema selects"
    )
    assert ema_model.note == "a.ckpt, block 1x1x16, the EMA copy of its weights (model_ema.)"
    assert torch.equal(ema_model.generator.head.weight, plain.generator.head.weight * 0.5)
    assert "--ema" in ema_model.options
    assert "--ema" not in plain.options
    for command in ("onnx", "trt"):
        assert "--ema" in run(command, "--help").stdout
    result = run("onnx", "--checkpoint", "plain.ckpt", "--ema")
    assert result.exit_code == 1
    assert "plain.ckpt: it holds no EMA copy of the weights: leave out --ema" in result.stderr
    result = run("onnx", "--ema")
    assert result.exit_code == 2
    assert "--ema needs a --checkpoint" in result.stderr
    result = run("onnx", "--checkpoint", "a.ckpt", "--ema", "--dtype", "fp32", "--out", "bundle")
    assert result.exit_code == 0, result.output
    manifest = json.loads(Path("bundle", "manifest.json").read_bytes())
    assert "--ema" in shlex.split(manifest["provenance"]["command"])
    assert manifest["provenance"]["note"] == ema_model.note
