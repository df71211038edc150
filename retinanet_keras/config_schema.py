"""Settings as dataclasses: fields with limits and sources, and their construction from JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from retinanet_keras.errors import ConfigError
from retinanet_keras.storage import strict_json
from retinanet_keras.storage.printable import printable

LONGEST = 60  # characters of a value or a key in a message


def setting(default: Any, source: str, doc: str, **limits: Any) -> Any:
    """Define a dataclass field with its source, one line of documentation, and limits.

    Args:
        default: the default value.
        source: str. Where the default comes from.
        doc: str. What the setting is.
        **limits: `choices` (a tuple), `at_least`, `above`, `at_most`, `below`; each applies to all elements of a tuple.
    """
    return field(default=default, metadata={"source": source, "doc": doc, **limits})


def describe(root: type) -> list[tuple[str, str, str, str]]:
    """List (key, default, documentation, source) of every setting of a dataclass and its sections, in order."""
    rows = []

    def walk(cls: Any, prefix: str) -> None:
        for item in dataclasses.fields(cls):
            if item.default is dataclasses.MISSING:
                walk(item.default_factory, f"{prefix}{item.name}.")
            else:
                default = json.dumps(item.default)
                rows.append((prefix + item.name, default, item.metadata["doc"], item.metadata["source"]))

    walk(root, "")
    return rows


def apply(root: type, tree: dict[str, Any], override: str) -> None:
    """Apply an override `a.b=value` to a tree of dicts from which the dataclass `root` will be built."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set expects section.key=value, such as train.batch_size=4; got {show(override)}")
    *sections, last = key.split(".")
    kind = _kind_of(root, sections, last)
    try:
        value = strict_json.parse(text)
    except strict_json.JsonError:
        value = text
    if kind is str and not isinstance(value, str):  # a folder may be named 2017
        value = text
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: expected {section} to be a section in this file, got {show(tree)}")
    tree[last] = value


def _kind_of(cls: Any, sections: Sequence[str], last: str) -> Any:
    """The annotated type at a key path; None where there is no such key, which `build` reports."""
    for section in sections:
        cls = typing.get_type_hints(cls).get(section)
        if not dataclasses.is_dataclass(cls):
            return None
    return typing.get_type_hints(cls).get(last)


def build(root: type, tree: Any) -> Any:
    """Build the dataclass `root` from a tree of dicts, checking names, types and limits.

    Raises:
        ConfigError: naming the key, what was expected, and the nearest valid key.
    """
    return _build(root, tree, "", root)


def _build(cls: Any, tree: Any, path: str, root: type) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{path.rstrip('.')}: expected a JSON object of settings, got {show(tree)}")
    known = {item.name: item for item in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        if name not in known:
            shown = printable(name, LONGEST)
            raise ConfigError(f"unknown key {path}{shown}.{_nearest(path + shown, root)}")
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value, f"{path}{name}.", root)
        else:
            values[name] = _convert(value, hints[name], known[name].metadata, path + name)
    return cls(**values)


def _nearest(key: str, root: type) -> str:
    """A hint naming the most similar valid key in any section."""
    keys = [row[0] for row in describe(root)]
    sections = sorted({k.rsplit(".", 1)[0] for k in keys})
    leaf = key.rsplit(".", 1)[-1]
    elsewhere = [k for k in keys + sections if k.rsplit(".", 1)[-1] == leaf]  # the right name in another section
    near = difflib.get_close_matches(key, elsewhere, 1, 0.0) or difflib.get_close_matches(key, keys + sections, 1, 0.5)
    if not near:
        by_leaf = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
        near = [by_leaf[n] for n in difflib.get_close_matches(leaf, by_leaf, 1, 0.6)]
    return (
        f" Did you mean {near[0]}?" if near else f" The sections are {', '.join(s for s in sections if '.' not in s)}."
    )


def _convert(value: Any, hint: Any, limits: Mapping[str, Any], key: str) -> Any:
    """Convert a JSON value to the annotated type, or raise a ConfigError."""
    if typing.get_origin(hint) is tuple:
        item, *rest = typing.get_args(hint)
        count = None if Ellipsis in rest else 1 + len(rest)
        if not isinstance(value, (list, tuple)) or (count or len(value)) != len(value) or not value:
            expected = f"a list of {count}" if count else "a list of one or more"
            raise ConfigError(f"{key}: expected {expected} {_type_name(item)} values, got {show(value)}")
        return tuple(_convert(v, item, limits, f"{key}[{i}]") for i, v in enumerate(value))
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < sys.float_info.max else math.inf
        if isinstance(value, option) and not (isinstance(value, bool) and bool not in options):
            break
    else:
        raise ConfigError(f"{key}: expected {' or '.join(map(_type_name, options))}, got {show(value)}")
    if value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: expected a finite number, got {value}")
    if isinstance(value, str) and not _is_name(value):
        raise ConfigError(f"{key}: expected text that is valid in a file name, got {show(value)}")
    if "choices" in limits and value not in limits["choices"]:
        near = difflib.get_close_matches(str(value), map(str, limits["choices"]), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}: expected one of {', '.join(map(str, limits['choices']))}, got {show(value)}.{hint}")
    for name, holds, words in (
        ("at_least", lambda v, limit: v >= limit, "at least"),
        ("above", lambda v, limit: v > limit, "a number above"),
        ("at_most", lambda v, limit: v <= limit, "at most"),
        ("below", lambda v, limit: v < limit, "a number below"),
    ):
        if name in limits and not holds(value, limits[name]):
            raise ConfigError(f"{key}: expected {words} {limits[name]}, got {show(value)}")
    return value


def _is_name(text: str) -> bool:
    """Whether the text is valid in a file name: no lone surrogates, no null characters."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _type_name(kind: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "null"}[kind]


def show(value: Any) -> str:
    """Format a value as short JSON."""
    try:
        text = json.dumps(value, default=str)
    except (RecursionError, ValueError):  # deeply nested, or an integer with more digits than Python formats
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
