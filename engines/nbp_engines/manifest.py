"""What `manifest.json` says of a bundle, and the rules that it has to keep before anything is made of it."""

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
from nbp_engines.shell import command_line, is_utf8, utf8_cure
from nbp_engines.spec import GraphSpec, SystemSpec
from nbp_engines.strict import ANYTHING, FLAG, FROM_0, TEXT, Rule, check, matching, number, whole

SCHEMA = 4
MANIFEST = "manifest.json"
RECEIPT = "receipt.json"
MAX_BUFFERS = 2**40  # bytes: no machine has them, and no model of the paper comes near
DERIVED = ("signatures", "loop")  # what the manifest spells out for readers without this package

DIMENSION = whole(1, 2**31 - 1)
# Whatever means one file, in the bundle's own folder, on every system.
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
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_link(path: Path) -> None:
    """Raise BundleError, with the command that makes a copy of plain files, if a file of a bundle is a symbolic link.

    It could lead anywhere, and the runtimes refuse weights that lie outside of the bundle's folder.
    """
    if not path.is_symlink():
        return
    name, where = path.parent.absolute().name, ""
    for folder in path.parent.absolute().parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):  # the cache of huggingface_hub
            name, where = folder.parent.name.split("--")[-1], ", as in the cache of the Hugging Face Hub"
    copy = command_line("cp", "-rL", path.parent, Path("." if path.parent.name else "..", f"{name}-bundle"))
    raise BundleError(
        f"{path} is a symbolic link{where}, not a plain file of the bundle: `{copy}` makes a bundle of plain files"
    )


def refuse_folder(path: Path) -> None:
    """Raise BundleError if a bundle's folder has a name that the runtimes cannot open: they take UTF-8 alone."""
    if not is_utf8(path):
        raise BundleError(
            f"{path} is not UTF-8, which the runtimes need in the name of a bundle's folder: {utf8_cure('rename it')}"
        )


