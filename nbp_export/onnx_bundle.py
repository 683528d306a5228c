"""Exports a model to an ONNX bundle: graphs, shared weights, a recorded trace, the proof, and only then its name."""

import glob
import hashlib
import os
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from nbp_engines.bundle import MANIFEST, RECEIPT, Bundle
from nbp_engines.manifest import SCHEMA, Engine, File, Manifest
from nbp_engines.ort import ORT_CPU
from nbp_engines.sampling import Sampling
from nbp_engines.shell import command_line, is_utf8, utf8_cure
from nbp_engines.spec import SystemSpec
from nbp_engines.strict import write_bytes, write_json
from nbp_engines.trt import TENSORRT
from nbp_errors import NbpError, UsageError
from nbp_export import lint, trt
from nbp_export.graphs import graph_module, system_spec, trace
from nbp_export.inspect import status_of
from nbp_export.proof import Report, prove, versions
from nbp_export.sources import Source
from nbp_export.trace import TRACE, record_trace
from nbp_export.trt_library import Options
from nbp_export.weights import INDEX, Index, WeightPool, weights_sha256

GENERATOR = "generator.onnx"  # prefill and steps in one
DTYPE = "fp16"  # of an export, unless another is asked for


def export(
    source: Source,
    out: Path,
    dtype: str = DTYPE,
    batch: int = 1,
    report: Report = lambda _: None,
    one_graph: bool = False,
    engines: Options | None = None,
) -> Bundle:
    """Write the bundle of a model to a folder that does not exist yet, weights rounded to `dtype`.

    With `one_graph`, prefill and steps are one graph that takes any number of tokens, else a static graph each. With
    options for `engines`, which take one graph, TensorRT engines are built from the very graphs that are proven.

    The source is used up: its models give their memory back once their graphs are written.

    Every graph is checked against the reference before the folder appears: an interrupted or failed export leaves
    nothing there. `report` is told each stage as it begins.

    Raises UsageError if the folder exists or cannot be made or for options that cannot be honoured, NbpError if writing
    to it fails, LintError, BuildError or ParityError if a graph or an engine would not do what the reference does.
    """
    refuse_out(out)
    spec = system_spec(source.generator.config, source.tokenizer.config if source.tokenizer else None, dtype, batch)
    with _appearing(out) as folder, torch.no_grad():
        digest = weights_sha256(source.generator, source.tokenizer)
        graphs = _write_graphs(source, spec, folder, report, one_graph or engines is not None)
        built = trt.build_engines(folder, spec.graphs(), graphs, engines, report) if engines else ()
        manifest = _manifest(source, spec, digest, folder, graphs, built, engines)
        content = _with_trace(folder, manifest, report).to_bytes()
        bundle = Bundle.of(folder, content)
        write_json(folder / RECEIPT, prove(bundle, report))
        write_bytes(folder / MANIFEST, content)  # last, so that whatever a killed export leaves is no bundle
    return replace(bundle, path=out)  # the same files under their name; no need to hash them all again


def refuse_out(out: Path) -> None:
    """Raise UsageError, before any work, if no bundle can get this name: it is taken, too long or not UTF-8."""
    if not is_utf8(out):
        raise UsageError(f"{out} is not UTF-8, which the runtimes need: {utf8_cure('choose another --out')}")
    try:
        taken = out.exists()
    except OSError as error:
        raise UsageError(f"{out} cannot be a folder ({error.strerror}): choose another --out") from error
    if taken:
        raise UsageError(f"{out} exists: choose another --out, or remove it first")


