"""The commands, code, tables and links in README and in the pages of docs/ work as documented."""

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from nbp_bench.cli import main as nbp_bench
from nbp_export.cli import main as nbp_export
from nbp_reference import clips
from nbp_reports import markdown, record, table
from tests.conftest import CommandResult

ROOT = Path(__file__).parents[1]
COMMANDS = {"nbp-export": nbp_export, "nbp-bench": nbp_bench}
LINK = re.compile(r"\]\(([^)#]+)(?:#[\w-]+)?\)")


def _pages() -> dict[Path, str]:
    """The texts of README, of the pages that it links to in this order, and then of all other pages."""
    readme = ROOT / "README.md"
    linked = [
        ROOT / link for link in LINK.findall(readme.read_text()) if link.startswith("docs/") and link.endswith(".md")
    ]
    paths = dict.fromkeys([readme, *linked, *sorted((ROOT / "docs").glob("*.md"))])
    return {path: path.read_text() for path in paths}


PAGES = _pages()


def _blocks(page: str, *languages: str) -> list[str]:
    """The contents of a page's code blocks in these languages."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def _commands(*languages: str) -> Iterator[list[str]]:
    """The words of each command in these code blocks; a repeated command is yielded once."""
    lines = (line for page in PAGES.values() for block in _blocks(page, *languages) for line in block.splitlines())
    for line in dict.fromkeys(line.removeprefix("$ ") for line in lines):
        yield shlex.split(line, comments=True)


def _documented() -> list[list[str]]:
    """The words of all documented commands of ours."""
    return [words for words in _commands("console", "sh") if words and words[0] in COMMANDS]


def test_the_commands_and_code_of_all_pages_run_in_this_order(
    ran: Callable[[str], CommandResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """These are the `console` and `python` blocks, without comparisons of block sizes, which other tests run."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'nbp-export[trt-rtx]'")
    monkeypatch.chdir(tmp_path)
    shutil.copy(clips.find(clips.DEFAULT_CLIP), "my.mp4")
    commands = [w for w in _commands("console") if w[0] in COMMANDS and not {"--sizes", "--blocks"} & set(w)]
    outputs = {}
    for words in commands:
        if words[1] in ("onnx", "trt"):  # other tests use the same exports
            outputs[words[1]], folder = ran(" ".join(words[1:]))
            shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
            continue
        result = CliRunner().invoke(COMMANDS[words[0]], words[1:])
        assert result.exit_code == 0, (words, result.output)
        outputs[words[1]] = result.output
    assert {words[1] for words in commands} == {"onnx", "trt", "generate", "inspect", "verify"}
    assert "receipt valid" in outputs["inspect"]
    assert "The engines were not executed, because that needs a GPU" in outputs["trt"]
    assert "checks against the reference passed" in outputs["verify"]
    assert {"clip.mp4", "clips.gif", "pedestrians.mp4"} <= {path.name for path in tmp_path.iterdir()}
    for path, page in PAGES.items():
        names: dict[str, object] = {}
        for block in _blocks(page, "python"):
            exec(compile(block, path.name, "exec"), names)
    assert "(1, 3, 12, 128, 128)\n" in capsys.readouterr().out


@pytest.mark.parametrize("words", _documented(), ids=" ".join)
def test_every_documented_option_exists(words: list[str]) -> None:
    group = COMMANDS[words[0]]
    command = group.commands.get(words[1], group)
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {words[1] for words in _commands("console", "sh") if words and words[0] == "make"}
    used |= {name for page in PAGES.values() for name in re.findall(r"`make ([a-z0-9-]+)\b[^`]*`", page)}
    assert {"bench", "test"} <= used <= targets


def test_readme_is_short() -> None:
    assert len(PAGES[ROOT / "README.md"].splitlines()) < 150


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("nbp-tiny", "nbp-bench --sizes 1,16,256"),
        ("nbp-tiny-hybrid", "nbp-bench --model nbp-tiny-hybrid --sizes 16 --out hyb-results"),
    ],
)
def test_the_tables_match_the_committed_records(name: str, command: str) -> None:
    records = record.read(ROOT / "reports" / "records" / "xeon-2-cores" / f"{name}.jsonl")
    assert records[0].command == command
    assert any(markdown.table(table.RESULTS, records) in page for page in PAGES.values())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    links = [link for link in LINK.findall(PAGES[path]) if "://" not in link]
    assert not [link for link in links if not (path.parent / link).exists()]


def test_readme_links_to_every_page() -> None:
    assert {*(ROOT / "docs").glob("*.md")} <= {ROOT / link for link in LINK.findall(PAGES[ROOT / "README.md"])}
