"""Opening bundles. Anything that differs from the manifest is refused, and the error names it."""

import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbp_engines.bundle import MANIFEST, RECEIPT, Bundle
from nbp_engines.errors import BundleError, EngineError, ReceiptWarning
from nbp_engines.loop import loop_of
from nbp_engines.manifest import SCHEMA, Engine, File, Manifest
from nbp_engines.registry import open_session
from nbp_engines.sampling import Sampling
from nbp_engines.spec import SystemSpec
from nbp_export._commands import plain_warnings

Json = dict[str, Any]
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


FILES = ("generator.data", "generator.engine", "prefill.onnx", "step.onnx")
ENGINE = Engine("generator.engine", ("prefill", "step"), "sm80", "none", "tensorrt_rtx", "1.7.1.116")


def make(path: Path, runtime: str = "ort-cpu", engines: tuple[Engine, ...] = (), **graphs: bytes) -> Path:
    """Make an intact bundle. Its graph files are not ONNX files unless `graphs` has their content, by graph name."""
    path.mkdir()
    for name in FILES:
        (path / name).write_bytes(graphs.get(Path(name).stem, name.encode() * 100))
    manifest = Manifest(
        schema=SCHEMA,
        runtime=runtime,
        spec=SPEC,
        graphs={"prefill": "prefill.onnx", "step": "step.onnx"},
        engines=engines,
        files=tuple(File.of(file) for file in sorted(path.iterdir())),
        model={"name": "toy", "config": {}, "weights_sha256": "0" * 64, "trained": True},
        sampling=Sampling(top_k=20),
        words=(),
        versions={"torch": "2.0"},
        provenance={"note": "made by a test", "command": "nbp-export onnx --model toy"},
    )
    (path / MANIFEST).write_bytes(manifest.to_bytes())
    write_receipt(path)
    return path


