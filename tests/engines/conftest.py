"""Fixtures: exported bundles, each made once, and an emulated GPU on which nothing may be left allocated."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.export.conftest import exported

if TYPE_CHECKING:
    from tests.engines.emulated import Gpu

__all__ = ["exported"]


@pytest.fixture
def gpu() -> "Iterator[Gpu]":
    from tests.engines.emulated import Gpu, emulated

    with emulated(Gpu()) as gpu:
        yield gpu
        assert not gpu.device, "device memory is left"
        assert not gpu.pinned, "pinned memory is left"
        assert not gpu.handles, "streams, graphs or modules are left"
