"""The bytes of a step, times by a device's clock, bandwidths, and the description of the machine."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nbp_bench import device, machine
from nbp_export.graphs import system_spec
from tests.support import small_generator

CPU = torch.device("cpu")


@pytest.mark.parametrize("block", ["1x1x1", "1x1x4", "2x4x4"])
def test_a_step_reads_weights_once_and_valid_rows(block: str) -> None:
    model = small_generator(block)
    spec = replace(system_spec(model.config, None, "bf16", 3))
    C, L, n = 32, model.config.block.size, 2
    tables = model.tok_emb.weight.numel() + model.pos_emb.numel()
    weights = sum(p.numel() for p in model.parameters()) - tables
    rows = 2 * n * C * 3 * (40 + L)  # keys and values of three clips
    assert device.step_bytes(spec, [30, 50]) == 2 * (weights + rows + 2 * 3 * L * C)


def test_times_and_bandwidth_by_the_hosts_clock() -> None:
    times = device.time_calls(CPU, lambda i: time.sleep(0.01 * (i + 1)), 2)
    assert 10e6 <= times[0] < times[1]
    assert times[1] >= 20e6
    assert 1e8 < device.copy_bandwidth(CPU) < 1e13
    assert device.peak_bandwidth(CPU) is None


def test_nvidia_smi_describes_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.describe().gpu is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA Some GPU, 81559, 580.1.2'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    description = machine.describe()
    assert (description.gpu, description.gpu_memory_bytes, description.driver) == (
        "NVIDIA Some GPU",
        81559 * 2**20,
        "580.1.2",
    )
    assert "onnxruntime " in description.versions