def rehearse(source: Source, options: Options, dtype: str, batch: int, report: Report) -> dict[str, Counter[str]]:
    """Trace, lint and parse what `export` would build engines from, and leave nothing: graph file → TensorRT's layers.

    Raises LintError or BuildError, naming every node that does not map.
    """
    library, _, _ = options.settle()
    spec = system_spec(source.generator.config, source.tokenizer.config if source.tokenizer else None, dtype, batch)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        graphs = _write_graphs(source, spec, Path(folder), report, one_graph=True)
        layers = {}
        for name, file in graphs.items():
            lint.check(Path(folder, file), spec.graphs()[name])
            if file not in layers:
                report(f"parse {file}")
                layers[file] = trt.check(Path(folder, file), spec.graphs()[name], library)
    return layers


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A working folder beside `out` that takes its name only if all went well, and is gone otherwise.

    It is locked while in use, so that the next export to the same name can tell what a killed one left, and remove it.
    Its mode is what the umask makes of it, without a `chmod`, which some file systems refuse.
    """
    name = out.name if len(os.fsencode(out.name)) < 200 else hashlib.sha256(out.name.encode()).hexdigest()
    prefix = f".{name}.partial-"
    with ExitStack() as locks:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with _locked(out.parent, wait=True):  # a folder that has just been made is not locked yet
                for left in out.parent.glob(f"{glob.escape(prefix)}????????"):
                    with _locked(left) as abandoned:
                        if abandoned:
                            shutil.rmtree(left, ignore_errors=True)
                folder = out.parent / f"{prefix}{secrets.token_hex(4)}"
                folder.mkdir()
                locks.enter_context(_locked(folder))
        except OSError as error:
            raise UsageError(f"{out.parent} cannot hold the bundle ({error.strerror}): choose another --out") from error
        try:
            yield folder
            _move(folder, out)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            why = error.strerror or error
            raise NbpError(
                f"the bundle cannot be written to {out.parent} ({why}): free space there, or choose another --out"
            ) from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _move(folder: Path, out: Path) -> None:
    """Give a finished bundle its name; file by file where the file system cannot rename a folder.

    Raises UsageError if the name is taken by now.
    """
    try:
        folder.rename(out)
        return
    except OSError as error:
        if os.path.lexists(out):
            raise UsageError(f"{out} appeared meanwhile ({error.strerror}): choose another --out") from error
    out.mkdir()
    try:
        for file in sorted(folder.iterdir(), key=lambda file: file.name == MANIFEST):  # it makes the folder a bundle
            shutil.move(file, out / file.name, copy_function=shutil.copyfile)
        folder.rmdir()
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


@contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a folder's lock, which ends with this process at the latest; False where it is held or there are none."""
    with ExitStack() as closing:
        try:
            import fcntl

            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            closing.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except (ImportError, OSError):  # a system or a file system without locks
            locked = False
        yield locked


def _write_graphs(source: Source, spec: SystemSpec, folder: Path, report: Report, one_graph: bool) -> dict[str, str]:
    """Graphs, weights and their index; graph name → file. A model's memory is given up once its graphs are written."""
    known = spec.graphs()
    # Model → data file → the graphs on it and how the names of their parameters begin.
    parts: dict[str, tuple[nn.Module | None, dict[str, tuple[list[str], str]]]] = {
        "generator": (source.generator, {"generator.data": ([*spec.generator_graphs()], "")}),
        "tokenizer": (
            source.tokenizer,
            {"encode.data": (["encode"], "encoder_layers."), "decode.data": (["decode"], "decoder_layers.")},
        ),
    }
    index: Index = {}
    written: dict[str, str] = {}
    for kind, (model, files) in parts.items():
        if model is None:
            continue
        for file, (names, keys) in files.items():
            if not known.keys() & set(names):  # a hybrid has nothing to encode
                continue
            with WeightPool(folder / file) as pool:
                one = one_graph and kind == "generator"
                for name in ["step"] if one else names:
                    report(f"trace {name}")
                    graph = trace(graph_module(spec, name, model), known[name], free_tokens=one)
                    pool.take(graph)
                    ir.save(graph, folder / (GENERATOR if one else f"{name}.onnx"))
                written |= {name: GENERATOR if one else f"{name}.onnx" for name in names}
                state = model.state_dict(prefix=f"{kind}.")
                index |= pool.index({key: state[key] for key in state if key.startswith(f"{kind}.{keys}")})
        model.to("meta")
        del graph, state
    write_json(folder / INDEX, index)
    return written


def _command(source: Source, spec: SystemSpec, options: Options | None) -> str:
    """The command line that makes the same bundle again; empty for a model that was made in Python."""
    if not source.options:
        return ""
    words = ["nbp-export", "trt" if options else "onnx", *source.options, "--block", spec.block_text]
    words += ["--dtype", spec.dtype, "--batch", str(spec.batch), *(options.words() if options else ())]
    return command_line(*words)


def _with_trace(folder: Path, manifest: Manifest, report: Report) -> Manifest:
    """The manifest with the trace, which the reference makes with the weights of the files that are there already."""
    report(f"record {TRACE}")
    path = record_trace(Bundle.of(folder, manifest.to_bytes()))
    return replace(manifest, files=tuple(sorted((*manifest.files, File.of(path)), key=lambda file: file.path)))


def _manifest(
    source: Source,
    spec: SystemSpec,
    digest: str,
    folder: Path,
    graphs: dict[str, str],
    engines: tuple[Engine, ...],
    options: Options | None,
) -> Manifest:
    config = {"generator": source.generator.config.to_json()}
    if source.tokenizer:
        config["tokenizer"] = source.tokenizer.config.to_json()
    text = source.generator.config.text
    runtime = (TENSORRT if engines else ORT_CPU).name
    status = status_of(runtime, spec.dtype, [engine.library for engine in engines])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = tuple(pool.map(File.of, sorted(folder.iterdir())))
    return Manifest(
        schema=SCHEMA,
        runtime=runtime,
        spec=spec,
        graphs=graphs,
        engines=engines,
        files=files,
        model={"name": source.name, "config": config, "weights_sha256": digest, "trained": source.trained},
        sampling=Sampling(),
        words=text.words if text else (),
        versions=versions(),
        provenance={"note": source.note, "command": _command(source, spec, options), "status": status},
    )
