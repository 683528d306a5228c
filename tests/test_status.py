"""Claims about what was built and executed are in one table, which all other texts quote."""

import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from nbp_engines.registry import RUNTIMES
from nbp_engines.status import STATUS, markdown, sentence, sentences
from nbp_export.cli import main
from nbp_export.inspect import status_of
from nbp_export.trt_library import LIBRARIES

ROOT = Path(__file__).parents[1]
EXEMPT = {"engines/nbp_engines/status.py", "tests/test_status.py"}
# Matches such a claim in a text whose lines were joined.
CLAIMS = re.compile(
    r"never (yet )?(been )?(built|executed|run)\b"
    r"|(has|have|was|were) not (yet )?(been )?(built|executed|run|tried) (by us|on an? \w*GPU|yet)"
    r"|(built|executed|run|tried|measured|seen)( \w+)? by us\b"
    r"|never by us|never on (an? \w*GPU|one)\b"
    r"|(nothing|no engine)( here| of ours)? (has|have|was|were) (ever )?(been )?(run|executed)",
    re.IGNORECASE,
)


def joined(text: str) -> str:
    """The text on one line, without the marks of comments at the beginnings of its lines."""
    return re.sub(r"\s+", " ", re.sub(r"\n[ \t]*(#|//|\*)* ?", " ", text))


def tracked() -> list[str]:
    """The names of the files that git tracks; skips the test outside a clone."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in names.split("\0") if name and (ROOT / name).is_file() and name not in EXEMPT]


def test_only_the_table_has_claims_about_what_was_executed() -> None:
    claims = []
    for name in tracked():
        try:
            text = (ROOT / name).read_text("utf-8")
        except UnicodeDecodeError:
            continue
        rest = joined(text.replace(markdown(), ""))
        claims += [f"{name}: …{rest[max(0, m.start() - 40) : m.end() + 40]}…" for m in CLAIMS.finditer(rest)]
    assert not claims, "\n".join(claims)


@pytest.mark.parametrize(
    "claim",
    [
        "Never executed on a GPU by us",
        "The engines have\n    never been executed by us.",
        "its builder was executed, its engines never by us",
        "Executed by us against an emulation, never on a GPU.",
        "Never built or run by us.",
        "nothing here has run on a GPU yet",
        "# It was not\n# run on a GPU.",
        "No engine has been executed",
    ],
)
def test_a_claim_is_found(claim: str) -> None:
    assert CLAIMS.search(joined(claim))


def test_rows_as_sentences() -> None:
    assert sentence("ort-cpu") == "ONNX graphs in ONNX Runtime on a CPU: built, executed on a CPU."
    assert sentence("ort-cuda").endswith(": built, executed on an emulated GPU, never on a GPU.")
    assert sentence("tensorrt-11-engines") == "TensorRT 11 engines: never built, never executed."
    assert sentence("bf16").startswith(
        "Graphs in bf16: built, executed on an emulated GPU, never on a CPU or on a GPU ("
    )
    assert sentence("torch-cpu").endswith(": executed on a CPU.")
    assert sentences(["ort-cpu", "sample.cu", "ort-cpu"]) == [sentence("ort-cpu"), sentence("sample.cu")]


def test_every_runtime_and_library_has_rows() -> None:
    named = {key for runtime in RUNTIMES.values() for key in runtime.status}
    assert named | {library.status for library in LIBRARIES.values()} <= STATUS.keys()
    assert set(status_of("tensorrt", "bf16", ["tensorrt_rtx"])) == {
        sentence(key) for key in ("tensorrt", "sample.cu", "tensorrt-rtx-engines", "bf16")
    }
    assert status_of("a runtime of another version", "fp16", []) == []


def test_readme_has_the_table() -> None:
    assert markdown() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("trt", ["tensorrt", *(library.status for library in LIBRARIES.values())]),
        ("verify", [key for runtime in RUNTIMES.values() for key in runtime.status]),
    ],
)
def test_help_quotes_the_table(command: str, keys: list[str]) -> None:
    text = joined(CliRunner().invoke(main, [command, "--help"]).output)
    for key in keys:
        assert sentence(key) in text
