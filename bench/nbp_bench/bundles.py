"""The bundles that runtimes run: those that were given, and those that are exported for a run and kept for the next."""

import time
from collections.abc import Callable
from pathlib import Path

from nbp_bench import host
from nbp_bench.host import Identity
from nbp_bench.plan import Case, Plan
from nbp_bench.worker import Worker
from nbp_engines.bundle import Bundle
from nbp_engines.cuda import Device
from nbp_engines.errors import BundleError
from nbp_errors import UsageError


def bundle_for(
    case: Case, identity: Identity, plan: Plan, worker: Worker, seconds: float | None, report: Callable[[str], None]
) -> Bundle:
    """The bundle that a case's runtime runs; exported and proven first, in the worker, where it is not there yet.

    Raises UsageError for one of an earlier run that cannot be used any more, WorkerError if the export fails or takes
    longer than so many seconds.
    """
    if case.subject.bundle:
        return Bundle.open(case.subject.bundle)
    runtime = case.engine.runtime
    assert runtime
    assert case.subject.request
    kind = "onnx"
    if runtime.runs_engines:
        with Device.open() as device:
            kind = device.arch
    block, digest = identity.spec.block_text, identity.digest[:12]
    name = f"{identity.name}-{block}-b{case.batch}-{case.dtype}-{kind}-{digest}"
    folder = (plan.bundles or plan.out / "bundles") / name
    if not folder.exists():
        began = time.monotonic()
        report(f"{case}: export {name}")
        arguments = (case.subject.request, case.dtype, case.batch, runtime, folder)
        worker.call(host.export_bundle, *arguments, seconds=seconds)
        report(f"{case}: exported and proven in {time.monotonic() - began:.0f} s")
    return _usable(folder)


def _usable(folder: Path) -> Bundle:
    """The bundle of an earlier run, if it is proven, intact, and made by these versions."""
    from nbp_export.proof import versions  # needs onnx, which a machine without bundles may lack

    try:
        bundle = Bundle.open(folder, require_receipt=True)
        if bundle.manifest.versions == versions():
            return bundle
        why = "it was made by other versions"
    except BundleError as error:
        why = error.message
    raise UsageError(f"{folder} cannot be used, {why}: remove it, or choose another --out")
