"""JSON that programs write and people may edit: read once, checked whole against type hints."""

import json
import math
import re
import sys
from collections.abc import Callable
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false",
         list: "a list", dict: "an object", NoneType: "null"}  # fmt: skip


class Rule(NamedTuple):
    """What a value must be beyond its type, as in Annotated[float, Rule(...)]."""

    is_kept: Callable
    expected: str  # in words: "a number from 0 to 1"


Probability = Annotated[float, Rule(lambda p: 0 <= p <= 1, "a number from 0 to 1")]
Count = Annotated[int, Rule(lambda n: n >= 0, "a whole number of at least 0")]
FilePath = Annotated[str, Rule(lambda text: text and "\0" not in text, "a path")]
Digest = Annotated[
    str, Rule(re.compile(r"[0-9a-f]{64}").fullmatch, "a SHA-256 in hexadecimal digits")
]
FileName = Annotated[
    str, Rule(re.compile(r"[^/\\\0]+\.pt").fullmatch, "a file name in .pt, without folders")
]


def parse_json(text):
    """Parsed JSON. Raises ValueError, also for NaN, infinity, a key that an object has twice, and
    what is nested too deeply."""
    try:
        return json.loads(
            text, parse_constant=parse_finite, parse_float=parse_finite, object_pairs_hook=join
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_finite(text):
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def join(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.40} is there twice")
    return found


def as_json(content, indent=None):
    """Plain values as JSON; ValueError for NaN and infinity, which JSON does not have."""
    return json.dumps(content, indent=indent, allow_nan=False)


def check(kind, value, place="", is_open=False):
    """Refuse plain values that are not as a type hint says.

    Args:
        kind: int, float (finite), str, bool, list, list[T], dict, dict[str, T], A | B, Literal,
            Annotated[T, Rule], a TypedDict or a dataclass, whose keys a dict must have.
        place: of the value in its document: "combinations.axial".
        is_open: dicts may have more keys than a TypedDict or a dataclass names.

    Raises:
        ValueError: with the place and what is expected there.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        check(parts[0], value, place, is_open)
        rule = parts[1]
        if not rule.is_kept(value):
            raise mismatch(place, rule.expected, value)
    elif origin in (UnionType, Union):
        check_any(parts, value, place, is_open)
    elif origin is Literal:
        if not any(type(value) is type(one) and value == one for one in parts):
            raise mismatch(place, " or ".join(map(repr, parts)), value)
    elif origin in (list, dict):
        check(origin, value, place)
        pairs = value.items() if origin is dict else enumerate(value)
        for key, one in pairs:
            if origin is dict:
                check(parts[0], key, f"{place}, a key" if place else "a key")
            check(parts[-1], one, inside(place, key), is_open)
    elif kind is not Any and kind not in NAMES:
        check_keys(kind, value, place, is_open)
    elif kind is float:
        # Written so that NaN and a whole number that is too large for a float are refused.
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise mismatch(place, NAMES[kind], value)
    elif kind is not Any and type(value) is not kind:
        raise mismatch(place, NAMES[kind], value)


def check_any(kinds, value, place, is_open):
    """`check` against a union; what is wrong is told of the first of its kinds."""
    faults = []
    for kind in kinds:
        try:
            return check(kind, value, place, is_open)
        except ValueError as error:
            faults.append(error)
    raise faults[0]


def check_keys(kind, value, place, is_open):
    """`check` against a TypedDict or a dataclass."""
    check(dict, value, place)
    hints = get_type_hints(kind, include_extras=True)
    for name, hint in hints.items():
        if get_origin(hint) is NotRequired:
            (hint,) = get_args(hint)
            if name not in value:
                continue
        if name not in value:
            raise ValueError(f"{inside(place, name)} is missing")
        check(hint, value[name], inside(place, name), is_open)
    if not is_open and (unknown := value.keys() - hints.keys()):
        raise ValueError(f"{inside(place, min(unknown, key=str))} is not known here")


def inside(place, key):
    return f"{place}.{key}" if place else str(key)


def mismatch(place, expected, value):
    return ValueError(f"{place or 'the whole'}: {expected} is expected, not {value!r:.40}")
