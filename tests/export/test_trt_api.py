"""Every name of TensorRT that our code uses exists in TensorRT 11, and every call fits its signature.

Nothing of TensorRT 11 is executed here. The names and calls are read from our source code, and compared with the Python
bindings of both libraries.
"""

import ast
import importlib
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from tests.export.bindings import Api, api, api_without_libraries

ROOT = Path(__file__).parents[2]
# The files that use the libraries: they build and run engines.
USERS = ("nbp_export/trt.py", "nbp_export/trt_library.py", "engines/nbp_engines/trt.py")
# Expressions that stand for the library's module in these files.
LIBRARY = re.compile(r"(.*[._])?trt|tensorrt(_rtx)?|library(\.load)?\(\)")
# Names that only TensorRT-RTX has, and that our code uses: it builds without a GPU, and compiles kernels when an engine
# is loaded. The name of a class includes all of its members.
RTX_ONLY = frozenset(
    {
        *("ComputeCapability", "num_compute_capabilities", "set_compute_capability"),
        *("DynamicShapesKernelSpecializationStrategy", "dynamic_shapes_kernel_specialization_strategy"),
        *("CudaGraphStrategy", "cuda_graph_strategy", "is_stream_capturable"),
    }
)


@pytest.fixture(scope="module")
def rtx() -> Api:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'nbp-export[trt-rtx]'")
    return api("tensorrt_rtx")


@pytest.fixture(scope="module")
def trt11(tmp_path_factory: pytest.TempPathFactory) -> Api:
    if not importlib.util.find_spec("tensorrt_bindings"):
        pytest.skip("pip install --no-deps tensorrt-cu13-bindings")
    if missing := [tool for tool in ("cc", "readelf") if not shutil.which(tool)]:
        pytest.skip(f"stand-ins for TensorRT's libraries need {' and '.join(missing)}")
    return api_without_libraries("tensorrt_bindings", tmp_path_factory.mktemp("stand-ins"))


def with_rtx_only(trt11: Api, rtx: Api) -> Api:
    """Return the API of TensorRT 11, extended by the names in RTX_ONLY."""
    return trt11 | {
        owner: trt11.get(owner, {}) | {n: made for n, made in members.items() if n in RTX_ONLY or owner in RTX_ONLY}
        for owner, members in rtx.items()
    }


# Reading of the names that our code uses.


