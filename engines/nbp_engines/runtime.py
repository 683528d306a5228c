"""What can run a bundle's graphs: the facts that everybody else reads in place of comparing names."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nbp_engines.bundle import Bundle
    from nbp_engines.session import GraphSession


class OpenOptions(NamedTuple):
    """How a bundle is opened.

    Attributes:
        threads: inside an operator, on a CPU; None is the runtime's own choice.
        graphs: the names of those that are opened; None opens all.
        lean: little memory and a quick start matter more than speed, as in a proof. A runtime may ignore it.
        models: ONNX graphs by name that run in place of the bundle's files, on the same weights; only where the
            runtime `takes_models`.
    """

    threads: int | None = None
    graphs: Collection[str] | None = None
    lean: bool = False
    models: Mapping[str, bytes] | None = None


def nothing_against(bundle: "Bundle") -> str | None:  # noqa: ARG001 - the signature of Runtime.refusal
    """No bundle is refused."""
    return None


@dataclass(frozen=True)
class Runtime:
    """One runtime. To add one: a module that defines its session and its entry, and a line in the registry.

    Attributes:
        name: what command lines, manifests and records call it.
        title: what it is, in a few words.
        status: the rows of `nbp_engines.status` that say what was executed of it so far.
        extra: the extra of this distribution that installs it.
        packages: the distributions whose versions a record and a receipt name.
        devices: `cpu` or `cuda`, where it computes.
        dtypes: the dtypes of a bundle that it executes.
        runs_engines: whether it runs the TensorRT engines of a bundle, not its ONNX graphs.
        shares_weights: whether all graphs can be open together at the cost of one copy of the weights. Else a proof
            opens them one after the other.
        takes_models: whether it can run graphs that are given as bytes.
        open: opens a bundle. Raises EngineError if that fails.
        absence: a sentence that says why it cannot run on this machine, or None.
        refusal: a sentence that says why it cannot run this bundle, or None.
        description: what exactly would run this bundle, for a receipt: libraries with versions, and the GPU.
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
    refusal: Callable[["Bundle"], str | None] = nothing_against
