"""Opening bundles: whatever is not exactly what the manifest describes is refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbp_engines.bundle import MANIFEST, RECEIPT, SCHEMA, Bundle, File, Manifest
from nbp_engines.errors import BundleError, EngineError
from nbp_engines.sampling import Sampling
from nbp_engines.session import open_session
from nbp_engines.spec import SystemSpec

SPEC = SystemSpec(
    block=(1, 1, 4),
    latent=(3, 4, 4),
    condition_latents=1,
    video=(9, 16, 16),
    condition_frames=1,
    batch=1,
    dtype="fp32",
    layers=2,
    heads=2,
    head_dim=8,
    vocab=30,
)


def make(path: Path, runtime: str = "onnx") -> Path:
    """An intact bundle as far as the files go; no runtime could run its graphs."""
    path.mkdir()
    for name in ("prefill.onnx", "step.onnx", "generator.data"):
        (path / name).write_bytes(name.encode() * 100)
    manifest = Manifest(
        schema=SCHEMA,
        runtime=runtime,
        spec=SPEC,
        graphs={"prefill": "prefill.onnx", "step": "step.onnx"},
        files=tuple(File.of(file) for file in sorted(path.iterdir())),
        model={"name": "toy", "config": {}},
        sampling=Sampling(top_k=20),
        versions={"torch": "2.0"},
        provenance={"note": "made by a test"},
    )
    (path / MANIFEST).write_text(json.dumps(manifest.to_json()))
    (path / RECEIPT).write_text(json.dumps({"files": Bundle.open(path).hashes(), "worst": 1e-6}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "toy-1x1x4-fp32")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, as somebody with an editor would."""
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def test_manifest_round_trip(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.spec == SPEC
    assert manifest.sampling == Sampling(top_k=20)
    assert manifest.provenance == {"note": "made by a test"}


def test_the_manifest_spells_out_the_signatures(folder: Path) -> None:
    signatures = json.loads((folder / MANIFEST).read_text())["signatures"]
    assert set(signatures) == {"prefill", "step"}
    assert signatures["step"]["inputs"][0] == {"name": "tokens", "dtype": "int64", "shape": [1, 4]}
    assert signatures["step"]["outputs"][1] == {"name": "k_cache_0_out", "dtype": "fp32", "shape": [1, 2, 44, 8]}


def test_graph_files_are_found_by_name(folder: Path) -> None:
    assert Bundle.open(folder).graph_file("step") == folder / "step.onnx"


def refused(folder: Path, *names: str) -> None:
    """Opening raises a BundleError that has all the names in it."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    for name in names:
        assert name in caught.value.message


def test_no_bundle(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), MANIFEST, "nbp-export onnx")
    refused(tmp_path / "nowhere", "nowhere", MANIFEST)


@pytest.mark.parametrize("name", ["prefill.onnx", "step.onnx", "generator.data"])
@pytest.mark.parametrize("where", [0, -1])
def test_one_flipped_bit(folder: Path, name: str, where: int) -> None:
    content = bytearray((folder / name).read_bytes())
    content[where] ^= 1
    (folder / name).write_bytes(content)
    refused(folder, name, "export the bundle again")


def test_a_longer_file(folder: Path) -> None:
    with (folder / "step.onnx").open("ab") as file:
        file.write(b"\0")
    refused(folder, "step.onnx", MANIFEST)


def test_a_missing_file(folder: Path) -> None:
    (folder / "generator.data").unlink()
    refused(folder, "generator.data", "missing")


def test_a_symbolic_link_even_to_the_same_content(folder: Path) -> None:
    (folder / "step.onnx").rename(folder.parent / "step.onnx")
    (folder / "step.onnx").symlink_to(folder.parent / "step.onnx")
    refused(folder, "step.onnx", "plain file")


@pytest.mark.parametrize("path", ["../outside.data", "sub/inside.data", "/", ".", "..", ""])
def test_a_path_that_leads_elsewhere(folder: Path, path: str) -> None:
    (folder / "sub").mkdir()
    for place in (folder.parent / "outside.data", folder / "sub" / "inside.data"):
        shutil.copy(folder / "generator.data", place)
    edit(folder, lambda data: data["files"][0].update(path=path))
    refused(folder, str(folder))


def test_an_absolute_path(folder: Path) -> None:
    edit(folder, lambda data: data["files"][0].update(path=str(folder / "generator.data")))
    refused(folder, "plain file")


@pytest.mark.parametrize("schema", [0, SCHEMA + 1, str(SCHEMA), None])
def test_another_schema(folder: Path, schema: object) -> None:
    edit(folder, lambda data: data.update(schema=schema))
    refused(folder, MANIFEST, f"schema {schema!r}", "export it again")


def test_a_graph_that_is_not_among_the_files(folder: Path) -> None:
    shutil.copy(folder / "step.onnx", folder / "other.onnx")
    edit(folder, lambda data: data["graphs"].update(step="other.onnx"))
    refused(folder, MANIFEST, "other.onnx")


def test_a_graph_that_nobody_knows(folder: Path) -> None:
    edit(folder, lambda data: data["graphs"].update(dream="step.onnx"))
    refused(folder, MANIFEST, "dream")


def test_signatures_that_contradict_the_spec(folder: Path) -> None:
    edit(folder, lambda data: data["spec"].update(vocab=31))
    refused(folder, MANIFEST, "signatures")


@pytest.mark.parametrize("name", [field.name for field in fields(Manifest)])
def test_a_missing_name(folder: Path, name: str) -> None:
    edit(folder, lambda data: data.pop(name))
    refused(folder, MANIFEST, name)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"not json", b"[]", b"null", b'"text"', b"3", b'{"schema": 1}']
)
def test_a_manifest_that_is_no_manifest(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    refused(folder, str(folder / MANIFEST))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.text("./abx", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_a_manifest_with_any_value_in_any_place_opens_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = make(tmp_path_factory.mktemp("fuzz") / "toy")
    manifest = json.loads((folder / MANIFEST).read_text())
    place = manifest
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
        if not (isinstance(place[key], dict | list) and place[key]) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with suppress(BundleError):  # anything else fails the test
        Bundle.open(folder)
    shutil.rmtree(folder)


def test_the_receipt_is_valid_until_the_manifest_changes(folder: Path) -> None:
    receipt = Bundle.open(folder).receipt()
    assert receipt is not None
    assert receipt["worst"] == 1e-6
    edit(folder, lambda data: data["provenance"].update(note="something else"))
    assert Bundle.open(folder).receipt() is None


@pytest.mark.parametrize("name", ["prefill.onnx", "step.onnx", "generator.data"])
def test_the_receipt_is_void_once_a_file_changes_even_with_the_manifest_mended(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"other")
    files = [asdict(File.of(folder / n)) for n in ("generator.data", "prefill.onnx", "step.onnx")]
    edit(folder, lambda data: data.update(files=files))
    assert Bundle.open(folder).receipt() is None


def test_the_receipt_is_void_once_the_bundle_has_another_file(folder: Path) -> None:
    (folder / "more.data").write_bytes(b"more")
    edit(folder, lambda data: data["files"].append(asdict(File.of(folder / "more.data"))))
    assert Bundle.open(folder).receipt() is None


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"null", b"{}", b'{"files": {}}', b"\xff"])
def test_no_receipt(folder: Path, content: bytes | None) -> None:
    (folder / RECEIPT).unlink()
    if content is not None:
        (folder / RECEIPT).write_bytes(content)
    assert Bundle.open(folder).receipt() is None


def test_a_bundle_can_move(folder: Path, tmp_path: Path) -> None:
    before = Bundle.open(folder)
    assert str(folder.parent) not in (folder / MANIFEST).read_text() + (folder / RECEIPT).read_text()
    moved = folder.rename(tmp_path / "elsewhere")
    after = Bundle.open(moved)
    assert after.manifest == before.manifest
    assert after.receipt() is not None


def test_a_bundle_opens_read_only_and_is_left_as_it_was(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path.name: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    try:
        if os.geteuid() != 0:  # root may write anywhere
            with pytest.raises(PermissionError):
                (folder / "new").touch()
        assert Bundle.open(folder).receipt() is not None
        assert {path.name: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before
    finally:
        folder.chmod(0o755)


def test_a_runtime_that_this_version_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="'abacus'"):
        open_session(make(tmp_path / "toy", runtime="abacus"))


def test_a_graph_that_the_runtime_refuses_is_named(folder: Path) -> None:
    with pytest.raises(EngineError, match=r"refuses .*prefill\.onnx"):
        open_session(folder)
