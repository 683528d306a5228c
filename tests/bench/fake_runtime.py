"""A runtime and an engine for tests only; each is one entry, as a new one would be."""

import os
from typing import Any

from nbp_bench.engines import Engine
from nbp_engines.bundle import Bundle
from nbp_engines.ort import OrtSession
from nbp_engines.runtime import OpenOptions, Runtime


def present() -> None:
    """Return None: the runtime can run here."""


def present_on(device: str) -> None:
    """Return None: the engine can run on every device."""


def described(bundle: Bundle) -> str:  # noqa: ARG001 - the signature of Runtime.description
    return "a fake of version 7"


def opened(bundle: Bundle, options: OpenOptions) -> OrtSession:
    return OrtSession(bundle, options)


def dying(spec: Any, generator: Any, tokenizer: Any, device: str) -> Any:  # noqa: ARG001
    os._exit(3)


FAKE = Runtime(
    name="fake",
    title="a runtime of the tests",
    extra="cpu",
    packages=("pytest",),
    devices=("cpu",),
    dtypes=("fp32",),
    status=("ort-cpu",),
    runs_engines=False,
    shares_weights=True,
    takes_models=False,
    open=opened,
    absence=present,
    description=described,
)
DYING = Engine("dying", "its process dies", ("cpu",), ("fp32",), present_on, open=dying)