@dataclass(frozen=True)
class File:
    """One file of a bundle."""

    path: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Measure a file."""
        return cls(path.name, path.stat().st_size, sha256(path))

    def verify(self, folder: Path) -> None:
        """Raise BundleError unless the folder has this very file."""
        path = folder / self.path
        refuse_link(path)
        if not path.is_file():
            raise BundleError(f"{path} is missing: export the bundle again")
        if path.stat().st_size != self.size or sha256(path) != self.sha256:
            raise BundleError(f"{path} is not the file that {MANIFEST} describes: export the bundle again")


@dataclass(frozen=True)
class Engine:
    """What TensorRT built from one graph file.

    Attributes:
        file: in the bundle.
        graphs: graph names, an optimisation profile each, in this order.
        arch: the GPU architecture, `sm80`.
        compatibility: the GPUs that it may run on besides: `none`, `ampere+` or `same-cc`.
        library: the Python module that built it, `tensorrt` or `tensorrt_rtx`, and that has to run it.
        version: of the library; no other will do.
    """

    file: str
    graphs: tuple[str, ...]
    arch: str
    compatibility: str
    library: str
    version: str


def _check_schema(data: Any) -> None:
    """Raise BundleError, with the command that makes the bundle again, for a manifest of another version."""
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema == SCHEMA or type(schema) is not int:
        return
    provenance = data.get("provenance")
    known = provenance if isinstance(provenance, dict) else {}
    again = next(
        (
            f"`{known[key]}`" if key == "command" else f"`nbp-export` from its model ({known[key]})"
            for key in ("command", "note")
            if TEXT.test(known.get(key)) and known[key]
        ),
        "`nbp-export`",
    )
    raise BundleError(f"manifest.schema is {schema}, this version reads {SCHEMA}: export it again with {again}")


def _same(derived: object, written: object) -> bool:
    """Whether values are the same JSON, in which 1, 1.0 and true are three; it looks no deeper than `derived` goes."""
    if isinstance(derived, dict) and isinstance(written, dict):
        return derived.keys() == written.keys() and all(_same(value, written[key]) for key, value in derived.items())
    if isinstance(derived, list | tuple) and isinstance(written, list):
        return len(derived) == len(written) and all(map(_same, derived, written))
    return (isinstance(derived, str) or type(derived) is type(written)) and derived == written


@dataclass(frozen=True)
class Manifest:
    """What a bundle is. The file also spells out what follows from it, the graphs' signatures and the loop.

    Attributes:
        schema: version of this layout.
        runtime: the name of the runtime that it was made for; its ONNX graphs run in ONNX Runtime whichever it is.
        spec: all static numbers; the graphs' inputs and outputs follow from it.
        graphs: graph name → file name.
        engines: built from those graphs.
        files: every file but the manifest and the receipt.
        model: name, config and weights hash of what was exported.
        sampling: the defaults to generate with.
        words: the text word of each id, where a class-conditional model brings its own; else empty.
        versions: of the tools that made it.
        provenance: the command that made it, empty for a model that was handed over in Python, and what a reader must
            know.
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
        """Inputs and outputs of the graphs that the bundle has."""
        known = self.spec.graphs()
        return {name: known[name] for name in self.graphs}

    @property
    def made(self) -> str:
        """How the bundle was made, as a clause for messages that ask to make it again."""
        command = self.provenance["command"]
        return f"it was made by `{command}`" if command else "it was made by `nbp_export.onnx_bundle.export` in Python"

    def buffers(self) -> dict[str, int]:
        """Bytes that a session allocates for `states`, one set for all graphs, and each graph's `inputs`, `outputs`."""
        graphs = self.graph_specs().values()
        tensors = {
            "states": {t.name: t for graph in graphs for t in graph.state_tensors()}.values(),
            "inputs": [t for graph in graphs for t in graph.arguments()],
            "outputs": [t for graph in graphs for t in graph.results()],
        }
        return {use: sum(t.nbytes for t in those) for use, those in tensors.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain values; the graphs' inputs and outputs, and the loop, are spelled out for other languages."""
        return asdict(self) | {"signatures": self._signatures(), "loop": loop_of(self.spec)}

    def _signatures(self) -> dict[str, Any]:
        return {name: asdict(graph) for name, graph in self.graph_specs().items()}

    def to_bytes(self) -> bytes:
        """The file's content."""
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Build from `to_json`'s values; raises BundleError, naming the place, for any that are wrong or impossible."""
        _check_schema(data)
        check(data, MANIFEST_RULES, "manifest")
        made: dict[str, Any] = {
            "spec": SystemSpec.from_json(data["spec"]),
            "engines": tuple(Engine(**engine | {"graphs": tuple(engine["graphs"])}) for engine in data["engines"]),
            "files": tuple(File(**file) for file in data["files"]),
            "sampling": Sampling(**data["sampling"]),
            "words": tuple(data["words"]),
        }
        manifest = cls(**{name: made.get(name, value) for name, value in data.items() if name not in DERIVED})
        for contradiction in manifest._contradictions(data["signatures"], data["loop"]):
            raise BundleError(contradiction)
        return manifest

    def _contradictions(self, signatures: object, loop: dict[str, Any]) -> Iterator[str]:
        """What cannot all be true together; each presumes that there are none before it."""
        spec = self.spec
        sides = (*spec.latent, spec.condition_latents)
        if any(side % b for side, b in zip(sides, (*spec.block, spec.block[0]), strict=True)):
            yield f"block {spec.block} does not tile the latent {spec.latent}, {spec.condition_latents} frames given"
        if spec.condition_latents >= spec.latent[0] or spec.condition_frames >= max(1, spec.video[0]):
            yield "the given frames are the whole clip: there is nothing to predict"
        if spec.vocab <= spec.code_shift:
            yield f"of {spec.vocab} token ids {spec.code_shift} are special or text, which leaves none for the video"
        if self.words and len(self.words) != spec.text_vocab:
            yield f"there are {len(self.words)} words for {spec.text_vocab} text ids"
        names = Counter(name.casefold() for name in (MANIFEST, RECEIPT, *(file.path for file in self.files)))
        if twice := [name for name, times in names.items() if times > 1]:
            yield f"files {twice} are there twice, where upper case is lower case"
        due, extra = spec.generator_graphs(), spec.tokenizer_graphs()
        if odd := due.keys() - self.graphs.keys() | self.graphs.keys() - due.keys() - extra.keys():
            yield f"graphs {sorted(odd)} are missing, or mean nothing: {[*due]} are due, {[*extra]} may be"
        present = {file.path for file in self.files}
        if unlisted := set(self.graphs.values()) - present:
            yield f"graphs {sorted(unlisted)} are not among its files"
        if unlisted := {engine.file for engine in self.engines} - present:
            yield f"engines {sorted(unlisted)} are not among its files"
        for graph in self.graph_specs().values():
            for tensor in (*graph.inputs, *graph.outputs):
                if min(tensor.shape) < 1:
                    yield f"{tensor.name} of {graph.name} would be {list(tensor.shape)}"
        if (size := sum(self.buffers().values())) > MAX_BUFFERS:
            yield f"its buffers would be {size:,} bytes"
        built = Counter(graph for engine in self.engines for graph in engine.graphs)
        if built and built != Counter(self.graphs.keys()):
            yield f"engines hold the graphs {sorted(built.elements())}, where {sorted(self.graphs)} are due"
        if not _same(self._signatures(), signatures):
            yield "the signatures do not follow from the spec"
        # The lengths first: a clip of the size that the spec says might fit no memory.
        if len(loop["block_order"]["raster_index"]) != spec.clip_tokens or not _same(loop_of(spec), loop):
            yield "the loop does not follow from the spec"
