"""A bundle on disk: a folder with `manifest.json`, `receipt.json`, the graphs and their weights.

The manifest says what the folder holds, file by file with hashes; the receipt is the proof that the graphs agree
with the reference, void as soon as any file is another. `docs/bundle.md` describes the whole folder.
"""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nbp_engines.errors import BundleError, ReceiptWarning
from nbp_engines.manifest import MANIFEST, RECEIPT, Manifest, refuse_folder, refuse_link
from nbp_engines.shell import command_line
from nbp_engines.strict import ANYTHING, FROM_0, TEXT, Rule, check, loads
from nbp_errors import printable

__all__ = ["MANIFEST", "RECEIPT", "Bundle"]

CHECK_RULES: Rule = {"graph": TEXT, "at": TEXT, "tolerance": FROM_0, "worst": FROM_0, "where": TEXT}
RECEIPT_RULES: Rule = {
    "files": ANYTHING,
    "executed": TEXT,
    "worst": CHECK_RULES,
    "checks": [CHECK_RULES],
    "versions": {...: TEXT},
    ...: ANYTHING,
}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, its files checked against the manifest.

    Attributes:
        path: the folder.
        manifest: what it says.
        manifest_sha256: of the manifest's file as it was read, which the receipt vouches for.
    """

    path: Path
    manifest: Manifest
    manifest_sha256: str

    @classmethod
    def of(cls, path: Path, content: bytes) -> Self:
        """The bundle in a folder that a manifest's content describes, its files unchecked.

        Raises BundleError, naming the place, for whatever is wrong with the manifest.
        """
        try:
            manifest = Manifest.from_json(loads(content))
        except BundleError as error:
            raise BundleError(f"{path / MANIFEST}: {error.message}") from error
        return cls(path, manifest, hashlib.sha256(content).hexdigest())

    @classmethod
    def open(cls, path: Path, require_receipt: bool = False) -> Self:
        """Read the manifest, check every file's size and hash, and look for the receipt.

        Raises BundleError, naming the file and what is wrong with it. Without a valid receipt it gives a
        ReceiptWarning, or raises BundleError if one is required.
        """
        text = path / MANIFEST
        try:
            if not text.is_file():
                raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}. Make one with `nbp-export onnx`")
            refuse_link(text)
            refuse_folder(path)
            bundle = cls.of(path, text.read_bytes())
            for file in bundle.manifest.files:
                file.verify(path)
        except OSError as error:
            raise BundleError(f"{error.filename} cannot be read: {error.strerror}") from error
        bundle.prove(require_receipt)
        return bundle

    def prove(self, required: bool = True) -> None:
        """Raise BundleError, or only give a ReceiptWarning where none is required, unless the receipt is valid."""
        if self.receipt() is None:
            again = command_line("nbp-export", "verify", self.path)
            problem = printable(f"{self.path} has no valid receipt: `{again}` proves it again")
            if required:
                raise BundleError(problem)
            warnings.warn(problem, ReceiptWarning, stacklevel=3)

    def graph_file(self, name: str) -> Path:
        """The file of a graph."""
        return self.path / self.manifest.graphs[name]

    def hashes(self) -> dict[str, str]:
        """File name → hash of everything that a receipt vouches for, the manifest included."""
        return {f.path: f.sha256 for f in self.manifest.files} | {MANIFEST: self.manifest_sha256}

    def receipt(self) -> dict[str, Any] | None:
        """The proof of parity, or None: there is none, it is about other files, or it does not prove every graph."""
        path = self.path / RECEIPT
        try:
            receipt: dict[str, Any] = loads(b"" if path.is_symlink() else path.read_bytes())
            check(receipt, RECEIPT_RULES, RECEIPT)
        except (OSError, BundleError):
            return None
        checks = receipt["checks"]
        proven = {c["graph"] for c in checks} >= self.manifest.graphs.keys()
        passed = all(c["worst"] <= c["tolerance"] for c in checks)
        return receipt if receipt["files"] == self.hashes() and proven and passed else None
