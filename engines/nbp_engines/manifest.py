"""The content of `manifest.json`, and the rules that it has to follow before a bundle is used."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from nbp_engines.errors import BundleError
from nbp_engines.loop import loop_of
from nbp_engines.sampling import Sampling
from nbp_engines.shell import command_line, is_utf8, utf8_advice
from nbp_engines.spec import GraphSpec, SystemSpec
from nbp_engines.strict import ANYTHING, FLAG, FROM_0, TEXT, Rule, check, matching, number, whole

SCHEMA = 4
MANIFEST = "manifest.json"
RECEIPT = "receipt.json"
MAX_BUFFERS = 2**40  # bytes; far more than any model of the paper needs, and than any machine has
DERIVED = ("signatures", "loop")  # sections that follow from the spec, written for readers without this package

DIMENSION = whole(1, 2**31 - 1)
# File names that are valid on every operating system and cannot point outside the folder of the bundle.
NAME = matching("a plain file name", r"(?a:\w([\w.-]{0,98}\w)?)")
SHA256 = matching("64 hexadecimal digits", "[0-9a-f]{64}")
MAY_BE_0 = {"condition_latents", "video", "condition_frames", "text_tokens", "text_vocab"}
SPEC_RULES: Rule = {
    field.name: (dimension,) * 3 if field.type == tuple[int, int, int] else dimension
    for field in fields(SystemSpec)
    for dimension in [whole(0, 2**31 - 1) if field.name in MAY_BE_0 else DIMENSION]
} | {"dtype": matching("fp32, fp16 or bf16", "fp32|fp16|bf16"), "layers": whole(1, 4096)}
SAMPLING_RULES: Rule = {
    "temperature": FROM_0,
    "top_k": DIMENSION,
    "top_p": number("a number above 0 and up to 1", lambda v: 0 < v <= 1),
}
MANIFEST_RULES: Rule = {
    "schema": whole(SCHEMA, SCHEMA),
    "runtime": TEXT,
    "spec": SPEC_RULES,
    "graphs": {...: NAME},
    "engines": [
        {
            "file": NAME,
            "graphs": [NAME],
            "arch": matching("a GPU architecture such as sm80", r"sm[1-9][0-9]{1,2}"),
            "compatibility": matching("none, ampere+ or same-cc", r"none|ampere\+|same-cc"),
            "library": matching("tensorrt or tensorrt_rtx", "tensorrt(_rtx)?"),
            "version": TEXT,
        }
    ],
    "files": [{"path": NAME, "size": whole(0, 2**63 - 1), "sha256": SHA256}],
    "model": {"name": TEXT, "config": {...: ANYTHING}, "weights_sha256": SHA256, "trained": FLAG},
    "sampling": SAMPLING_RULES,
    "words": [TEXT],
    "versions": {...: TEXT},
    "provenance": {"note": TEXT, "command": TEXT, ...: ANYTHING},
    "signatures": {...: ANYTHING},
    "loop": {"block_order": {"raster_index": [ANYTHING], ...: ANYTHING}, ...: ANYTHING},
}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_symlink(path: Path) -> None:
    """Raise BundleError if a file of a bundle is a symbolic link.

    A link could lead anywhere, and the runtimes refuse weights outside the bundle's folder. The error's message has the
    command that copies the bundle to plain files.
    """
    if not path.is_symlink():
        return
    name, where = path.parent.absolute().name, ""
    for folder in path.parent.absolute().parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):  # the cache of huggingface_hub
            name, where = folder.parent.name.split("--")[-1], " in the cache of the Hugging Face Hub"
    copy = command_line("cp", "-rL", path.parent, Path("." if path.parent.name else "..", f"{name}-bundle"))
    raise BundleError(f"{path} is a symbolic link{where}, but a bundle needs plain files: copy it with `{copy}`")


def refuse_non_utf8(path: Path) -> None:
    """Raise BundleError if the path of a bundle's folder is not valid UTF-8, because the runtimes cannot open it."""
    if not is_utf8(path):
        raise BundleError(
            f"{path} is not UTF-8, which the runtimes need in the name of a bundle's folder: {utf8_advice('rename it')}"
        )


