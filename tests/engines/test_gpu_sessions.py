"""The runtimes `tensorrt` and `ort-cuda` on an emulated GPU, where only the libraries are emulated and not our calls.

The sessions have to draw the tokens of `ort-cpu` and the authors' golden tokens. They also have to pass the
proof. Faults in the TensorRT engine or in the session must not pass it.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
from click.testing import CliRunner

from nbp_engines import cuda, ort, trt
from nbp_engines.bundle import RECEIPT, Bundle
from nbp_engines.errors import EngineError
from nbp_engines.generator import Generator
from nbp_engines.registry import RUNTIMES, open_session
from nbp_engines.sampling import GREEDY
from nbp_export import parity
from nbp_export.cli import main
from nbp_export.onnx_bundle import export
from nbp_export.parity import ParityError, Reference, check_bundle
from nbp_export.proof import verify
from nbp_export.sources import Source
from tests.conftest import CommandResult
from tests.engines.emulated import Gpu, emulated, with_engines
from tests.engines.test_sample_cu import by_kernel
from tests.export.support import Exported
from tests.support import golden, golden_hybrid

Exporter = Callable[..., Exported]
COMMAND = "nbp-export onnx --checkpoint small.ckpt --block 1x1x4"
GPU_RUNTIMES = ["tensorrt", "ort-cuda"]


@pytest.fixture
def engines(exported: Exporter, tmp_path: Path) -> Callable[..., Exported]:
    """`engines(dtype, batch, damage, …)` makes a small bundle with emulated TensorRT engines.

    A test may change its files.
    """

    def make(dtype: str = "fp16", batch: int = 1, damage: dict[str, Any] | None = None, **changes: Any) -> Exported:
        made = exported("1x1x4", dtype, batch, tokenizer=dtype != "bf16", one_graph=True)
        path = Path(shutil.copytree(made.bundle.path, tmp_path / "bundle"))
        return Exported(with_engines(replace(made.bundle, path=path), damage, **changes), made.source)

    return make


def frames(bundle: Bundle) -> np.ndarray:
    """Return given frames of random pixels."""
    spec = bundle.manifest.spec
    shape = (spec.batch, 3, spec.condition_frames, *spec.video[1:])
    return np.random.default_rng(5).uniform(size=shape).astype(np.float32)


# Both runtimes draw the same tokens as others.


@pytest.fixture(scope="module")
def tiny(ran: Callable[[str], CommandResult], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundled model, with emulated TensorRT engines in place of real ones."""
    made = ran("trt --block 1x1x16 --out tiny-16-sm80").folder / "tiny-16-sm80"
    return with_engines(Bundle.open(Path(shutil.copytree(made, tmp_path_factory.mktemp("tiny") / "bundle"))))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The golden class-conditional model of the authors' code."""
    source = Source("ucf", golden_hybrid(), None, True, "golden")
    return with_engines(export(source, tmp_path_factory.mktemp("golden") / "bundle", "fp32", one_graph=True))


@pytest.mark.parametrize("runtime", GPU_RUNTIMES)
def test_nbp_tiny_predicts_the_same_clip_as_on_the_cpu(tiny: Bundle, gpu: Gpu, runtime: str) -> None:
    with open_session(tiny, 1, runtime="ort-cpu") as session:
        expected = Generator(session, seed=3).predict(frames(tiny))
    with open_session(tiny, runtime=runtime) as session:
        actual = Generator(session, seed=3).predict(frames(tiny))
        again = Generator(session, seed=3).predict(frames(tiny))
    assert np.array_equal(actual.tokens, expected.tokens)
    assert np.array_equal(actual.video, expected.video)
    assert np.array_equal(again.tokens, expected.tokens)
    assert "sample_fp16" in gpu.log


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("runtime", GPU_RUNTIMES)
def test_the_authors_hybrid_draws_its_golden_tokens(runtime: str, hybrid: Bundle) -> None:
    case = golden("ucf_L4")
    with open_session(hybrid, runtime=runtime) as session:
        for clip in Generator(session, GREEDY).blocks(case["text"].numpy().astype(np.int64)):
            actual = clip
    assert np.array_equal(actual, case["greedy"].numpy())