class Reader(ast.NodeVisitor):
    """Finds uses of names that a library does not have, and calls that do not fit its signatures.

    The class of a value is inferred through variables, members and calls, as far as the signatures give it. A
    variable without an inferred class has the class that variables of the same name have elsewhere. For any other
    value, the name must be a member of some class of the library, a name of Python or one of our own names.
    """

    def __init__(self, library: Api, sources: Mapping[str, str]) -> None:
        self.library = library
        self.anywhere = set().union(*library.values())
        self.elsewhere = our_names().union(*map(defined, sources.values()), *map(python_names, sources.values()))
        self.usual: dict[str, str | None] = {}  # classes of variables in all sources, None of those with several
        for _ in range(3):  # each pass uses the classes of variables that the previous one inferred
            self.used: set[tuple[str | None, str]] = set()
            self.faults: list[str] = []
            for self.file, source in sources.items():
                self.owners: dict[str, str | None] = {}  # classes of variables in scope; None if not TensorRT's
                self.visit(ast.parse(source))

    def owner(self, node: ast.expr) -> str | None:
        """Return the class of a value, or the class itself; "" for the library's module; None if it is unknown."""
        text = ast.unparse(node)
        if text in self.owners or LIBRARY.fullmatch(text):
            return self.owners.get(text, "")
        match node:
            case ast.Name(name):
                return self.usual.get(name)
            case ast.Call(function):
                return self.owner(function)
            case ast.Attribute(value, name) if (owner := self.owner(value)) is not None:
                results = [made.rpartition("-> ")[2] for made in self.library[owner].get(name, [])]
                return results[0] if results and results[0] in self.library else None
        return None

    def use(self, node: ast.expr, owner: str | None, name: str) -> None:
        """Record the use of a member."""
        self.used.add((owner, name))
        available = self.anywhere | self.elsewhere if owner is None else self.library[owner].keys()
        if name not in available:
            self.fault(node, f"{'nobody' if owner is None else owner or 'it'} has no {name}")

    def fault(self, node: ast.expr, text: str) -> None:
        """Record a fault."""
        self.faults.append(f"{self.file}:{node.lineno} {text}")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = dict(self.owners)
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                self.owners[argument.arg] = None
                if not argument.annotation or ast.unparse(argument.annotation) == "Any":
                    del self.owners[argument.arg]
        self.generic_visit(node)
        self.owners = outer | {text: owner for text, owner in self.owners.items() if text.startswith("self.")}

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.owners[node.id] = None

    def visit_Assign(self, node: ast.Assign) -> None:
        owner = self.owner(node.value)
        self.generic_visit(node)
        for target in node.targets:
            for each in target.elts if isinstance(target, ast.Tuple) else []:
                self.owners.pop(ast.unparse(each), None)
            text = ast.unparse(target).removesuffix(".__class__")
            self.owners[text] = owner
            if isinstance(target, ast.Name) and owner and self.usual.setdefault(text, owner) != owner:
                self.usual[text] = None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self.use(node, self.owner(node.value), node.attr)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func).startswith("os.environ"):  # names of environment variables look like members of enums
            return
        self.generic_visit(node)
        match node:
            case ast.Call(ast.Name("getattr" | "hasattr" | "setattr"), [value, ast.Constant(str(name)), *_]):
                self.use(node, self.owner(value), name)
            case ast.Call(ast.Attribute(value, name)) if name != "__init__":  # called on a class, with self
                owner = self.owner(value)
                owners = self.library.values() if owner is None else [self.library[owner]]
                made = [signature for members in owners for signature in members.get(name, [])]
                ours = owner is None and name in self.elsewhere
                if made and not ours and not any(fits(node, signature) for signature in made):
                    self.fault(node, f"{ast.unparse(node)} is no call of {name}{made[0]}")

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and re.fullmatch(
            "[A-Z][A-Z_]+", node.value
        ):  # a member of an enum, used by name
            self.use(node, None, node.value)


def fits(call: ast.Call, signature: str) -> bool:
    """Return whether a call fits a signature. A property cannot be called."""
    arguments = re.match(r"\((.*)\)", signature)
    if not arguments or any(isinstance(each, ast.Starred) for each in call.args):
        return bool(arguments)
    names = re.findall(r"\w+", arguments[1])
    required = set(re.findall(r"\w+(?!\w|=)", arguments[1]))
    given = names[: len(call.args)] + [keyword.arg or "" for keyword in call.keywords]
    return len(call.args) <= len(names) and required <= set(given) <= set(names) and len(set(given)) == len(given)


