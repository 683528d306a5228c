"""Bundles that a run exports: two runs may share them, and their disk is checked once per folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from nbp_bench import bundles
from nbp_bench.engines import engines
from nbp_bench.host import Identity
from nbp_bench.plan import Candidate, Case, Plan
from nbp_bench.worker import Worker, WorkerError
from nbp_engines.bundle import Bundle
from nbp_engines.spec import SystemSpec
from nbp_export.request import Request


class Exporter:
    """A worker whose exports do what a test says."""

    def __init__(self, export: Callable[[Path], None]) -> None:
        self.export = export

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> None:  # noqa: ARG002
        self.export(arguments[-1])


@pytest.fixture
def identity(tiny: Callable[[str], Path]) -> Identity:
    spec: SystemSpec = Bundle.open(tiny("256")).manifest.spec
    return Identity("nbp-tiny", "ab" * 32, True, "a note", spec, 1000, ())


def case(engine: str = "ort-cpu", dtype: str = "fp32") -> Case:
    return Case(Candidate(Request(block="256")), engines()[engine], dtype, 1, "cpu")


def failing(folder: Path) -> None:
    raise WorkerError(f"{folder} appeared meanwhile")


def test_the_bundle_that_another_run_has_exported_meanwhile_is_used(
    identity: Identity, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = Plan([], [], tmp_path)

    def lose_the_race(folder: Path) -> None:
        folder.parent.mkdir()
        folder.symlink_to(tiny("256"))
        failing(folder)

    worker = cast("Worker", Exporter(lose_the_race))
    found = bundles.bundle_for(case(), identity, plan, worker, None, lambda _: None)
    assert found.manifest == Bundle.open(tiny("256")).manifest
    worker = cast("Worker", Exporter(failing))
    with pytest.raises(WorkerError, match="appeared meanwhile"):
        bundles.bundle_for(case(dtype="fp16"), identity, plan, worker, None, lambda _: None)


def test_cases_that_share_a_bundle_need_its_space_once(
    identity: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = []
    monkeypatch.setattr(bundles, "require_space", lambda _, nbytes: needed.append(nbytes))
    cases = [(case(), identity), (case(), identity), (case(dtype="fp16"), identity), (case("eager"), identity)]
    bundles.check_space(cases, Plan([], [], tmp_path), cast("Worker", Exporter(failing)))
    assert needed == [1000 * 4 + 1000 * 2]
