"""The rules of the code base: which package imports which, what works without heavy libraries, and what git tracks."""

import ast
import builtins
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "nbp_export": ".",
    "nbp_reference": "reference",
    "nbp_engines": "engines",
    "nbp_bench": "bench",
    "nbp_reports": "reports",
}
MAY_IMPORT = {
    "nbp_reference": set(),
    "nbp_engines": set(),
    "nbp_reports": set(),
    "nbp_export": {"nbp_reference", "nbp_engines"},
    "nbp_bench": set(FOLDERS),
}
HEAVY = [
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
    "av",
    "pandas",
    "scipy",
    "matplotlib",
    "rich",
    "sentencepiece",
    "tokenizers",
]
TRACKED_BYTES = 25_000_000


def modules(package: str) -> Iterator[Path]:
    """The package's source files."""
    return (ROOT / FOLDERS[package] / package).rglob("*.py")


def imported(source: str) -> Iterator[str]:
    """The top-level names of everything that the source imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import does not name the package"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_go_one_way(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    violations = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in imported(path.read_text("utf-8"))
        if name in FOLDERS and name not in allowed
    }
    assert not violations


def test_the_module_of_the_base_error_imports_nothing() -> None:
    assert [*imported((ROOT / "engines" / "nbp_errors.py").read_text("utf-8"))] == []


@pytest.mark.parametrize("package", FOLDERS)
def test_every_error_derives_from_ours(package: str) -> None:
    violations = {
        f"{path.relative_to(ROOT)}: {node.name}({base.id})"
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
        for base in node.bases
        if isinstance(base, ast.Name) and not (base.id.endswith("Error") and base.id not in vars(builtins))
    }
    assert not violations


def run_bare(code: str) -> subprocess.CompletedProcess[str]:
    """Run the code in a new interpreter in which the import of every heavy library fails."""
    bare = f"import sys; sys.modules.update(dict.fromkeys({HEAVY}))"
    path = f"sys.path[:0] = {[str(ROOT / home) for home in FOLDERS.values()]}"
    command = [sys.executable, "-c", f"{bare}; {path}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_engines_module_imports_without_heavy_libraries() -> None:
    files = sorted(path.relative_to(ROOT / "engines") for path in modules("nbp_engines"))
    names = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    assert "nbp_engines" in names
    result = run_bare("\n".join(f"import {name}" for name in names))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", ["nbp_export", "nbp_bench"])
def test_help_works_without_heavy_libraries(package: str) -> None:
    result = run_bare(f"from {package}.cli import main\nmain(['--help'])")
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


def tracked() -> list[Path]:
    """The files that git tracks; skips the test outside a clone."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def test_tracked_files_stay_small() -> None:
    sizes = {path: path.stat().st_size for path in tracked()}
    assert sum(sizes.values()) <= TRACKED_BYTES, sorted(sizes, key=sizes.__getitem__)[-5:]


def test_no_tracked_file_contains_a_path_of_this_machine() -> None:
    folders = {ROOT, ROOT.parent, Path.home(), Path(sys.prefix)} - {Path("/"), Path(tempfile.gettempdir())}
    prefixes = [f"{folder}/".encode() for folder in folders]
    contents = {path.relative_to(ROOT): path.read_bytes() for path in tracked()}
    assert not [(str(name), prefix) for name, content in contents.items() for prefix in prefixes if prefix in content]
