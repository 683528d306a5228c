"""Fixtures with exported bundles that several tests share. Each bundle is exported once, on first use."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nbp_engines.bundle import Bundle
from nbp_export.graphs import TORCH_DTYPES
from nbp_export.onnx_bundle import export
from tests.conftest import Shared
from tests.export.support import Exported, source

Exporter = Callable[..., Exported]


@pytest.fixture(scope="session")
def exported(shared: Shared) -> Exporter:
    """A function that exports the small model, once for each set of arguments, and returns the bundle and the model."""

    @cache
    def make(
        block: str, dtype: str, batch: int, tokenizer: bool, latent: tuple[int, int, int], one_graph: bool
    ) -> Exported:
        shape = "x".join(map(str, latent))
        name = f"small-{block}-{dtype}-{batch}-{shape}{'-tokenizer' * tokenizer}{'-one' * one_graph}"
        model = source(block, tokenizer, latent)
        path = shared(
            name, lambda out: export(source(block, tokenizer, latent), out, dtype, batch, one_graph=one_graph)
        )
        for part in (model.generator, model.tokenizer):
            if part:
                part.to(TORCH_DTYPES[dtype]).float()
        return Exported(Bundle.open(path), model)

    def exported(
        block: str,
        dtype: str = "fp32",
        batch: int = 1,
        tokenizer: bool = False,
        latent: tuple[int, int, int] = (5, 4, 4),
        one_graph: bool = False,
    ) -> Exported:
        return make(block, dtype, batch, tokenizer, latent, one_graph)

    return exported


@pytest.fixture
def copied(exported: Exporter, tmp_path: Path) -> Callable[..., Bundle]:
    """A copy of an exported bundle that a test may damage."""

    def copy(block: str, **options: Any) -> Bundle:
        return Bundle.open(Path(shutil.copytree(exported(block, **options).bundle.path, tmp_path / "copy")))

    return copy
