"""The bundles that the bench measures: the given ones, and those that a run exports and later runs use again."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nbp_bench import host
from nbp_bench.host import Identity
from nbp_bench.plan import Case, Plan
from nbp_bench.worker import Worker, WorkerError
from nbp_engines.bundle import Bundle
from nbp_engines.errors import BundleError
from nbp_engines.spec import BYTES
from nbp_errors import UsageError
from nbp_files import require_space


def bundle_for(
    case: Case, identity: Identity, plan: Plan, worker: Worker, seconds: float | None, report: Callable[[str], None]
) -> Bundle:
    """Return the bundle for a case's runtime. If no earlier run left it, the worker exports and proves it first.

    Raises UsageError if the bundle of an earlier run cannot be used any more, WorkerError if the export fails or takes
    longer than `seconds`.
    """
    if case.candidate.bundle:
        return Bundle.open(case.candidate.bundle)
    runtime = case.engine.runtime
    assert runtime
    assert case.candidate.request
    folder = _folder(case, identity, plan, worker)
    if not folder.exists():
        began = time.monotonic()
        report(f"{case}: export {folder.name}")
        arguments = (case.candidate.request, case.dtype, case.batch, runtime, folder)
        try:
            worker.call(host.export_bundle, *arguments, seconds=seconds)
            report(f"{case}: exported and proven in {time.monotonic() - began:.0f} s")
        except WorkerError:
            if not folder.exists():  # otherwise another run has exported it meanwhile
                raise
    return _usable(folder)


def check_space(cases: Sequence[tuple[Case, Identity]], plan: Plan, worker: Worker) -> None:
    """Raise UsageError if the disk has too little space for the weights of the bundles that the cases need."""
    nbytes: dict[Path, int] = {}
    for case, identity in cases:
        runtime = case.engine.runtime
        if runtime and case.candidate.request and not case.refusal():
            folder = _folder(case, identity, plan, worker)
            if not folder.exists():
                copies = 2 if runtime.runs_engines else 1  # the graphs' weights, and those inside the TensorRT engines
                nbytes[folder] = copies * BYTES[case.dtype] * identity.parameters
    require_space(_parent(plan), sum(nbytes.values()))


def _parent(plan: Plan) -> Path:
    return plan.bundles or plan.out / "bundles"


def _folder(case: Case, identity: Identity, plan: Plan, worker: Worker) -> Path:
    """Return the folder of the bundle for a case, whose name tells all bundles of all models apart."""
    runtime = case.engine.runtime
    assert runtime
    kind = "onnx"
    if runtime.runs_engines:
        kind = worker.call(host.gpu_architecture)  # not here, where an open GPU would take memory during the run
    block, digest = identity.spec.block_text, identity.digest[:12]
    name = f"{identity.name}-{block}-b{case.batch}-{case.dtype}-{kind}-{digest}"
    return _parent(plan) / name


def _usable(folder: Path) -> Bundle:
    """Open a bundle that must have a valid receipt and come from the installed versions; raises UsageError if not."""
    from nbp_export.proof import versions  # imports onnx, which a machine that exports nothing may lack

    try:
        bundle = Bundle.open(folder, require_receipt=True)
        if bundle.manifest.versions == versions():
            return bundle
        reason = "other versions of the packages exported it"
    except BundleError as error:
        reason = error.message
    raise UsageError(f"{folder} cannot be used ({reason}): remove the folder, or choose another --out")
