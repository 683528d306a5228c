"""Bundles of the tiny models, each exported once for the tests of the bench."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nbp_export.onnx_bundle import export
from nbp_export.request import Request
from nbp_export.sources import find
from tests.conftest import Shared


@pytest.fixture(scope="session")
def tiny(shared: Shared) -> Callable[[str], Path]:
    """`tiny("16")`: the folder of the bundled nbp-tiny for that block, in fp32."""

    def make(block: str) -> Path:
        return shared(f"tiny-{block}", lambda out: export(find(Request(block=block)), out, "fp32"))

    return make
