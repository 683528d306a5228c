"""Exports a model to a bundle: graphs, shared weights, a recorded trace and the proof.

The bundle gets its name last, so that a folder of this name is always complete.
"""

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
from nbp_engines.shell import command_line, is_utf8, utf8_advice
from nbp_engines.spec import BYTES, SystemSpec
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
from nbp_files import locked, require_space, write_bytes, write_json

GENERATOR = "generator.onnx"  # the one graph for prefill and step
DTYPE = "fp16"  # the default dtype of an export


def export(
    source: Source,
    out: Path,
    dtype: str = DTYPE,
    batch: int = 1,
    report: Report = lambda _: None,
    one_graph: bool = False,
    engines: Options | None = None,
) -> Bundle:
    """Write the bundle of a model to a new folder and return it.

    Every graph is checked against the reference before the folder appears. An export that fails or is interrupted
    leaves nothing there. The source cannot be used afterwards, because its models free their memory.

    Args:
        source: the model.
        out: the folder of the bundle, which must not exist.
        dtype: `fp32`, `fp16` or `bf16`; the weights are rounded to it.
        batch: the number of clips that are generated together.
        report: a function that receives the name of each stage as it begins.
        one_graph: whether prefill and step are one graph for any number of tokens instead of two static graphs.
        engines: options for TensorRT engines, which are built from the same files that are checked; None builds none.
            Engines imply `one_graph`.

    Raises UsageError if the folder exists or cannot be created, if its disk has too little space for the weights, or
    for options that are not supported; NbpError if writing fails; LintError, BuildError or ParityError if a graph or an
    engine differs from the reference.
    """
    refuse_out(out)
    require_space(out, _weight_bytes(source, dtype) * (2 if engines else 1))  # TensorRT engines hold the weights again
    spec = system_spec(source.generator.config, source.tokenizer.config if source.tokenizer else None, dtype, batch)
    with _working_folder(out) as folder, torch.no_grad():
        digest = weights_sha256(source.generator, source.tokenizer)
        graphs = _write_graphs(source, spec, folder, report, one_graph or engines is not None)
        built = trt.build_engines(folder, spec.graphs(), graphs, engines, report) if engines else ()
        manifest = _manifest(source, spec, digest, folder, graphs, built, engines)
        content = _with_trace(folder, manifest, report).to_bytes()
        bundle = Bundle.of(folder, content)
        write_json(folder / RECEIPT, prove(bundle, report))
        write_bytes(folder / MANIFEST, content)  # last, so that a killed export leaves no valid bundle
    return replace(bundle, path=out)  # only the folder has changed, so the files are not hashed again


def refuse_out(out: Path) -> None:
    """Raise UsageError if a bundle cannot have this name, because it exists, is too long or is not UTF-8."""
    if not is_utf8(out):
        raise UsageError(f"{out} is not UTF-8, which the runtimes require: {utf8_advice('choose another --out')}")
    try:
        exists = out.exists()
    except OSError as error:
        raise UsageError(f"{out} cannot be the name of a folder ({error.strerror}): choose another --out") from error
    if exists:
        raise UsageError(f"{out} exists: choose another --out, or remove it first")


def _weight_bytes(source: Source, dtype: str) -> int:
    models = [model for model in (source.generator, source.tokenizer) if model]
    return BYTES[dtype] * sum(parameter.numel() for model in models for parameter in model.parameters())


def parse_only(source: Source, options: Options, dtype: str, batch: int, report: Report) -> dict[str, Counter[str]]:
    """Trace, lint and parse the graphs from which `export` would build TensorRT engines; leave no files.

    Returns the number of TensorRT's layers by type, for each graph file. The source cannot be used afterwards.

    Raises LintError, or BuildError with a list of all unsupported nodes.
    """
    library, _, _ = options.resolve()
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
def _working_folder(out: Path) -> Iterator[Path]:
    """Create a working folder beside `out`; rename it to `out` at the end, or remove it after an exception.

    The folder is locked while it is in use. The next export to the same name can therefore recognise and remove folders
    that killed exports left. The umask alone decides the mode of the folder, because some file systems refuse `chmod`.

    Raises UsageError if the folder cannot be created or `out` exists by the end, NbpError if writing fails.
    """
    name = out.name if len(os.fsencode(out.name)) < 200 else hashlib.sha256(out.name.encode()).hexdigest()
    prefix = f".{name}.partial-"
    with ExitStack() as locks:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with locked(out.parent, wait=True):  # no other export may remove a folder before it is locked
                for leftover in out.parent.glob(f"{glob.escape(prefix)}????????"):
                    with locked(leftover) as abandoned:
                        if abandoned:
                            shutil.rmtree(leftover, ignore_errors=True)
                folder = out.parent / f"{prefix}{secrets.token_hex(4)}"
                folder.mkdir()
                locks.enter_context(locked(folder))
        except OSError as error:
            raise UsageError(f"{out.parent} cannot hold the bundle ({error.strerror}): choose another --out") from error
        try:
            yield folder
            _move(folder, out)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            reason = error.strerror or error
            raise NbpError(
                f"the bundle cannot be written to {out.parent} ({reason}): free space there, or choose another --out"
            ) from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _move(folder: Path, out: Path) -> None:
    """Rename a finished bundle; move it file by file if the file system cannot rename a folder.

    Raises UsageError if the name exists by now.
    """
    try:
        folder.rename(out)
        return
    except OSError as error:
        if os.path.lexists(out):
            raise UsageError(
                f"{out} was created by another program ({error.strerror}): choose another --out"
            ) from error
    out.mkdir()
    try:
        for file in sorted(folder.iterdir(), key=lambda file: file.name == MANIFEST):  # last, because it makes a bundle
            shutil.move(file, out / file.name, copy_function=shutil.copyfile)
        folder.rmdir()
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _write_graphs(source: Source, spec: SystemSpec, folder: Path, report: Report, one_graph: bool) -> dict[str, str]:
    """Write graphs, weights and the index of the weights; return the file of each graph by name.

    Each model frees its memory as soon as its graphs are written.
    """
    graph_specs = spec.graphs()
    # By model and data file: the graphs that use the file, and the prefix of the names of their parameters.
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
        for file, (names, prefix) in files.items():
            if not graph_specs.keys() & set(names):  # a hybrid has no encode graph
                continue
            with WeightPool(folder / file) as pool:
                one = one_graph and kind == "generator"
                for name in ["step"] if one else names:
                    report(f"trace {name}")
                    graph = trace(graph_module(spec, name, model), graph_specs[name], free_tokens=one)
                    pool.externalise(graph)
                    ir.save(graph, folder / (GENERATOR if one else f"{name}.onnx"))
                written |= {name: GENERATOR if one else f"{name}.onnx" for name in names}
                state = model.state_dict(prefix=f"{kind}.")
                index |= pool.index({key: state[key] for key in state if key.startswith(f"{kind}.{prefix}")})
        model.to("meta")
        del graph, state
    write_json(folder / INDEX, index)
    return written


def _command(source: Source, spec: SystemSpec, options: Options | None) -> str:
    """Return the command that creates the same bundle; empty for a model that was created in Python."""
    if not source.options:
        return ""
    arguments = ["nbp-export", "trt" if options else "onnx", *source.options, "--block", spec.block_text]
    arguments += ["--dtype", spec.dtype, "--batch", str(spec.batch), *(options.arguments() if options else ())]
    return command_line(*arguments)


def _with_trace(folder: Path, manifest: Manifest, report: Report) -> Manifest:
    """Record the trace with the weights that are in the folder, and return the manifest with the trace's file added."""
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
