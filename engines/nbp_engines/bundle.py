"""A bundle on disk: a folder with `manifest.json`, `receipt.json`, the graphs and their weights.

The manifest lists what the folder holds, with a hash of each file. The receipt is the result of the proof that the
graphs agree with the reference. It is void as soon as any file changes. `docs/bundle.md` describes the whole folder.
"""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nbp_engines.errors import BundleError, ReceiptWarning
from nbp_engines.manifest import MANIFEST, RECEIPT, Manifest, refuse_non_utf8, refuse_symlink
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
    """An opened bundle.

    Attributes:
        path: the folder.
        manifest: the content of its `manifest.json`.
        manifest_sha256: SHA-256 of that file as it was read. A valid receipt has the same hash.
    """

    path: Path
    manifest: Manifest
    manifest_sha256: str

    @classmethod
    def of(cls, path: Path, content: bytes) -> Self:
        """Return a bundle from the content of its manifest, without checking its files.

        Raises BundleError, with the name of the field, for anything that is wrong in the manifest.
        """
        try:
            manifest = Manifest.from_json(loads(content))
        except BundleError as error:
            raise BundleError(f"{path / MANIFEST}: {error.message}") from error
        return cls(path, manifest, hashlib.sha256(content).hexdigest())

    @classmethod
    def open(cls, path: Path, require_receipt: bool = False) -> Self:
        """Read the manifest, check the size and hash of every file, and check the receipt.

        Args:
            path: the bundle's folder.
            require_receipt: whether a bundle without a valid receipt is an error. Otherwise it gives a ReceiptWarning.

        Raises BundleError, with the file's name, if a file is missing, wrong or cannot be read.
        """
        manifest_file = path / MANIFEST
        try:
            if not manifest_file.is_file():
                raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}. Make one with `nbp-export onnx`")
            refuse_symlink(manifest_file)
            refuse_non_utf8(path)
            bundle = cls.of(path, manifest_file.read_bytes())
            for file in bundle.manifest.files:
                file.verify(path)
        except OSError as error:
            raise BundleError(f"{error.filename} cannot be read: {error.strerror}") from error
        bundle.check_receipt(require_receipt)
        return bundle

    def check_receipt(self, required: bool = True) -> None:
        """Raise BundleError if the bundle has no valid receipt, or only give a ReceiptWarning if none is required."""
        if self.receipt() is None:
            command = command_line("nbp-export", "verify", self.path)
            problem = printable(f"{self.path} has no valid receipt: `{command}` proves it again")
            if required:
                raise BundleError(problem)
            warnings.warn(problem, ReceiptWarning, stacklevel=3)

    def graph_file(self, name: str) -> Path:
        """Return the path of the ONNX file of a graph."""
        return self.path / self.manifest.graphs[name]

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of every file except the receipt, by file name, as a receipt lists them."""
        return {f.path: f.sha256 for f in self.manifest.files} | {MANIFEST: self.manifest_sha256}

    def receipt(self) -> dict[str, Any] | None:
        """Return the content of a valid receipt, or None.

        A receipt is valid if its hashes are those of the bundle's files, if it has checks of every graph of the bundle,
        and if all checks passed.
        """
        path = self.path / RECEIPT
        try:
            receipt: dict[str, Any] = loads(b"" if path.is_symlink() else path.read_bytes())
            check(receipt, RECEIPT_RULES, RECEIPT)
        except (OSError, BundleError):
            return None
        checks = receipt["checks"]
        complete = {c["graph"] for c in checks} >= self.manifest.graphs.keys()
        passed = all(c["worst"] <= c["tolerance"] for c in checks)
        return receipt if receipt["files"] == self.hashes() and complete and passed else None
