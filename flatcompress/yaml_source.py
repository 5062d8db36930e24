"""YAML text as plain data, with the line every key stands on.

YAML is loaded safely: no tags, no aliases (so no alias bombs), no duplicate keys, a size and a depth limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from flatcompress.errors import UserError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
Path = tuple[Any, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-3 as the number it looks like to everybody."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
        if key_node.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
            )
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# YAML 1.1 wants a dot and a signed exponent in a float, so PyYAML reads 1e-3 as text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> tuple[Any, dict[Path, int]]:
    """Parse YAML into plain data and a map from key path to line. UserError with the line when it is not YAML."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{where}: {len(text)} characters is no recipe; at most {MAX_BYTES} are read.")
    try:
        for depth, event in _depths(text):
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{where}:{_line(event)}: aliases (*name) are not read in recipes.")
            if depth > MAX_DEPTH:
                raise UserError(f"{where}:{_line(event)}: nested deeper than {MAX_DEPTH} levels.")
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: not valid YAML: {problem}.") from None
    lines: dict[Path, int] = {}
    if node is not None:
        _lines(node, (), lines)
    return value, lines


def _line(event: yaml.Event) -> int:
    """The line an event starts on, counted from 1; an event without a mark counts as the first."""
    return event.start_mark.line + 1 if event.start_mark is not None else 1


def _depths(text: str) -> Iterator[tuple[int, yaml.Event]]:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        yield depth, event


def _lines(node: yaml.Node, path: Path, out: dict[Path, int]) -> None:
    out.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            out[(*path, key.value)] = key.start_mark.line + 1
            _lines(value, (*path, key.value), out)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _lines(value, (*path, i), out)


def override(raw: Any, setting: str) -> None:
    """Apply one ``--set a.b.0.c=value`` to plain data in place. UserError when the path does not exist."""
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise UserError(f"--set {setting}: expected key=value, for example --set stages.1.prune.ratio=0.7.")
    value, _ = parse_yaml(text, f"--set {path}")
    keys = path.split(".")
    target = raw
    for i, key in enumerate(keys[:-1]):
        target = _descend(target, key, ".".join(keys[:i]) or "the recipe", setting)
    _assign(target, keys[-1], value, setting)


def _descend(target: Any, key: str, where: str, setting: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, key, where, setting)]
    if not isinstance(target, dict):
        raise UserError(f"--set {setting}: {where} is {target!r} and has no keys.")
    if target.get(key) is None:
        target[key] = {}
    return target[key]


def _assign(target: Any, key: str, value: Any, setting: str) -> None:
    if isinstance(target, list):
        target[_index(target, key, "the list", setting)] = value
    elif isinstance(target, dict):
        target[key] = value
    else:
        raise UserError(f"--set {setting}: {target!r} has no key {key!r}.")


def _index(items: list[Any], key: str, where: str, setting: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise UserError(f"--set {setting}: {where} has items 0 to {len(items) - 1}, found {key!r}.")
    return int(key)
