"""Reading the JSON files of a bundle.

JSON from an unknown source is parsed strictly and checked against a table of rules before it is used.
"""

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from nbp_engines.errors import BundleError
from nbp_errors import printable


@dataclass(frozen=True)
class Kind:
    """The rule for one value.

    Attributes:
        description: what the value should be. It completes the sentence "it is 3, not …".
        test: returns whether a value follows the rule.
    """

    description: str
    test: Callable[[Any], bool]


# A tuple of rules describes a list of that length. A list with one rule describes a list of any length. A mapping
# describes an object with exactly these names; the name `...` allows others.
Rule: TypeAlias = "Kind | tuple[Rule, ...] | list[Rule] | Mapping[Any, Rule]"


def whole(least: int, most: int) -> Kind:
    """Return the rule for whole numbers from `least` to `most`. True and 3.0 do not count as whole numbers."""
    return Kind(f"a whole number from {least:,} to {most:,}", lambda v: type(v) is int and least <= v <= most)


def number(description: str, test: Callable[[float], bool]) -> Kind:
    """Return the rule for whole numbers and floats that pass a test."""
    return Kind(description, lambda v: type(v) in (int, float) and test(v))


def matching(description: str, pattern: str) -> Kind:
    """Return the rule for strings that a regular expression matches completely."""
    return Kind(description, lambda v: isinstance(v, str) and re.fullmatch(pattern, v) is not None)


ANYTHING = Kind("anything", lambda _: True)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
# Control characters could command a terminal, and surrogates cannot be printed.
TEXT = Kind("printable text", lambda v: isinstance(v, str) and v == printable(v))
FROM_0 = number("a number from 0 up", lambda v: v >= 0)


def check(value: object, rule: Rule, where: str) -> None:
    """Raise BundleError unless a JSON value follows a rule.

    Args:
        value: the parsed JSON.
        rule: what it should be.
        where: the name of the value, with which the error's message says where in the file the fault is.
    """
    if isinstance(rule, Kind):
        if not rule.test(value):
            raise _error(value, where, rule.description)
    elif isinstance(rule, Mapping):
        if not isinstance(value, dict):
            raise _error(value, where, "an object")
        for name in (*rule, *value):
            if name is ...:
                continue
            if name not in value:
                raise BundleError(f"{where} has no {name!r}")
            check(name, TEXT, f"a name in {where}")
            if name not in rule and ... not in rule:
                raise BundleError(f"{where} has the unknown name {name!r}")
            check(value[name], rule[name if name in rule else ...], f"{where}.{name}")
    else:
        if not isinstance(value, list) or (isinstance(rule, tuple) and len(value) != len(rule)):
            raise _error(value, where, f"a list of {len(rule)}" if isinstance(rule, tuple) else "a list")
        item_rules: Sequence[Rule] = rule if isinstance(rule, tuple) else rule * len(value)
        for index, (item, item_rule) in enumerate(zip(value, item_rules, strict=True)):
            check(item, item_rule, f"{where}[{index}]")


def _error(value: object, where: str, expected: str) -> BundleError:
    return BundleError(f"{where} is {reprlib.repr(value)}, not {expected}")


def loads(content: bytes) -> Any:
    """Return the value of a JSON text.

    Raises BundleError for anything that is not standard JSON, including NaN, infinity and numbers too large for a
    float, and for a name that occurs twice in one object.
    """
    try:
        return json.loads(content, object_pairs_hook=_object, parse_constant=_float, parse_float=_float)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"not JSON: {error}") from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = dict(pairs)
    if len(names) < len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {repeated!r} occurs twice in one object")
    return names


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value
