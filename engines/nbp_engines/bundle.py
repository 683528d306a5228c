"""A bundle on disk: a folder with `manifest.json`, `receipt.json`, the graphs and their weights.

The manifest says what the folder holds, file by file with hashes; the receipt is the proof that the graphs agree
with the reference, void as soon as any file is another.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from nbp_engines.errors import BundleError
from nbp_engines.sampling import Sampling
from nbp_engines.spec import GraphSpec, SystemSpec

SCHEMA = 1
MANIFEST = "manifest.json"
RECEIPT = "receipt.json"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


@dataclass(frozen=True)
class Manifest:
    """What a bundle is.

    Attributes:
        schema: version of this layout.
        runtime: the kind of session that runs it, `onnx`.
        spec: all static numbers; the graphs' inputs and outputs follow from it.
        graphs: graph name → file name.
        files: every file but the manifest and the receipt.
        model: name, config and weights hash of what was exported.
        sampling: the defaults to generate with.
        versions: of the tools that made it.
        provenance: the command that made it, and whatever a reader must know.
    """

    schema: int
    runtime: str
    spec: SystemSpec
    graphs: dict[str, str]
    files: tuple[File, ...]
    model: dict[str, Any]
    sampling: Sampling
    versions: dict[str, str]
    provenance: dict[str, Any]

    def graph_specs(self) -> dict[str, GraphSpec]:
        """Inputs and outputs of the graphs that the bundle has."""
        known = self.spec.generator_graphs() | self.spec.tokenizer_graphs()
        return {name: known[name] for name in self.graphs}

    def to_json(self) -> dict[str, Any]:
        """Plain values; the graphs' inputs and outputs are spelled out for readers without this package."""
        signatures = {name: asdict(graph) for name, graph in self.graph_specs().items()}
        return asdict(self) | {"signatures": signatures}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Build from `to_json`'s values; raises BundleError for another schema, a missing name or a wrong kind."""
        if not isinstance(data, Mapping):
            raise BundleError(f"a manifest is an object, not {data!r}")
        if data.get("schema") != SCHEMA:
            raise BundleError(f"schema {data.get('schema')!r}, this version reads {SCHEMA}: export it again")
        try:
            manifest = cls(
                **{k: v for k, v in data.items() if k != "signatures"}
                | {
                    "spec": SystemSpec.from_json(data["spec"]),
                    "graphs": {name: str(file) for name, file in data["graphs"].items()},
                    "files": tuple(File(**f | {"path": str(f["path"])}) for f in data["files"]),
                    "sampling": Sampling(**data["sampling"]),
                }
            )
            signed = json.loads(json.dumps({name: asdict(g) for name, g in manifest.graph_specs().items()}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{type(error).__name__}: {error}") from error
        if signed != data.get("signatures"):
            raise BundleError("the signatures do not follow from the spec")
        return manifest


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, its files checked against the manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the manifest and check every file's size and hash.

        Raises BundleError, naming the file and what is wrong with it.
        """
        text = path / MANIFEST
        if not text.is_file():
            raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}. Make one with `nbp-export onnx`")
        try:
            manifest = Manifest.from_json(json.loads(text.read_bytes()))
        except (BundleError, ValueError) as error:
            raise BundleError(f"{text}: {getattr(error, 'message', error)}") from error
        for file in manifest.files:
            target = path / file.path
            if Path(file.path).name != file.path or target.is_symlink():
                raise BundleError(f"{text}: {file.path!r} is not a plain file of the bundle")
            if not target.is_file():
                raise BundleError(f"{target} is missing: export the bundle again")
            if target.stat().st_size != file.size or sha256(target) != file.sha256:
                raise BundleError(f"{target} is not the file that {MANIFEST} describes: export the bundle again")
        unlisted = set(manifest.graphs.values()) - {f.path for f in manifest.files}
        if unlisted:
            raise BundleError(f"{text}: graphs {sorted(unlisted)} are not among its files")
        return cls(path, manifest)

    def graph_file(self, name: str) -> Path:
        """The file of a graph."""
        return self.path / self.manifest.graphs[name]

    def hashes(self) -> dict[str, str]:
        """File name → hash of everything that a receipt vouches for, the manifest included."""
        return {f.path: f.sha256 for f in self.manifest.files} | {MANIFEST: sha256(self.path / MANIFEST)}

    def receipt(self) -> dict[str, Any] | None:
        """The proof of parity, or None if there is none or it was made for other files."""
        try:
            receipt = json.loads((self.path / RECEIPT).read_bytes())
        except (OSError, ValueError):
            return None
        return receipt if isinstance(receipt, dict) and receipt.get("files") == self.hashes() else None