@dataclass(frozen=True)
class File:
    """One file of a bundle.

    Attributes:
        path: its name in the bundle's folder.
        size: in bytes.
        sha256: hexadecimal digits.
    """

    path: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Return the entry of an existing file."""
        return cls(path.name, path.stat().st_size, sha256(path))

    def verify(self, folder: Path) -> None:
        """Raise BundleError unless the folder has a plain file of this name, size and hash."""
        path = folder / self.path
        refuse_symlink(path)
        if not path.is_file():
            raise BundleError(f"{path} is missing: export the bundle again")
        if path.stat().st_size != self.size or sha256(path) != self.sha256:
            raise BundleError(f"{path} is not the file that {MANIFEST} describes: export the bundle again")


@dataclass(frozen=True)
class Engine:
    """A TensorRT engine, which was built from one graph file.

    Attributes:
        file: its file name in the bundle.
        graphs: names of the graphs that it computes. Each has an optimisation profile, in this order.
        arch: the GPU architecture that it was built for, such as `sm80`.
        compatibility: the other GPUs that it may run on: `none`, `ampere+` or `same-cc`.
        library: the Python module that built it and has to run it, `tensorrt` or `tensorrt_rtx`.
        version: version of the library that built it. It has to run it in the same version.
    """

    file: str
    graphs: tuple[str, ...]
    arch: str
    compatibility: str
    library: str
    version: str


def _check_schema(data: Any) -> None:
    """Raise BundleError, with the command that exports the bundle again, if the manifest has another schema version."""
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema == SCHEMA or type(schema) is not int:
        return
    value = data.get("provenance")
    provenance = value if isinstance(value, dict) else {}
    command = next(
        (
            f"`{provenance[key]}`" if key == "command" else f"`nbp-export` from its model ({provenance[key]})"
            for key in ("command", "note")
            if TEXT.test(provenance.get(key)) and provenance[key]
        ),
        "`nbp-export`",
    )
    raise BundleError(
        f"manifest.schema is {schema}, but this version reads {SCHEMA}: export the bundle again with {command}"
    )


def _same(derived: object, written: object) -> bool:
    """Return whether two values are the same JSON, where 1, 1.0 and true differ.

    The recursion goes no deeper than `derived`, whatever the file contains.
    """
    if isinstance(derived, dict) and isinstance(written, dict):
        return derived.keys() == written.keys() and all(_same(value, written[key]) for key, value in derived.items())
    if isinstance(derived, list | tuple) and isinstance(written, list):
        return len(derived) == len(written) and all(map(_same, derived, written))
    return (isinstance(derived, str) or type(derived) is type(written)) and derived == written


@dataclass(frozen=True)
class Manifest:
    """The description of a bundle. The file also has what follows from it: the graphs' signatures and the loop.

    Attributes:
        schema: version of the bundle format.
        runtime: name of the runtime that the bundle was made for. ONNX Runtime can run its ONNX graphs in any case.
        spec: all static numbers, from which the graphs' inputs and outputs follow.
        graphs: graph name → file name.
        engines: the TensorRT engines that were built from the graphs, if any.
        files: every file except the manifest and the receipt.
        model: `name`, `config` and `weights_sha256` of the exported model, and whether it was `trained`.
        sampling: the default sampling settings.
        words: the word of each text id if a class-conditional model has its own words; else empty.
        versions: versions of the tools that made the bundle.
        provenance: `command`, which made the bundle and is empty if it was exported from Python; `note`, one line that
            says what model it is; `status`, what was executed before.
    """

    schema: int
    runtime: str
    spec: SystemSpec
    graphs: dict[str, str]
    engines: tuple[Engine, ...]
    files: tuple[File, ...]
    model: dict[str, Any]
    sampling: Sampling
    words: tuple[str, ...]
    versions: dict[str, str]
    provenance: dict[str, Any]

    def graph_specs(self) -> dict[str, GraphSpec]:
        """Return the specs of the graphs that the bundle has, by name."""
        specs = self.spec.graphs()
        return {name: specs[name] for name in self.graphs}

    @property
    def origin(self) -> str:
        """The command that made the bundle, as a clause for messages that ask to export it again."""
        command = self.provenance["command"]
        return f"it was made by `{command}`" if command else "it was made by `nbp_export.onnx_bundle.export` in Python"

    def buffers(self) -> dict[str, int]:
        """Return the bytes that a session allocates for `states`, `inputs` and `outputs`.

        All graphs share one set of states. `inputs` are the arguments of all graphs, `outputs` their results that do
        not share the memory of a state.
        """
        graphs = self.graph_specs().values()
        tensors = {
            "states": {t.name: t for graph in graphs for t in graph.state_tensors()}.values(),
            "inputs": [t for graph in graphs for t in graph.arguments()],
            "outputs": [t for graph in graphs for t in graph.results()],
        }
        return {use: sum(t.nbytes for t in group) for use, group in tensors.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the file's values, including the sections `signatures` and `loop` that follow from the spec."""
        return asdict(self) | {"signatures": self._signatures(), "loop": loop_of(self.spec)}

    def _signatures(self) -> dict[str, Any]:
        return {name: asdict(graph) for name, graph in self.graph_specs().items()}

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Build a manifest from the values of `to_json`.

        Raises BundleError, with the name of the field, for wrong values and for values that contradict each other.
        """
        _check_schema(data)
        check(data, MANIFEST_RULES, "manifest")
        converted: dict[str, Any] = {
            "spec": SystemSpec.from_json(data["spec"]),
            "engines": tuple(Engine(**engine | {"graphs": tuple(engine["graphs"])}) for engine in data["engines"]),
            "files": tuple(File(**file) for file in data["files"]),
            "sampling": Sampling(**data["sampling"]),
            "words": tuple(data["words"]),
        }
        manifest = cls(**{name: converted.get(name, value) for name, value in data.items() if name not in DERIVED})
        for contradiction in manifest._contradictions(data["signatures"], data["loop"]):
            raise BundleError(contradiction)
        return manifest

    def _contradictions(self, signatures: object, loop: dict[str, Any]) -> Iterator[str]:
        """Yield a message for each contradiction between the values.

        Each check relies on those before it, so only the first message is certain to be right.
        """
        spec = self.spec
        sides = (*spec.latent, spec.condition_latents)
        if any(side % b for side, b in zip(sides, (*spec.block, spec.block[0]), strict=True)):
            yield f"block {spec.block} does not tile latent {spec.latent} with {spec.condition_latents} given frames"
        if spec.condition_latents >= spec.latent[0] or spec.condition_frames >= max(1, spec.video[0]):
            yield "the given frames are the whole clip, which leaves nothing to predict"
        if spec.vocab <= spec.code_shift:
            yield f"{spec.code_shift} of {spec.vocab} token ids are special or text ids, which leaves none for video"
        if self.words and len(self.words) != spec.text_vocab:
            yield f"there are {len(self.words)} words for {spec.text_vocab} text ids"
        # Some file systems ignore case, so names that differ only in case count as equal.
        names = Counter(name.casefold() for name in (MANIFEST, RECEIPT, *(file.path for file in self.files)))
        if repeated := [name for name, times in names.items() if times > 1]:
            yield f"files {repeated} are listed twice, not counting differences between upper and lower case"
        required, optional = spec.generator_graphs(), spec.tokenizer_graphs()
        if wrong := required.keys() - self.graphs.keys() | self.graphs.keys() - required.keys() - optional.keys():
            yield f"graphs {sorted(wrong)} are missing or unknown: {[*required]} are required, {[*optional]} optional"
        listed = {file.path for file in self.files}
        if unlisted := set(self.graphs.values()) - listed:
            yield f"graphs {sorted(unlisted)} are not among its files"
        if unlisted := {engine.file for engine in self.engines} - listed:
            yield f"TensorRT engines {sorted(unlisted)} are not among its files"
        for graph in self.graph_specs().values():
            for tensor in (*graph.inputs, *graph.outputs):
                if min(tensor.shape) < 1:
                    yield f"{tensor.name} of {graph.name} would have the empty shape {list(tensor.shape)}"
        if (size := sum(self.buffers().values())) > MAX_BUFFERS:
            yield f"its buffers would need {size:,} bytes"
        built = Counter(graph for engine in self.engines for graph in engine.graphs)
        if built and built != Counter(self.graphs.keys()):
            yield f"its TensorRT engines have the graphs {sorted(built.elements())}, not {sorted(self.graphs)}"
        if not _same(self._signatures(), signatures):
            yield "the signatures do not follow from the spec"
        # The length is compared first because the spec may describe a clip whose block order does not fit in memory.
        if len(loop["block_order"]["raster_index"]) != spec.clip_tokens or not _same(loop_of(spec), loop):
            yield "the loop does not follow from the spec"