def python_names(source: str) -> set[str]:
    """Return all names of Python's builtins and of modules that a source imports, except ours and TensorRT's."""
    modules = {"builtins"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    names: set[str] = set()
    for name in modules:
        if not name.startswith(("nbp_", "tensorrt")):
            with suppress(ImportError):
                module = importlib.import_module(name)
                names.update(dir(module), *(dir(kind) for kind in vars(module).values() if isinstance(kind, type)))
    return names


def defined(source: str) -> set[str]:
    """Return the names that a source defines in modules and classes, and on self."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Module(body) | ast.ClassDef(body=body):
                for line in body:
                    match line:
                        case ast.FunctionDef(name) | ast.ClassDef(name):
                            names.add(name)
                        case ast.AnnAssign(ast.Name(name)) | ast.Assign([ast.Name(name)]):
                            names.add(name)
            case ast.Attribute(ast.Name("self"), name, ast.Store()):
                names.add(name)
    return names


@cache
def our_names() -> frozenset[str]:
    """Return the names that our packages define."""
    sources = [*(ROOT / "nbp_export").rglob("*.py"), *(ROOT / "engines").rglob("*.py")]
    return frozenset().union(*(defined(source.read_text()) for source in sources))


# The check, and tests that it can fail.


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {name: (ROOT / name).read_text() for name in USERS if (ROOT / name).exists()}


def test_both_libraries_have_all_that_we_use(sources: dict[str, str], rtx: Api, trt11: Api) -> None:
    for library in (rtx, with_rtx_only(trt11, rtx)):
        reader = Reader(library, sources)
        assert reader.faults == []
        # As a control: the classes of values are inferred.
        assert {("", "Builder"), ("Builder", "build_serialized_network")} < reader.used
    assert "tensorrt_bindings" not in sys.modules


def test_both_take_the_same_arguments(sources: dict[str, str], rtx: Api, trt11: Api) -> None:
    assert list(changed({name for _, name in Reader(rtx, sources).used}, rtx, trt11)) == []


def changed(names: set[str], rtx: Api, trt11: Api) -> Iterator[str]:
    """Yield the signatures of used members that TensorRT 11 does not have."""
    for owner in rtx.keys() & trt11.keys():
        for name in names & rtx[owner].keys() & trt11[owner].keys():
            yield from (f"{owner}.{name}{made}" for made in rtx[owner][name] if made not in trt11[owner][name])


def test_names_in_rtx_only_are_used_and_missing_in_tensorrt_11(sources: dict[str, str], rtx: Api, trt11: Api) -> None:
    used = {name for _, name in Reader(rtx, sources).used}
    there, here = (set().union(*library.values()) for library in (rtx, trt11))
    assert used & there - here >= RTX_ONLY


BUILD = "trt = library()\nbuilder = trt.Builder(logger)\nnetwork = builder.create_network()\n"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("trt.BuilderFlag.FP16", "BuilderFlag has no FP16"),  # as TensorRT 10 had it
        ("builder.platform_has_fast_fp16", "Builder has no platform_has_fast_fp16"),
        ("network.add_einsumm(inputs, equation)", "INetworkDefinition has no add_einsumm"),
        ("trt.ProfilingVerbosty.DETAILED", "it has no ProfilingVerbosty"),
        ("builder.create_builder_config().create_network", "IBuilderConfig has no create_network"),  # another class's
        ("network.get_layer(0).type.KV_CACHE", "LayerType has no KV_CACHE"),
        ("def f(layer): layer.num_inputz", "nobody has no num_inputz"),
        ("def f(engine): getattr(engine, 'is_refittable')", "nobody has no is_refittable"),
        ("x = 'KV_CACHE_UPDAT' == str(network)", "nobody has no KV_CACHE_UPDAT"),
        ("trt.BuilderFlag.REQUIRE_USER_ALLOCATION", "BuilderFlag has no REQUIRE_USER_ALLOCATION"),  # only RTX's
        ("builder.create_network(0, 1)", "is no call of create_network(flags=...) -> INetworkDefinition"),
        ("trt.Builder()", "is no call of Builder(logger) -> Builder"),
        ("def f(context): context.execute_async_v3(strem_handle=0)", "is no call of execute_async_v3(stream_handle)"),
        ("network.num_layers()", "is no call of num_layers-> int"),
    ],
)
def test_a_fault_is_found(line: str, fault: str, rtx: Api, trt11: Api) -> None:
    faults = Reader(with_rtx_only(trt11, rtx), {"x.py": BUILD + line}).faults
    assert len(faults) == 1, faults
    assert faults[0].startswith("x.py:4 ")
    assert fault in faults[0]


def test_nothing_else_is_a_fault(rtx: Api, trt11: Api) -> None:
    source = (
        BUILD
        + """
network.get_layer(0).type.KV_CACHE_UPDATE.name.lower()
builder.create_network(flags=1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)).num_inputs
config = builder.create_builder_config()
config.set_compute_capability(trt.ComputeCapability.SM80, 0)
config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
config = config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=True)
config.bit_length()
"""
    )
    assert Reader(with_rtx_only(trt11, rtx), {"": source}).faults == Reader(rtx, {"": source}).faults == []


def test_changed_arguments_are_found(rtx: Api, trt11: Api) -> None:
    other = trt11 | {"Builder": trt11["Builder"] | {"create_network": ["(mode, flags=...) -> INetworkDefinition"]}}
    assert list(changed({"create_network"}, rtx, other)) == ["Builder.create_network(flags=...) -> INetworkDefinition"]
