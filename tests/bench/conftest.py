"""Bundles of the tiny models, each exported once for the tests of the bench."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from nbp_export.onnx_bundle import export
from nbp_export.request import Request
from nbp_export.sources import find


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("16")`: the folder of the bundled nbp-tiny for that block, in fp32."""

    @cache
    def make(block: str) -> Path:
        return export(find(Request(block=block)), tmp_path_factory.mktemp("tiny") / block, "fp32").path

    return make
