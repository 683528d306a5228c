"""The description of a runtime. Other code reads these facts and never compares the names of runtimes."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nbp_engines.bundle import Bundle
    from nbp_engines.session import GraphSession


class OpenOptions(NamedTuple):
    """Options for opening a bundle.

    Attributes:
        threads: number of CPU threads per operator; None leaves it to the runtime.
        graphs: names of the graphs to open; None opens all.
        lean: whether little memory and a quick start matter more than speed, as in a proof. A runtime may ignore it.
        models: serialised ONNX models by graph name, which run in place of the bundle's files on the bundle's weights.
            Only a runtime that `takes_models` accepts them.
    """

    threads: int | None = None
    graphs: Collection[str] | None = None
    lean: bool = False
    models: Mapping[str, bytes] | None = None


def accept_all(bundle: "Bundle") -> str | None:  # noqa: ARG001 - the signature of Runtime.refusal
    """Refuse no bundle."""
    return None


@dataclass(frozen=True)
class Runtime:
    """One runtime. A new one needs a module with its session and its `Runtime`, and a line in the registry.

    Attributes:
        name: its name in command lines, manifests and records.
        title: a short description.
        status: keys of the rows of `nbp_engines.status` that say what was executed with it so far.
        extra: the extra of this distribution that installs its libraries.
        packages: the distributions whose versions are written to records and receipts.
        devices: the kinds of device that it computes on, `cpu` or `cuda`.
        dtypes: the dtypes of bundles that it can run.
        runs_engines: whether it runs the bundle's TensorRT engines. Otherwise it runs the ONNX graphs.
        shares_weights: whether all open graphs share one copy of the weights. If not, a proof opens them one by one.
        takes_models: whether it can run ONNX models that are given as bytes (`OpenOptions.models`).
        open: opens a bundle. Raises EngineError if that fails.
        absence: returns a sentence that says why the runtime cannot run on this machine, or None if it can.
        refusal: returns a sentence that says why it cannot run this bundle, or None if it can.
        description: returns what would run this bundle, for a receipt: libraries with versions, and the GPU.
    """

    name: str
    title: str
    status: tuple[str, ...]
    extra: str
    packages: tuple[str, ...]
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    runs_engines: bool
    shares_weights: bool
    takes_models: bool
    open: Callable[["Bundle", OpenOptions], "GraphSession"]
    absence: Callable[[], str | None]
    description: Callable[["Bundle"], str]
    refusal: Callable[["Bundle"], str | None] = accept_all
