"""The files of a bundle: JSON that nobody vouches for is read strictly, and files are written whole or not at all.

What was read is checked against a table of rules before anything is made of it.
"""

import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from nbp_engines.errors import BundleError
from nbp_errors import printable


@dataclass(frozen=True)
class Kind:
    """Values that pass a test; `what` completes the sentence "it is 3, not …"."""

    what: str
    test: Callable[[Any], bool]


# A tuple is a list of that length, a list of one rule a list of any length, a mapping an object with these names; the
# name `...` stands for all others.
Rule: TypeAlias = "Kind | tuple[Rule, ...] | list[Rule] | Mapping[Any, Rule]"


def whole(least: int, most: int) -> Kind:
    """Whole numbers in a range; True and 3.0 are none."""
    return Kind(f"a whole number from {least:,} to {most:,}", lambda v: type(v) is int and least <= v <= most)


def number(what: str, test: Callable[[float], bool]) -> Kind:
    """Numbers, whole or not, that pass a test."""
    return Kind(what, lambda v: type(v) in (int, float) and test(v))


def matching(what: str, pattern: str) -> Kind:
    """Strings that match a regular expression from end to end."""
    return Kind(what, lambda v: isinstance(v, str) and re.fullmatch(pattern, v) is not None)


ANYTHING = Kind("anything", lambda _: True)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
# Nothing that a terminal would obey, and no half characters, which could not be printed.
TEXT = Kind("printable text", lambda v: isinstance(v, str) and v == printable(v))
FROM_0 = number("a number from 0 up", lambda v: v >= 0)


def check(value: object, rule: Rule, where: str) -> None:
    """Raise BundleError, naming the place inside `where`, unless a value out of JSON is what the rule describes."""
    if isinstance(rule, Kind):
        if not rule.test(value):
            raise _wrong(value, where, rule.what)
    elif isinstance(rule, Mapping):
        if not isinstance(value, dict):
            raise _wrong(value, where, "an object")
        for name in (*rule, *value):
            if name is ...:
                continue
            if name not in value:
                raise BundleError(f"{where} has no {name!r}")
            check(name, TEXT, f"a name in {where}")
            if name not in rule and ... not in rule:
                raise BundleError(f"{where} has {name!r}, which means nothing")
            check(value[name], rule[name if name in rule else ...], f"{where}.{name}")
    else:
        if not isinstance(value, list) or (isinstance(rule, tuple) and len(value) != len(rule)):
            raise _wrong(value, where, f"a list of {len(rule)}" if isinstance(rule, tuple) else "a list")
        rules: Sequence[Rule] = rule if isinstance(rule, tuple) else rule * len(value)
        for index, (item, each) in enumerate(zip(value, rules, strict=True)):
            check(item, each, f"{where}[{index}]")


def _wrong(value: object, where: str, what: str) -> BundleError:
    return BundleError(f"{where} is {reprlib.repr(value)}, not {what}")


def loads(content: bytes) -> Any:
    """The value of a JSON text; raises BundleError for anything that JSON does not have or means two things by."""
    try:
        return json.loads(content, object_pairs_hook=_object, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"not JSON: {error}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there: whatever stops the write leaves the old file, and no other."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        # What stopped the write may stop this as well, and is the error to raise.
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 as `write_bytes` does; half characters, which have no UTF-8, become escapes."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, data: object) -> None:
    """Write JSON as `write_bytes` does."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = dict(pairs)
    if len(names) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r} stands twice in one object")
    return names


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of JSON")
    return value
