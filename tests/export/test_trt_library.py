"""The choice of the library that builds, and the options that it gets.

TensorRT 11 is not available everywhere. Therefore the code for TensorRT 11 is tested with a builder config of
TensorRT-RTX. test_trt_api.py checks that both have the same API for the names in use.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from nbp_engines.errors import EngineError
from nbp_engines.trt import log_of
from nbp_errors import NbpError, UsageError
from nbp_export import trt_library
from nbp_export.cli import main
from nbp_export.trt_library import RTX, TENSORRT, Library, Options, configure, save_timings

pytest.importorskip("tensorrt_rtx", reason="pip install 'nbp-export[trt-rtx]'")

STAND_IN = replace(TENSORRT, module="tensorrt_rtx")  # takes the code path of TensorRT 11, with an installed module
A100 = ("NVIDIA A100-SXM4-80GB", "sm80")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_library, "TENSORRT", STAND_IN)
    monkeypatch.setattr(trt_library, "LIBRARIES", {"tensorrt": STAND_IN, "rtx": RTX})


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_library, "_gpu", lambda: A100)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> tuple[str, str]:
        raise EngineError("there is no GPU")

    monkeypatch.setattr(trt_library, "_gpu", none)


def test_auto_without_tensorrt_11() -> None:
    library, options, reason = Options().resolve()
    assert (library, options.arch, reason) == (RTX, "sm80", "TensorRT 11 is not installed")


@pytest.mark.usefixtures("installed", "no_gpu")
def test_auto_without_a_gpu() -> None:
    library, options, reason = Options(arch="sm89").resolve()
    assert (library, options.arch) == (RTX, "sm89")
    assert "needs the target GPU: there is no GPU" in reason


@pytest.mark.usefixtures("installed", "a100")
def test_auto_with_tensorrt_11_and_a_gpu() -> None:
    assert Options().resolve()[:2] == (STAND_IN, Options(arch="sm80"))
    assert Options(arch="sm80", level=5).resolve()[0] is STAND_IN
    library, _, reason = Options(arch="sm86").resolve()
    assert library is RTX
    assert "only for this machine's GPU, which is sm80" in reason


@pytest.mark.usefixtures("installed", "a100")
def test_tensorrt_11_builds_for_no_other_gpu() -> None:
    with pytest.raises(
        UsageError, match=r"TensorRT 11 builds only for this machine's GPU, which is sm80, not for sm86: use --builder"
    ):
        Options("tensorrt", "sm86").resolve()


@pytest.mark.usefixtures("installed", "no_gpu")
def test_tensorrt_11_needs_a_gpu() -> None:
    with pytest.raises(EngineError, match="there is no GPU"):
        Options("tensorrt").resolve()


def test_tensorrt_11_is_not_installed() -> None:
    if TENSORRT.installed:
        pytest.skip("TensorRT 11 is installed")
    done = CliRunner().invoke(main, ["trt", "--builder", "tensorrt"])
    assert done.exit_code == 1
    assert "tensorrt is not installed: pip install 'nbp-export[trt" in done.output


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_library, "RTX", replace(RTX, module="tensorrt_of_nobody"))
    with pytest.raises(NbpError, match="tensorrt_of_nobody is not installed: pip install"):
        Options().resolve()


def config_of(library: Library) -> Any:
    trt = library.load()
    builder = trt.Builder(log_of(library.load()))
    return builder.create_builder_config(), builder  # the config lives as long as its builder


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")  # about its timing cache
@pytest.mark.usefixtures("a100")
def test_options_of_tensorrt_11_are_set_in_its_config(tmp_path: Path) -> None:
    trt = STAND_IN.load()
    options = Options("tensorrt", "sm80", "ampere+", workspace=2**28, level=4, timing_cache=tmp_path / "timings")
    config, builder = config_of(STAND_IN)
    configure(config, STAND_IN, options)
    assert config.builder_optimization_level == 4
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 2**28
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert any("setHardwareCompatibilityLevel" in line for line in log_of(STAND_IN.load()).messages("WARNING"))
    assert config.num_compute_capabilities != 1  # no architecture is named
    save_timings(config, STAND_IN, options)
    (saved,) = (tmp_path / "timings").iterdir()
    assert saved.name == f"NVIDIA-A100-SXM4-80GB_tensorrt_rtx_{trt.__version__}.timings"
    configure(config, STAND_IN, options)  # reads the saved timing cache
    del builder


def test_options_of_tensorrt_rtx_are_set_in_its_config() -> None:
    trt = RTX.load()
    config, builder = config_of(RTX)
    configure(config, RTX, Options("rtx", "sm89", workspace=2**28))
    assert config.num_compute_capabilities == 1
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM89
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 2**28
    del builder
