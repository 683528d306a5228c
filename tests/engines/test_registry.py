"""The table of runtimes. Code reads the differences between runtimes from its entries."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbp_engines.registry import DEFAULT, RUNTIMES, open_session

ROOT = Path(__file__).parents[2]
NAMES = {*RUNTIMES, "naive", "eager", "cudagraph", "compiled"}


@pytest.mark.parametrize("package", ["nbp_export", "engines", "bench", "reports", "reference"])
def test_no_code_compares_the_name_of_a_runtime_or_an_engine(package: str) -> None:
    compared = re.compile(rf"(==|!=|\bin \(|\bcase) *[\"']({'|'.join(NAMES)}|onnx|cuda)[\"']")
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in (ROOT / package).rglob("*.py")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if compared.search(line) and ".type" not in line and "device" not in line
    ]
    assert not lines


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
def test_an_entry_is_complete(runtime: object) -> None:
    assert all(value not in ("", ()) for value in vars(runtime).values()), runtime


def test_the_default_runs_everywhere() -> None:
    assert DEFAULT.absence() is None
    assert DEFAULT.devices == ("cpu",)


def test_a_wrong_name_lists_the_right_ones(tmp_path: Path) -> None:
    from nbp_engines.errors import EngineError
    from tests.engines.test_bundle import make

    with pytest.raises(EngineError, match="there is no runtime 'onnx'; choose one of ort-cpu, ort-cuda, tensorrt"):
        open_session(make(tmp_path / "toy"), runtime="onnx")


@pytest.mark.parametrize(("setting", "expected"), [(None, "1"), ("0", "0")])
def test_onnx_runtime_collects_no_usage_data_unless_the_user_wants_it(setting: str | None, expected: str) -> None:
    code = "import os, nbp_engines; from nbp_engines import open_session; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"PYTHONPATH": str(ROOT / "engines")} | ({"ORT_DISABLE_TELEMETRY": setting} if setting else {})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == expected
