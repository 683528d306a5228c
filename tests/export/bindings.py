"""Lists the members of TensorRT's Python bindings with their signatures. The native libraries are not needed."""

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

# Class name ("" for the module) → member → signatures, as in "(a, b=...) -> Class", or "-> Class" for a property.
Api = dict[str, dict[str, list[str]]]


def api(package: str) -> Api:
    """Import a package of bindings, and return its members."""
    module = importlib.import_module(package)
    owners = {"": module} | {name: member for name, member in vars(module).items() if isinstance(member, type)}
    owners["ILogger.Severity"] = module.ILogger.Severity  # the only class that is nested in another class
    return {
        name: {
            member: signatures(value, owner)
            for member in dir(owner)
            if not isinstance(value := getattr(owner, member), ModuleType)
        }
        for name, owner in owners.items()
    }


def signatures(member: object, owner: object) -> list[str]:
    """Return the signatures in a member's docstring, without self and the types of arguments."""
    if isinstance(member, property):
        made = re.findall(r"(-> .+)$", member.fget.__doc__ or "", re.M) if member.fget else []
    elif isinstance(owner, type) and isinstance(member, owner):  # a member of an enum
        made = [f"-> {owner.__qualname__}"]
    elif isinstance(member, type):
        documented = member.__init__.__doc__  # type: ignore[misc]
        constructors = re.findall(r"^(?:\d+\. )?__init__(\(.*\)) -> None$", documented, re.M)
        made = [f"{arguments} -> {member.__qualname__}" for arguments in constructors or [""]]
    else:
        made = re.findall(r"^(?:\d+\. )?\w+(\(.*\) -> .+)$", member.__doc__ or "", re.M)
    # Reduce class names to their last part. The printed default values are not valid Python, so they are replaced.
    texts = (re.sub(r"\b([a-z]\w*(\.|::))+", "", re.sub("<.*?>", "...", text)).strip() for text in made)
    return [untyped(text) if text.startswith("(") else text for text in texts]


def untyped(signature: str) -> str:
    """Return a signature without self and the types of arguments; unchanged if it is not valid Python."""
    with suppress(SyntaxError):
        function = ast.parse(f"def _{signature}: ...").body[0]
        assert isinstance(function, ast.FunctionDef)
        arguments = function.args
        optional = len(arguments.args) - len(arguments.defaults)
        names = [f"{argument.arg}{'=...' * (i >= optional)}" for i, argument in enumerate(arguments.args)]
        return f"({', '.join(names[names[:1] == ['self'] :])}){signature[signature.rindex(' -> ') :]}"
    return signature


def api_without_libraries(package: str, folder: Path) -> Api:
    """Return the members of a package of bindings whose native libraries are missing.

    A separate process imports the package with stand-ins for the libraries, which are written to a folder.
    """
    spec = importlib.util.find_spec(package)
    assert spec
    assert spec.origin
    stand_ins(Path(spec.origin).with_name("tensorrt.so"), folder)
    code = f"import json; from {__name__} import api; print(json.dumps(api({package!r})))"
    paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))
    environment = os.environ | {"LD_LIBRARY_PATH": paths}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: Api = json.loads(done.stdout)
    return result


def stand_ins(bindings: Path, folder: Path) -> None:
    """Compile libraries that have the names and functions which the bindings need; the functions do nothing."""
    reader = ["readelf", "-dW", "--dyn-syms", str(bindings)]
    table = subprocess.run(reader, capture_output=True, text=True, check=True).stdout
    functions = re.findall(r"FUNC +GLOBAL DEFAULT +UND (\w+)$", table, re.M)  # functions of the C library have versions
    first, *others = re.findall(r"NEEDED.*\[(libnv.+)\]", table)
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions)
    compiler = ["cc", "-shared", "-fPIC", "-nostdlib", "-o", folder / first, "-x", "c", "-"]
    subprocess.run(compiler, input=source, text=True, check=True)
    for name in others:
        (folder / name).symlink_to(first)