def test_the_kernel_itself_draws_the_same_tokens(engines: Callable[..., Exported]) -> None:
    bundle = engines("fp16").bundle
    with open_session(bundle, 1, runtime="ort-cpu") as session:
        expected = Generator(session, seed=1).predict(frames(bundle)).tokens

    def kernel(logits: np.ndarray, uniforms: np.ndarray, settings: Any, dtype: str) -> np.ndarray:
        return by_kernel(logits, uniforms, settings, dtype)

    with emulated(Gpu(draw=kernel)), open_session(bundle) as session:
        assert np.array_equal(Generator(session, seed=1).predict(frames(bundle)).tokens, expected)


# The proof, with garbage in every unused slot.


@pytest.mark.parametrize("runtime", GPU_RUNTIMES)
@pytest.mark.parametrize("batch", [1, 2])
def test_parity_of_a_session_on_a_gpu(engines: Callable[..., Exported], gpu: Gpu, runtime: str, batch: int) -> None:
    bundle, source = engines("fp32", batch)
    checks = [*check_bundle(bundle, Reference(source.generator), RUNTIMES[runtime])]
    assert source.tokenizer is not None
    checks += check_bundle(bundle, Reference(None, source.tokenizer), RUNTIMES[runtime])
    assert {check.graph for check in checks} == {"prefill", "step", "encode", "decode"}
    assert any(name == ("replay" if runtime == "tensorrt" else "onnxruntime") for name in gpu.log)
    assert [c.at for c in checks] == [
        c.at
        for part in (
            check_bundle(bundle, Reference(source.generator)),
            check_bundle(bundle, Reference(None, source.tokenizer)),
        )
        for c in part
    ]


@pytest.mark.usefixtures("gpu")
def test_bf16_is_computed_in_bf16(engines: Callable[..., Exported]) -> None:
    bundle, source = engines("bf16")
    checks = [*check_bundle(bundle, Reference(source.generator), RUNTIMES["tensorrt"])]
    assert {check.tolerance for check in checks} == {0.0, parity.TOLERANCE["bf16"]}
    assert 1e-4 < max(check.worst for check in checks) < parity.TOLERANCE["bf16"]


@pytest.mark.usefixtures("gpu")
def test_a_receipt_says_what_ran_where(engines: Callable[..., Exported]) -> None:
    bundle = engines("fp16").bundle
    version = bundle.manifest.engines[0].version
    receipt = verify(bundle.path, runtime="tensorrt").receipt()
    assert receipt is not None
    assert receipt["executed"] == f"in fp16 by tensorrt_rtx {version} on Emulated"
    assert receipt["runtime"] == "tensorrt"
    assert {"cuda-bindings", "tensorrt-rtx"} <= receipt["versions"].keys()
    receipt = verify(bundle.path, runtime="ort-cuda").receipt()
    assert receipt is not None
    assert receipt["executed"] == "in fp16 by ONNX Runtime's CUDA provider on Emulated"


def test_a_missing_gpu_voids_no_receipt(engines: Callable[..., Exported]) -> None:
    path = engines("fp16").bundle.path
    verify(path)
    before = (path / RECEIPT).read_bytes()
    with emulated(Gpu(count=0)), pytest.raises(EngineError, match="no GPU"):
        verify(path, runtime="tensorrt")
    assert (path / RECEIPT).read_bytes() == before


def test_verify_uses_the_runtime_of_the_option(engines: Callable[..., Exported]) -> None:
    path = engines("fp16").bundle.path
    with emulated(Gpu()):
        done = CliRunner().invoke(main, ["verify", str(path), "--runtime", "tensorrt"])
    assert done.exit_code == 0, done.output
    assert "in fp16 by tensorrt_rtx" in " ".join(done.output.split())
    with emulated(Gpu(driver_version=0)):
        done = CliRunner().invoke(main, ["verify", str(path), "--runtime", "tensorrt"])
    assert done.exit_code == 1
    assert "Error: no NVIDIA driver" in done.output