def write_receipt(path: Path, **changes: object) -> None:
    """Write a receipt, which is valid if there are no changes."""
    hashes = Bundle.of(path, (path / MANIFEST).read_bytes()).hashes()
    checks = [
        {"graph": graph, "at": "cache_pos [0]", "tolerance": 1e-5, "worst": 1e-6, "where": "logits[0]"}
        for graph in ("prefill", "step")
    ]
    receipt = {"files": hashes, "executed": "in fp32", "worst": checks[0], "checks": checks, "versions": {"torch": "2"}}
    (path / RECEIPT).write_text(json.dumps(receipt | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "toy-1x1x4-fp32", engines=(ENGINE,))


def edit(folder: Path, change: Callable[[Json], object]) -> None:
    """Change the JSON of the manifest."""
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def test_manifest_round_trip(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.spec == SPEC
    assert manifest.sampling == Sampling(top_k=20)
    assert manifest.provenance == {"note": "made by a test", "command": "nbp-export onnx --model toy"}


def test_a_hybrids_manifest_round_trip(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    hybrid = replace(
        manifest,
        engines=(replace(ENGINE, graphs=("prefill", "step", "step_1")),),
        spec=replace(SPEC, condition_latents=0, condition_frames=0, text_tokens=3, text_vocab=2),
        graphs=manifest.graphs | {"step_1": "step.onnx"},
        words=("", "tree"),
    )
    assert Bundle.of(folder, hybrid.to_bytes()).manifest == hybrid


def test_the_manifest_spells_out_the_signatures(folder: Path) -> None:
    signatures = json.loads((folder / MANIFEST).read_text())["signatures"]
    assert set(signatures) == {"prefill", "step"}
    step = signatures["step"]
    assert step["kind"] == "block_step"
    assert step["inputs"][0] == {"name": "tokens", "dtype": "int64", "shape": [1, 4], "token_axis": 1}
    assert step["outputs"][1] == {
        "name": "k_cache_0_out",
        "dtype": "fp32",
        "shape": [1, 2, 44, 8],
        "token_axis": None,
    }
    assert step["states"][1] == {"input": "v_cache_0", "output": "v_cache_0_out", "in_place": True}


def test_the_manifest_spells_out_the_loop_of_frame_prediction(folder: Path) -> None:
    loop = json.loads((folder / MANIFEST).read_text())["loop"]
    assert loop["mode"] == "frame prediction"
    assert loop["counts"] == {
        "batch": 1,
        "condition_tokens": 16,
        "clip_tokens": 48,
        "block_size": 4,
        "blocks": 8,
        "steps": 8,
        "capacity": 44,
    }
    assert loop["block_order"]["raster_index"] == [*range(48)]
    assert loop["condition"]["shift"] == loop["video_codes"]["shift"] == 0
    assert loop["special_ids"] is None
    prefill, step = loop["calls"]
    assert (prefill["graph"], prefill["times"], prefill["cache_pos"]) == ("prefill", 1, 0)
    assert (step["graph"], step["times"], step["cache_pos"], step["cache_pos_increment"]) == ("step", 7, 16, 4)


@pytest.mark.parametrize(("block", "graph"), [((1, 2, 2), "step_1"), ((1, 1, 1), "step")])
def test_the_loop_of_a_hybrid(block: tuple[int, int, int], graph: str) -> None:
    L = 4 if graph == "step_1" else 1
    loop = loop_of(replace(SPEC, block=block, condition_latents=0, condition_frames=0, text_tokens=3, text_vocab=5))
    assert loop["mode"] == "class-conditional"
    assert loop["counts"]["steps"] == 48 // L + L - 1
    assert loop["special_ids"] == {"begin_of_video": 0, "middle_of_video": [1, 2, 3][: L - 1]}
    assert loop["condition"]["shift"] == L
    assert (loop["video_codes"]["shift"], loop["video_codes"]["count"]) == (L + 5, 30 - L - 5)
    prefill, first, step = loop["calls"]
    assert (prefill["times"], prefill["cache_pos"], prefill["logits"]) == (1, 0, "unused")
    assert (first["graph"], first["times"], first["cache_pos"], first["cache_pos_increment"]) == (graph, L, 3, 1)
    assert (step["graph"], step["times"]) == ("step", 48 // L - 1)
    assert (step["cache_pos"], step["cache_pos_increment"]) == (3 + L, L)
    assert ("middle-of-video" in step["tokens"]) == (L > 1)
    if L == 4:
        assert loop["block_order"]["raster_index"][:8] == [0, 1, 4, 5, 2, 3, 6, 7]


def test_graph_files_are_found_by_name(folder: Path) -> None:
    assert Bundle.open(folder).graph_file("step") == folder / "step.onnx"


def refused(folder: Path, *names: str) -> None:
    """Check that opening raises a BundleError whose message contains all of these texts."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    for name in names:
        assert name in caught.value.message


def test_no_bundle(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), MANIFEST, "nbp-export onnx")
    refused(tmp_path / "nowhere", "nowhere", MANIFEST)


@pytest.mark.parametrize("name", FILES)
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


@pytest.mark.parametrize("name", ["step.onnx", MANIFEST])
def test_a_symbolic_link_even_to_the_same_content(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    refused(folder, name, "symbolic link")


@pytest.mark.parametrize("inner", ["", "bundles/16"])
@pytest.mark.parametrize("name", ["step.onnx", MANIFEST, "all"])
def test_a_bundle_in_the_hubs_cache_is_refused_with_the_command_that_copies_it(
    folder: Path, name: str, inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the cache each file is a symbolic link to another folder, from where the runtimes refuse to read weights."""
    repository = tmp_path / "it's here" / "models--org--one"
    snapshot, blobs = repository / "snapshots" / ("0" * 40) / inner, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in [*folder.iterdir()] if name == "all" else [folder / name]:
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / file.name, snapshot))
    for file in folder.iterdir():
        file.rename(snapshot / file.name)
    with pytest.raises(BundleError, match="symbolic link in the cache of the Hugging Face Hub") as error:
        Bundle.open(snapshot)
    command = error.value.message.partition("`")[2].partition("`")[0]
    monkeypatch.chdir(tmp_path)
    subprocess.run(["sh", "-c", command], check=True)
    copy = Bundle.open(tmp_path / "one-bundle", require_receipt=True)
    assert not [file for file in copy.path.iterdir() if file.is_symlink()]
    monkeypatch.chdir(snapshot)
    refused(Path(), "symbolic link", "`cp -rL . ../one-bundle`")


def test_a_link_to_the_folder_is_accepted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert Bundle.open(tmp_path / "link").receipt() is not None


def test_a_file_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("nbp_engines.manifest.sha256", denied)
    refused(folder, str(folder / "generator.data"), "Permission denied")


# Wrong values for places in the manifest, and a part of the error's message.
NO_COUNTS = (0, -1, True, 4.0, "4", None, [4], 2**31, 10**30)
COUNTS = ("batch", "layers", "heads", "head_dim", "vocab", "block[1]", "latent[2]")
MAY_BE_0 = ("condition_latents", "condition_frames", "video[0]", "text_tokens", "text_vocab")
NO_NAMES: tuple[object, ...] = (
    *("../outside.data", "sub/inside.data", "sub\\inside.data", "/", "\\", ".", "..", "", "C:generator.data", "~"),
    *(
        "generator.data\0",
        "generator.data\n",
        "generator.data ",
        "generator.data.",
        ".generator.data",
        "générator.data",
    ),
    *("-rf", "*", "a" * 101, 3, True, None, ["generator.data"], {}),
)
NO_JSON = (float("nan"), float("inf"), -float("inf"))
WRONG_VALUES: list[tuple[str, str, Iterable[object]]] = [
    *((f"spec.{name}", f"spec.{name} is ", NO_COUNTS) for name in COUNTS),
    *((f"spec.{name}", f"spec.{name} is ", NO_COUNTS[1:]) for name in MAY_BE_0),
    ("spec.block", "spec.block is ", [[1, 1], [1, 1, 4, 1], "1x1x4", {}, None, 4]),
    ("spec.dtype", "spec.dtype is ", ["int64", "fp64", "FP32", "", 16, None, ["fp32"]]),
    ("spec.layers", "from 1 to 4,096", [4097]),
    ("spec.vocab", "is not a finite number", NO_JSON),
    ("spec.width", "unknown name 'width'", [64]),
    ("files[0].path", "files[0].path is ", NO_NAMES),
    ("files[0].size", "files[0].size is ", [-1, True, 1400.0, "1400", None, 2**63, 10**4000]),
    ("files[0].size", "not the file that", [0, 1399, 1401, 2**62]),
    ("files[0].sha256", "files[0].sha256 is ", ["", "0" * 63, "A" * 64, "g" * 64, 0, None]),
    ("files[0].sha256", "not the file that", ["0" * 64]),
    ("files[0].mode", "unknown name 'mode'", [0o777]),
    ("files", "files", [[], {}, None, "generator.data", [[]], [None], ["generator.data"]]),
    ("graphs.step", "graphs.step is ", NO_NAMES),
    ("graphs.step", "not among its files", ["other.onnx", "Step.onnx", MANIFEST, RECEIPT]),
    *((f"graphs.{name}", "missing or unknown", ["step.onnx"]) for name in ("dream", "", "step_1", "PREFILL")),
    ("graphs.\x1b", "a name in manifest.graphs is '\\x1b'", ["step.onnx"]),
    ("graphs", "graphs", [{}, [], None, "step.onnx", {"step": "step.onnx"}]),
    ("engines", "engines", [None, {}, "generator.engine", [[]], [None]]),
    ("engines[0].file", "engines[0].file is ", NO_NAMES),
    ("engines[0].file", "TensorRT engines ['other.engine'] are not among its files", ["other.engine"]),
    ("engines[0].graphs", "engines[0].graphs", [None, {}, "step", [3], ["../step"]]),
    ("engines[0].graphs", "not ['prefill', 'step']", [["step"], ["step", "step", "prefill"], ["dream"]]),
    ("engines[0].arch", "engines[0].arch is ", [None, 80, "sm", "sm8", "sm08", "80", "SM80", "sm80 "]),
    ("engines[0].compatibility", "engines[0].compatibility is ", [None, "", "all", "ampere", ["none"]]),
    ("engines[0].library", "engines[0].library is ", [None, "", "os", "tensorrt_rtx.x", "TensorRT", "tensorrt_llm"]),
    ("engines[0].version", "engines[0].version is ", [None, 11, "11\x1b"]),
    ("engines[0].seconds", "unknown name 'seconds'", [3]),
    ("sampling.temperature", "sampling.temperature is ", [-0.1, True, "1", None, []]),
    ("sampling.temperature", "is not a finite number", NO_JSON),
    ("sampling.top_k", "sampling.top_k is ", [0, -1, 1.5, True, "1", None, 2**31]),
    ("sampling.top_p", "sampling.top_p is ", [0, 0.0, -0.5, 1.01, 2, True, "0.9", None]),
    ("sampling.seed", "unknown name 'seed'", [0]),
    ("schema", "export the bundle again with `nbp-export onnx --model toy`", [0, SCHEMA - 1, SCHEMA + 1]),
    ("schema", "schema is ", [float(SCHEMA), str(SCHEMA), [SCHEMA], True, None]),
    ("runtime", "runtime is ", [3, None, [], {}, "on\x1b[31mnx", "onnx\n", "\ud800"]),
    ("versions", "versions is ", [[], None, "2.0", 2]),
    ("versions.torch", "versions.torch is ", [2, None, ["2.0"], "2.0\x07"]),
    ("words", "words is ", [None, "tree", {}, 2]),
    ("words", "words[0] is ", [[None], [1], [["tree"]], ["tr\x1bee"]]),
    ("model", "model is ", [None, [], "toy"]),
    ("model.name", "model.name is ", [None, 3, "to\ny"]),
    ("model.trained", "model.trained is ", [None, 1, "yes"]),
    ("model.weights_sha256", "model.weights_sha256 is ", [None, 0, "", "0" * 63]),
    ("model.config", "model.config is ", [None, [], ""]),
    ("provenance", "provenance is ", [None, [], "note"]),
    ("provenance.note", "provenance.note is ", [None, 3, "\x1b]0;title\x07"]),
    ("provenance.command", "provenance.command is ", [None, 3, "\x1b]0;title\x07"]),
    ("signatures", "signatures", [None, [], {}, {"step": {}}]),
    ("signatures.step", "signatures do not follow", [None]),
    ("signatures.step.states[0].in_place", "signatures do not follow", [1, False, None]),
    ("loop", "loop", [None, [], {}, {"block_order": {}}, {"block_order": {"raster_index": []}}]),
    ("loop.mode", "loop does not follow", ["class-conditional", None]),
    ("loop.counts.steps", "loop does not follow", [7, 8.0, "8"]),
    ("loop.block_order.raster_index", "loop", [None, {}, [], [0], [*range(1, 48), 0]]),
    ("loop.calls[1].cache_pos", "loop does not follow", [0, 16.0]),
    ("loop.noise.generator", "loop does not follow", ["Philox4x32-10"]),
    ("loop.extra", "loop does not follow", [1]),
    ("extra", "unknown name 'extra'", [1]),
]
CASES = [
    pytest.param(place, value, words, id=f"{ascii(place)[1:-1]}={ascii(value)[:40]}")
    for place, words, values in WRONG_VALUES
    for value in values
]


def put(data: Json, place: str, value: object) -> None:
    """Set the value at a path such as `files[0].size`."""
    *way, last = [int(key) if key.isdigit() else key for key in place.replace("[", ".").replace("]", "").split(".")]
    target: Any = data
    for key in way:
        target = target[key]
    target[last] = value


@pytest.mark.parametrize(("place", "value", "words"), CASES)
def test_a_wrong_value(folder: Path, place: str, value: object, words: str) -> None:
    (folder / "sub").mkdir()
    for target in (folder.parent / "outside.data", folder / "sub" / "inside.data", folder / "sub\\inside.data"):
        shutil.copy(folder / "generator.data", target)
    edit(folder, lambda data: put(data, place, value))
    refused(folder, str(folder), words)


def test_an_absolute_path(folder: Path) -> None:
    edit(folder, lambda data: data["files"][0].update(path=str(folder / "generator.data")))
    refused(folder, MANIFEST, "files[0].path", "plain file")


DEEP = 100_000
WRONG_TEXTS: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda _: "", "not JSON"),
    "an open brace": (lambda _: "{", "not JSON"),
    "no JSON": (lambda _: "not json", "not JSON"),
    "half of it": (lambda text: text[: len(text) // 2], "not JSON"),
    "something after it": (lambda text: text + "{}", "not JSON"),
    "a comment": (lambda text: text.replace("{", "{ // mine", 1), "not JSON"),
    "single quotes": (lambda text: text.replace('"', "'"), "not JSON"),
    "a list": (lambda _: "[]", "manifest is [], not an object"),
    "null": (lambda _: "null", "manifest is None, not an object"),
    "a string": (lambda _: '"text"', "not an object"),
    "a number": (lambda _: "3", "not an object"),
    "its schema alone": (lambda _: f'{{"schema": {SCHEMA}}}', "manifest has no 'runtime'"),
    "a name twice": (
        lambda text: text.replace('"schema"', f'"schema": {SCHEMA}, "schema"', 1),
        "'schema' occurs twice",
    ),
    "a name twice inside": (
        lambda text: text.replace('"vocab": 30', '"vocab": 30, "vocab": 31'),
        "'vocab' occurs twice",
    ),
    "a graph twice": (
        lambda text: text.replace('"step":', '"step": "prefill.onnx", "step":', 1),
        "'step' occurs twice",
    ),
    "NaN": (lambda text: text.replace(": 1.0", ": NaN"), "NaN is not a finite number"),
    "Infinity": (lambda text: text.replace(": 1.0", ": Infinity"), "Infinity is not a finite number"),
    "-Infinity": (lambda text: text.replace(": 1.0", ": -Infinity"), "-Infinity is not a finite number"),
    "a number beyond all": (lambda text: text.replace(": 1.0", ": 1e999"), "1e999 is not a finite number"),
    "NaN where anything goes": (
        lambda text: text.replace('"config": {}', '"config": {"width": NaN}'),
        "NaN is not a finite number",
    ),
    "an integer of 5,000 digits": (lambda text: text.replace(": 30", ": " + "9" * 5000), "not JSON"),
    "lists in lists": (lambda _: "[" * DEEP + "]" * DEEP, "not JSON"),
    "objects in objects": (lambda _: '{"a":' * DEEP + "1" + "}" * DEEP, "not JSON"),
    "lists in lists where anything goes": (
        lambda text: text.replace('"config": {}', '"config": {"width": ' + "[" * DEEP + "]" * DEEP + "}"),
        "not JSON",
    ),
}


@pytest.mark.parametrize("name", WRONG_TEXTS)
def test_a_wrong_text(folder: Path, name: str) -> None:
    change, words = WRONG_TEXTS[name]
    text = (folder / MANIFEST).read_text()
    assert change(text) != text
    (folder / MANIFEST).write_text(change(text))
    refused(folder, str(folder / MANIFEST), words)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x80", b"\0"])
def test_a_manifest_that_is_no_text(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    refused(folder, str(folder / MANIFEST), "not JSON")


def spec(**changes: object) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, spec=replace(manifest.spec, **changes))  # type: ignore[arg-type]


def one_more_file(path: str) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, files=(*manifest.files, replace(manifest.files[0], path=path)))


# Each value is possible, but they contradict each other. Signatures and loop are those of the intact spec. The error
# must be about the contradiction and not about them.
CONTRADICTIONS: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "a block that does not tile": (spec(block=(1, 1, 3)), "block (1, 1, 3) does not tile latent (3, 4, 4)"),
    "a block longer than the clip": (spec(block=(4, 4, 4)), "does not tile"),
    "a block that spans given and predicted frames": (spec(block=(3, 1, 4)), "1 given frames"),
    "all frames given": (spec(condition_latents=3), "leaves nothing to predict"),
    "more frames given than there are": (spec(condition_latents=4), "leaves nothing to predict"),
    "the whole video given": (spec(condition_frames=9), "leaves nothing to predict"),
    "given frames of no video": (spec(video=(0, 0, 0)), "leaves nothing to predict"),
    "nothing given": (spec(condition_latents=0), "tokens of prefill would have the empty shape [1, 0]"),
    "words without a text": (lambda m: replace(m, words=("tree",)), "1 words for 0 text ids"),
    "a vocabulary without video": (
        spec(condition_latents=0, text_tokens=2, text_vocab=26),
        "leaves none for video",
    ),
    "a hybrid without its first step": (
        spec(condition_latents=0, text_tokens=2, text_vocab=2),
        "['step_1'] are missing",
    ),
    "caches beyond any memory": (spec(heads=2**31 - 1, head_dim=2**31 - 1), "its buffers would need"),
    "logits beyond any memory": (spec(batch=2**20, vocab=2**31 - 1), "its buffers would need"),
    "a file listed twice": (one_more_file("generator.data"), "['generator.data'] are listed twice"),
    "names that differ in case alone": (one_more_file("Generator.data"), "['generator.data'] are listed twice"),
    "the manifest among the files": (one_more_file(MANIFEST), "['manifest.json'] are listed twice"),
    "the receipt among the files": (one_more_file("RECEIPT.json"), "['receipt.json'] are listed twice"),
    "decode of no video": (
        lambda m: replace(spec(video=(0, 0, 0), condition_frames=0)(m), graphs=m.graphs | {"decode": "step.onnx"}),
        "video of decode would have the empty shape [1, 3, 0, 0, 0]",
    ),
    "an engine for some graphs": (
        lambda m: replace(m, engines=(replace(ENGINE, graphs=("step",)),)),
        "TensorRT engines have the graphs ['step'], not ['prefill', 'step']",
    ),
    "no step": (lambda m: replace(m, graphs={"prefill": "prefill.onnx"}), "['step'] are missing"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_values_that_contradict_each_other(folder: Path, name: str) -> None:
    change, words = CONTRADICTIONS[name]
    intact = Bundle.open(folder).manifest
    manifest = change(intact)
    for file in manifest.files[4:]:
        with suppress(shutil.SameFileError):  # all files exist, even those that must not be listed
            shutil.copy(folder / "generator.data", folder / file.path)
    (folder / MANIFEST).write_text(json.dumps(intact.to_json() | asdict(manifest)))
    refused(folder, MANIFEST, words)


def test_signatures_that_contradict_the_spec(folder: Path) -> None:
    edit(folder, lambda data: data["spec"].update(vocab=31))
    refused(folder, MANIFEST, "signatures")


@pytest.mark.parametrize("name", [*(field.name for field in fields(Manifest)), "signatures", "loop"])
def test_a_missing_name(folder: Path, name: str) -> None:
    edit(folder, lambda data: data.pop(name))
    refused(folder, MANIFEST, name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.text("./abx", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_a_manifest_with_any_value_in_any_place_opens_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = make(tmp_path_factory.mktemp("fuzz") / "toy", engines=(ENGINE,))
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
    with suppress(BundleError), warnings.catch_warnings():  # any other error fails the test
        warnings.simplefilter("ignore", ReceiptWarning)
        opened = Bundle.open(folder).manifest
        assert opened.graph_specs() == Bundle.of(folder, opened.to_bytes()).manifest.graph_specs()
    shutil.rmtree(folder)


def unproven(folder: Path) -> Bundle:
    """Check that the bundle opens with a warning about its receipt, and not if one is required. Return the bundle."""
    advice = f"{folder} has no valid receipt: `nbp-export verify {folder}` proves it again"
    with pytest.warns(ReceiptWarning) as warned:
        bundle = Bundle.open(folder)
    assert [(str(w.message), Path(w.filename)) for w in warned] == [(advice, Path(__file__))]
    assert bundle.receipt() is None
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder, require_receipt=True)
    assert caught.value.message == advice
    for source in (folder, str(folder), bundle):
        with pytest.raises(BundleError, match="no valid receipt"):
            open_session(source, require_receipt=True)
    return bundle


def test_the_receipt_is_valid_until_the_manifest_changes(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        receipt = Bundle.open(folder, require_receipt=True).receipt()
    assert receipt is not None
    assert receipt["worst"]["worst"] == 1e-6
    edit(folder, lambda data: data["provenance"].update(note="something else"))
    unproven(folder)


def test_the_receipt_is_void_once_any_byte_of_the_manifest_changes(folder: Path) -> None:
    with (folder / MANIFEST).open("ab") as file:
        file.write(b"\n")
    unproven(folder)


@pytest.mark.parametrize("name", FILES)
def test_the_receipt_is_void_once_a_file_changes_even_with_the_manifest_mended(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"other")
    files = [asdict(File.of(folder / n)) for n in FILES]
    edit(folder, lambda data: data.update(files=files))
    unproven(folder)


def test_the_receipt_is_void_once_the_bundle_has_another_file(folder: Path) -> None:
    (folder / "more.data").write_bytes(b"more")
    edit(folder, lambda data: data["files"].append(asdict(File.of(folder / "more.data"))))
    unproven(folder)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"null", b"{}", b'{"files": {}}', b"\xff", b"[" * 100_000])
def test_no_receipt(folder: Path, content: bytes | None) -> None:
    (folder / RECEIPT).unlink()
    if content is not None:
        (folder / RECEIPT).write_bytes(content)
    unproven(folder)


def check(graph: str, **changes: object) -> Json:
    return {"graph": graph, "at": "", "tolerance": 1e-5, "worst": 1e-6, "where": ""} | changes


INVALID_RECEIPTS: dict[str, Json] = {
    "no checks": {"checks": []},
    "a graph unchecked": {"checks": [check("step")]},
    "a check failed": {"checks": [check("prefill"), check("step", worst=1e-4)]},
    "a check of NaN": {"checks": [check("prefill"), check("step", worst=float("nan"))]},
    "infinite": {"checks": [check("prefill"), check("step", worst=float("inf"), tolerance=float("inf"))]},
    "a check without a number": {"checks": [check("prefill"), check("step", worst="none")]},
    "a check without a tolerance": {"checks": [check("prefill"), check("step", tolerance=None)]},
    "a check that is none": {"checks": [check("prefill"), "step"]},
    "a check of no graph": {"checks": [check("prefill"), check("step"), check("\n")]},
    "a check that clears the screen": {"checks": [check("prefill"), check("step", at="\x1b[2J")]},
    "a place that clears the screen": {"checks": [check("prefill"), check("step", where="\x1b[2J")]},
    "checks that are no list": {"checks": {"prefill": check("prefill")}},
    "no worst": {"worst": None},
    "a worst without a number": {"worst": check("step", worst=None)},
    "executed nowhere": {"executed": None},
    "versions that are none": {"versions": {"torch": 2}},
    "no file": {"files": {}},
}


@pytest.mark.parametrize("name", INVALID_RECEIPTS)
def test_a_receipt_that_proves_nothing(folder: Path, name: str) -> None:
    write_receipt(folder, **INVALID_RECEIPTS[name])
    unproven(folder)


def test_a_receipt_from_elsewhere(folder: Path) -> None:
    (folder / RECEIPT).rename(folder.parent / RECEIPT)
    (folder / RECEIPT).symlink_to(folder.parent / RECEIPT)
    unproven(folder)


def test_commands_print_the_warning_as_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / RECEIPT).unlink()
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with plain_warnings():
            Bundle.open(folder)
            warnings.warn("somebody else's", UserWarning, stacklevel=1)
        warnings.warn("later", ReceiptWarning, stacklevel=1)
    assert (
        capsys.readouterr().err
        == f"Warning: {folder} has no valid receipt: `nbp-export verify {folder}` proves it again\n"
    )
    assert [str(warning.message) for warning in others] == ["somebody else's", "later"]


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
