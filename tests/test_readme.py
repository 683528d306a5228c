"""The README's commands and code do what they say."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from nbp_bench.cli import main as nbp_bench
from nbp_export.cli import main as nbp_export
from nbp_reference import clips
from nbp_reports import markdown, record, table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = {"nbp-export": nbp_export, "nbp-bench": nbp_bench}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def _commands() -> Iterator[list[str]]:
    for block in [*_blocks("console"), *_blocks("sh")]:
        for line in block.splitlines():
            yield shlex.split(line.removeprefix("$ "))


def test_the_commands_and_code_of_a_tour_run_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exports, engines, videos, inspection, proof; comparisons have tests of their own."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'nbp-export[trt-rtx]'")
    monkeypatch.chdir(tmp_path)
    shutil.copy(clips.find(clips.DEFAULT_CLIP), "my.mp4")
    commands = [shlex.split(line.removeprefix("$ ")) for block in _blocks("console") for line in block.splitlines()]
    tour = [words for words in commands if words[0] in COMMANDS and not {"--sizes", "--blocks"} & set(words)]
    said = {}
    for words in tour:
        result = CliRunner().invoke(COMMANDS[words[0]], words[1:])
        assert result.exit_code == 0, (words, result.output)
        said[words[1]] = result.output
    assert {words[1] for words in tour} == {"onnx", "trt", "generate", "inspect", "verify"}
    assert "receipt valid" in said["inspect"]
    assert "not verified: the engines themselves" in said["trt"]
    assert "checks against the reference passed" in said["verify"]
    assert {"clip.mp4", "clips.gif", "pedestrians.mp4"} <= {path.name for path in tmp_path.iterdir()}
    for block in _blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out == "(1, 3, 12, 128, 128)\n"


@pytest.mark.parametrize("words", [w for w in _commands() if w[0] in COMMANDS], ids=" ".join)
def test_every_option_that_the_readme_uses_exists(words: list[str]) -> None:
    group = COMMANDS[words[0]]
    command = group.commands.get(words[1], group)
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {words[1] for words in _commands() if words[0] == "make"} | set(re.findall(r"`make ([a-z0-9-]+)`", README))
    assert {"bench", "test"} <= used <= targets


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("nbp-tiny", "nbp-bench --sizes 1,16,256"),
        ("nbp-tiny-hybrid", "nbp-bench --model nbp-tiny-hybrid --sizes 16 --out hyb-results"),
    ],
)
def test_the_tables_are_what_the_committed_records_say(name: str, command: str) -> None:
    records = record.read(ROOT / "reports" / "records" / "xeon-2-cores" / f"{name}.jsonl")
    assert records[0].command == command
    assert markdown.table(table.RESULTS, records) in README


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link
