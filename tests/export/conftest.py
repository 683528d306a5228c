"""Exports that several tests look at: each is made once, on first use."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from nbp_engines.bundle import Bundle
from nbp_export.onnx_bundle import export
from tests.export.support import Exported, source

Exporter = Callable[..., Exported]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """`exported(block, dtype="fp32", batch=1, tokenizer=False, latent=(5, 4, 4))`, the same bundle every time."""

    @cache
    def make(
        block: str,
        dtype: str = "fp32",
        batch: int = 1,
        tokenizer: bool = False,
        latent: tuple[int, int, int] = (5, 4, 4),
    ) -> Exported:
        model = source(block, tokenizer, latent)
        out = tmp_path_factory.mktemp("bundles") / f"small-{block}-{dtype}"
        return Exported(export(model, out, dtype, batch), model)

    return make


@pytest.fixture
def copied(exported: Exporter, tmp_path: Path) -> Callable[..., Bundle]:
    """A copy of an exported bundle that a test may damage."""
    import shutil

    def copy(*args: object, **kwargs: object) -> Bundle:
        return Bundle.open(Path(shutil.copytree(exported(*args, **kwargs).bundle.path, tmp_path / "copy")))

    return copy