@pytest.mark.usefixtures("gpu")
def test_a_failed_proof_on_a_gpu_removes_the_receipt(
    engines: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = engines("fp16").bundle.path
    verify(path)
    monkeypatch.setattr(cuda.Mirror, "enqueue_write", lambda _: None)
    with pytest.raises(ParityError, match=r"run by tensorrt, differs from the reference"):
        verify(path, runtime="tensorrt")
    assert not (path / RECEIPT).exists()


# Copies between host and device.


@pytest.mark.usefixtures("gpu")
def test_a_step_copies_only_the_tokens_and_noise_of_a_block(engines: Callable[..., Exported], gpu: Gpu) -> None:
    bundle = engines("fp16").bundle
    L = bundle.manifest.spec.block_size
    with open_session(bundle) as session:
        logits = session.prefill(np.zeros((1, 32), np.int64))
        session.sample(logits, np.full((1, L), 0.5), GREEDY)
        gpu.moved.clear()
        logits = session.step(np.ones((1, L), np.int64), np.array([32]))
        session.sample(logits, np.full((1, L), 0.5), GREEDY)
        assert gpu.moved == {"in": L * 8 + 8 + L * 8, "out": L * 8}  # tokens, position and noise; tokens
        assert np.asarray(logits).shape == (1, L, 125) == logits.shape


def test_a_step_is_one_launch_of_a_cuda_graph(engines: Callable[..., Exported], gpu: Gpu) -> None:
    with open_session(engines("fp16").bundle) as session:
        gpu.log.clear()
        session.step(np.ones((1, 4), np.int64), np.array([32]))
        assert gpu.log == ["replay"] * 3  # two copies and the TensorRT engine are in one CUDA graph


@pytest.mark.usefixtures("gpu")
def test_some_graphs_alone(engines: Callable[..., Exported]) -> None:
    bundle = engines("fp16").bundle
    (bundle.path / "generator.engine").unlink()
    with open_session(bundle, graphs=["decode"]) as session:
        assert session.decode(np.zeros((1, 80), np.int64)).shape == (1, 3, 17, 16, 16)
        with pytest.raises(EngineError, match="step is in the bundle but was not opened; this session has decode"):
            session.step(np.zeros((1, 4), np.int64), np.array([32]))


@pytest.mark.usefixtures("gpu")
def test_caches_are_written_and_read(engines: Callable[..., Exported]) -> None:
    rng = np.random.default_rng(1)
    with open_session(engines("bf16").bundle) as session:
        shapes = {tensor.name: tensor.shape for tensor in session.spec.caches()}
        values = {
            name: (rng.standard_normal(shape).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
            for name, shape in shapes.items()
        }
        session.write_states(values)
        states = session.read_states()
        assert all(np.array_equal(states[name], values[name]) for name in shapes)


@pytest.mark.parametrize("runtime", GPU_RUNTIMES)
def test_inputs_that_do_not_fit_are_refused(engines: Callable[..., Exported], gpu: Gpu, runtime: str) -> None:
    with open_session(engines("fp16").bundle, runtime=runtime) as session:
        gpu.log.clear()
        for tokens in (np.zeros((1, 5), np.int64), np.zeros((1, 4), np.int32), np.zeros((2, 4), np.int64)):
            with pytest.raises(EngineError, match=r"step: tokens is int.*, but the graph takes int64 \[1, 4\]"):
                session.step(tokens, np.array([32]))
        assert not gpu.log


# TensorRT engines that are for another machine, or that differ from the manifest.


REFUSED: dict[str, tuple[Gpu, dict[str, Any], str]] = {
    "another architecture": (
        Gpu(),
        {"arch": "sm86"},
        rf"encode\.engine was built for sm86, but Emulated is sm80: .* with --arch sm80; it was made by `{COMMAND}",
    ),
    "an older GPU": (Gpu(7, 5), {"compatibility": "ampere+"}, "built for sm80, but Emulated is sm75"),
    "another of its kind": (Gpu(8, 6), {"compatibility": "same-cc"}, "built for sm80, but Emulated is sm86"),
    "another version": (
        Gpu(),
        {"version": "1.6"},
        rf"but 1\.7.* is installed: pip install '.*\[trt-rtx\]' tensorrt-rtx==1\.6, or .*; it was made by `{COMMAND}",
    ),
    "a swapped order": (Gpu(), {"graphs": ("step", "prefill")}, "has no|profile 0 takes tokens"),
    "no room for caches": (
        Gpu(memory=10_000),
        {},
        r"no memory for \w+ on Emulated: it needs [\d,]+ bytes, [\d,]+ are free",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_engines_that_cannot_run_here(engines: Callable[..., Exported], name: str) -> None:
    device, changes, words = REFUSED[name]
    if "graphs" in changes:
        bundle = engines("fp16").bundle
        swapped = tuple(replace(e, graphs=e.graphs[::-1]) for e in bundle.manifest.engines)
        bundle = replace(bundle, manifest=replace(bundle.manifest, engines=swapped))
    else:
        bundle = engines("fp16", **changes).bundle
    with emulated(device) as gpu:
        with pytest.raises(EngineError, match=words):
            open_session(bundle)
        assert {**gpu.device, **gpu.pinned, **gpu.handles} == {}, "something is still allocated"


def test_an_engine_for_every_ampere_runs_on_a_later_gpu(engines: Callable[..., Exported]) -> None:
    with emulated(Gpu(8, 9)), open_session(engines("fp16", compatibility="ampere+").bundle) as session:
        assert session.spec.block_size == 4


def test_a_library_that_is_not_installed(engines: Callable[..., Exported]) -> None:
    """This needs no emulation, because TensorRT 11 is not installed."""
    bundle = engines("fp16", library="tensorrt", version="11.4.0.106").bundle
    words = r"built by tensorrt 11\.4\.0\.106, which is not installed: pip install 'nbp-export\[trt\]' tensorrt==11\.4"
    with pytest.raises(EngineError, match=words):
        open_session(bundle)


def test_a_bundle_without_engines(exported: Exporter) -> None:
    with pytest.raises(EngineError, match=rf"no TensorRT engines: it was made by `{COMMAND} .*`; `nbp-export trt`"):
        open_session(exported("1x1x4", tokenizer=True).bundle, runtime="tensorrt")


def test_an_engine_that_does_not_load(engines: Callable[..., Exported], gpu: Gpu) -> None:
    bundle = engines("fp16").bundle
    (bundle.path / "generator.engine").write_bytes(b"nonsense")
    words = r"cannot load .*generator\.engine on Emulated: magic tag does not match \(the file has 8 bytes, .* free\)"
    with pytest.raises(EngineError, match=words):
        open_session(bundle, graphs=["step"])
    assert not gpu.device


@pytest.mark.usefixtures("gpu")
def test_the_real_library_refuses_nonsense(tmp_path: Path) -> None:
    """The library is the real one, and only the device is emulated."""
    (tmp_path / "generator.engine").write_bytes(b"nonsense" * 9)
    device = cuda.Device.open()
    with pytest.raises(EngineError, match=r"cannot load .*generator\.engine on Emulated: .*magicTag.*72 bytes"):
        trt._load(tensorrt_rtx, tmp_path / "generator.engine", device, [])
    device.close()


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "a copied cache": ({"copied": ["v_cache_1_out"]}, "v_cache_1_out must update v_cache_1 in place"),
    "logits of another type": (
        {"dtype logits": "FLOAT"},
        "logits is output FLOAT .*, but the manifest has output HALF",
    ),
    "a smaller cache": ({"shape k_cache_0": [1, 2, 60, 32]}, "k_cache_0 is input HALF .*60, 32"),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.usefixtures("gpu")
def test_engines_that_differ_from_the_manifest(engines: Callable[..., Exported], name: str) -> None:
    damage, words = DAMAGE[name]
    with pytest.raises(EngineError, match=rf"generator\.engine: .*{words}.*build it again"):
        open_session(engines("fp16", damage=damage).bundle, graphs=["prefill", "step"])


# Faults of the session itself.


def never_writes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cuda.Mirror, "enqueue_write", lambda _: None)


def writes_only_once(patch: pytest.MonkeyPatch) -> None:
    """Every run uses the inputs of the first one, as if they had been captured by value."""
    plain = trt._Profile.run

    def stale(self: Any, inputs: Any) -> Any:
        self.first_inputs = getattr(self, "first_inputs", {name: value.copy() for name, value in inputs.items()})
        return plain(self, self.first_inputs)

    patch.setattr(trt._Profile, "run", stale)


def never_waits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cuda.Device, "synchronize", lambda _: None)


def never_zeroes(patch: pytest.MonkeyPatch) -> None:
    """Memory from cudaMalloc keeps its NaN."""
    plain = cuda.call

    def call(function: Any, *arguments: Any) -> Any:
        return None if function.__name__ == "cudaMemsetAsync" else plain(function, *arguments)

    patch.setattr(cuda, "call", call)


def first_profile_for_all(patch: pytest.MonkeyPatch) -> None:
    plain = trt._Profile.__init__

    def init(self: Any, library: Any, engine: Any, index: int, *rest: Any) -> None:
        plain(self, library, engine, 0 * index, *rest)

    patch.setattr(trt._Profile, "__init__", init)


def caches_of_its_own(patch: pytest.MonkeyPatch) -> None:
    """Each graph has its own caches, so that no step reads what prefill writes."""
    plain = trt._Profile.__init__

    def init(self: Any, library: Any, engine: Any, index: int, spec: Any, device: Any, caches: Any) -> None:
        separate = {name: device.allocate(cache.shape, cache.dtype) for name, cache in caches.items()}
        plain(self, library, engine, index, spec, device, separate)

    patch.setattr(trt._Profile, "__init__", init)


def captures_the_first_run(patch: pytest.MonkeyPatch) -> None:
    plain, calls = trt._Profile._enqueue, set()

    def enqueue(self: Any) -> None:
        if id(self) in calls:
            plain(self)
        calls.add(id(self))

    patch.setattr(trt._Profile, "_enqueue", enqueue)


FAULTS = [
    never_writes,
    writes_only_once,
    never_waits,
    never_zeroes,
    first_profile_for_all,
    caches_of_its_own,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_session_is_caught(
    engines: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """A fault raises an error or gives other tokens than the CPU, at the latest in the second clip."""
    bundle = engines("fp16").bundle
    with open_session(bundle, 1, runtime="ort-cpu") as session:
        expected = Generator(session, seed=2).predict(frames(bundle)).tokens
    fault(monkeypatch)
    with emulated(Gpu()):
        try:
            session = open_session(bundle)
            Generator(session, seed=1).predict(frames(bundle)[..., ::-1].copy())
            tokens = Generator(session, seed=2).predict(frames(bundle)).tokens
        except EngineError:
            return
        assert not np.array_equal(tokens, expected)


def test_a_graph_that_cannot_be_captured_runs_and_has_a_note(
    engines: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens if a library allocates memory in its first runs."""
    bundle = engines("fp16").bundle
    with open_session(bundle, 1, runtime="ort-cpu") as session:
        expected = Generator(session, seed=2).predict(frames(bundle)).tokens
    captures_the_first_run(monkeypatch)
    with emulated(Gpu()), open_session(bundle) as session:
        assert isinstance(session, trt.TrtSession)
        assert [note.split()[0] for note in session.notes] == [*session.graphs]
        assert np.array_equal(Generator(session, seed=2).predict(frames(bundle)).tokens, expected)


# ONNX Runtime's CUDA provider.


def test_the_cpus_onnx_runtime_is_refused(exported: Exporter) -> None:
    """This needs no emulation, because the package for CPUs is installed."""
    words = r"ONNX Runtime .* is the package for CPUs.*pip uninstall onnxruntime, then pip install 'nbp-export\[gpu\]'"
    with pytest.raises(EngineError, match=words):
        open_session(exported("1x1x4", tokenizer=True).bundle, runtime="ort-cuda")


def test_a_silent_fallback_is_refused(exported: Exporter) -> None:
    with emulated(Gpu(), provider="CPUExecutionProvider") as gpu:
        with pytest.raises(EngineError, match="chose CPUExecutionProvider, not the requested provider CUDA"):
            open_session(exported("1x1x4", tokenizer=True).bundle, runtime="ort-cuda")
        assert gpu.device == {}
        assert gpu.handles == {}


@pytest.mark.usefixtures("gpu")
def test_a_bf16_tokenizer_is_refused(exported: Exporter) -> None:
    bundle = exported("1x1x4", "fp16", tokenizer=True, one_graph=True).bundle
    half = replace(bundle.manifest, spec=replace(bundle.manifest.spec, dtype="bf16"))
    with pytest.raises(EngineError, match=r"no Pad for .* in bf16: export it with --dtype fp16"):
        open_session(replace(bundle, manifest=half), runtime="ort-cuda")


def test_the_error_without_onnx_runtime_has_the_pip_command(
    exported: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "find_spec", lambda _: None)
    for runtime, extra in (("ort-cpu", "cpu"), ("ort-cuda", "gpu")):
        with pytest.raises(EngineError, match=rf"pip install 'nbp-export\[{extra}\]'"):
            open_session(exported("1x1x4", tokenizer=True).bundle, runtime=runtime)
