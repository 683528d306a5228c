"""The wheel works for a user who installs it into another environment, outside the clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"nbp_export", "nbp_reference", "nbp_engines", "nbp_bench", "nbp_reports"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with the wheel and the libraries that are installed here."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    # Paths in a .pth file come last, and .pth files there are ignored, such as the one of the editable install.
    (packages / "libraries.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True, capture_output=True)
    return folder / "bin"


def run(command: list[str | Path], cwd: Path) -> str:
    """Run a command that must succeed, in a folder outside the clone, and return its standard output."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_contains_only_the_packages_and_their_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == PACKAGES | {
        "nbp_errors.py",
        "nbp_files.py",
        "nbp_export-0.1.0.dist-info",
    }
    data = {f"nbp_bench/golden/{name}" for name in ("k600_L1.npz", "k600_L16.npz", "weights.py")}
    sources = {
        f"{package.name}/{path.relative_to(package).as_posix()}"
        for package in [ROOT / "nbp_export", *ROOT.glob("*/nbp_*")]
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == sources | data | {"nbp_errors.py", "nbp_files.py"}
    assert "nbp_export-0.1.0.dist-info/licenses/LICENSE" in names


def test_imports_come_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    code = f"from importlib import import_module\nfor name in {PACKAGES}: print(import_module(name).__file__)"
    files = run([environment / "python", "-c", code], tmp_path).splitlines()
    assert len(files) == len(PACKAGES)
    assert all(Path(file).is_relative_to(environment.parent) for file in files), files


@pytest.mark.parametrize("command", ["nbp-export", "nbp-bench"])
def test_help_works_outside_the_clone(command: str, environment: Path, tmp_path: Path) -> None:
    assert "Usage:" in run([environment / command, "--help"], tmp_path)


def test_bundled_models_are_exported_and_measured_outside_the_clone(environment: Path, tmp_path: Path) -> None:
    bundle = run([environment / "nbp-export", "onnx", "--block", "256"], tmp_path).strip()
    assert (tmp_path / bundle / "receipt.json").is_file()
    output = run([environment / "nbp-bench", "--sizes", "256", "--clips", "1", "--engines", "eager,ort-cpu"], tmp_path)
    assert "bundled nbp-tiny for block 1x16x16" in output
    assert output.count("identical") == 1
    assert (tmp_path / "nbp-bench-results" / "report.md").is_file()
