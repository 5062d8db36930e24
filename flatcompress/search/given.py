"""Points that a user gives to begin with: settings of the space's keys, or a recipe, by hand or found earlier."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from flatcompress.errors import UserError
from flatcompress.recipe import parse_recipe
from flatcompress.search.space import Parameter, Space

_OF_ALL = {"bits": "weight_bits", "ratios": "ratio"}  # key that says of all parts at once what these say of each


def points(space: Space) -> list[dict[str, Any]]:
    """The search's ``starts`` as parameters, each once. UserError for a value that the space does not hold."""
    found: list[dict[str, Any]] = []
    for number, start in enumerate(space.search.starts):
        where = f"starts.{number}"
        if isinstance(start, str):
            raise UserError(f"{where} is a file name; load the search with load_search.")
        point = _of_recipe(start, space, where) if "stages" in start else _of_settings(start, space, where)
        space.recipe(point, "full", where)
        if point not in found:
            found.append(point)
    return found


def as_in(space: Space, raw: dict[str, Any]) -> dict[str, Any]:
    """Parameters of no layer or group that the space holds as the recipe ``raw`` has them; the rest is left out."""
    source, found = _Source(raw, space, "recipe"), {}
    for p in space.parameters:
        if p.part is None:
            try:
                found[p.name] = source.stored(p)
            except UserError:
                continue
    return found


def _of_recipe(raw: dict[str, Any], space: Space, where: str) -> dict[str, Any]:
    source = _Source(raw, space, where)
    return {p.name: source.stored(p) for p in space.parameters}


def _of_settings(start: dict[str, Any], space: Space, where: str) -> dict[str, Any]:
    """{key of the space: value}; what is not named is as in the base recipe."""
    unknown = [key for key in start if key not in space.search.space]
    if unknown:
        raise UserError(f"{where}: {unknown[0]} is not in the space. Allowed: {', '.join(space.search.space)}.")
    base, found = _Source(space.base, space, f"{where}, as in the base recipe"), {}
    for p in space.parameters:
        if p.key not in start:
            found[p.name] = base.stored(p)
            continue
        value = start[p.key]
        if p.part is not None and isinstance(value, dict):
            if p.part not in value:
                raise UserError(f"{where}: {p.key} says nothing of {p.part!r}: name all, or give one number for all.")
            value = value[p.part]
        found[p.name] = _stored(p, value, where)
    return found


@dataclass
class _Source:
    """A recipe that parameters are read from. Its stages are the base recipe's, by kind; one may be missing."""

    raw: dict[str, Any]
    space: Space
    where: str

    def __post_init__(self) -> None:
        whole = parse_recipe({**self.raw, "name": "start"}, self.where).to_dict()
        left, self.stages = list(whole.pop("stages")), {}
        for index, entry in enumerate(self.space.base["stages"]):
            kind = next(iter(entry))
            at = next((i for i, other in enumerate(left) if kind in other), None)
            if at is not None:
                self.stages[str(index)] = left[at]
                left = left[at + 1 :]
        self.whole = whole

    def stored(self, p: Parameter) -> Any:
        """What the study holds for ``p``. UserError where the space has no such value."""
        if p.range.together is not None:
            return self._together(p)
        head, _, last = p.key.rpartition(".")
        if head.startswith("stages.") and head.split(".")[1] not in self.stages and p.key.split(".")[2] == "prune":
            return self._uncut(p, last)
        if p.part is None:
            return _stored(p, self._value(p.key), self.where)
        of_all, of_each = self._value(f"{head}.{_OF_ALL[last]}"), self._value(p.key)
        if of_all is None and isinstance(of_each, dict) and last == "ratios":
            of_all = 0.0
        value = of_each.get(p.part, of_all) if isinstance(of_each, dict) else of_all
        if value is None:
            raise UserError(f"{self.where}: {p.key}: the recipe does not say it of {p.part!r}. Give it here.")
        return _stored(p, value, self.where)

    def _uncut(self, p: Parameter, last: str) -> Any:
        """Of a prune stage that the recipe does not have: nothing goes, and the other keys do not matter."""
        if last == "ratios":
            return _stored(p, 0.0, self.where)
        try:
            return _stored(p, self._value(p.key), self.where)
        except UserError:
            return p.choices[0] if p.choices else p.range.low

    def _together(self, p: Parameter) -> str:
        for text in p.choices:
            if all(_same(self._value(key), value) for key, value in json.loads(text).items()):
                return text
        raise UserError(f"{self.where}: {p.key}: the recipe is like none of the settings in the space.")

    def _value(self, key: str) -> Any:
        parts = key.split(".")
        if parts[0] == "stages" and parts[1] not in self.stages:
            if parts[2] != "prune":
                raise UserError(f"{self.where}: {key}: the recipe has no such stage.")
            base = parse_recipe({**self.space.base, "name": "base"}, "recipe").to_dict()
            return _looked_up(base, parts)
        return _looked_up(self.stages[parts[1]], parts[2:]) if parts[0] == "stages" else _looked_up(self.whole, parts)


def _looked_up(raw: Any, parts: list[str]) -> Any:
    for part in parts:
        if isinstance(raw, list):
            raw = raw[int(part)] if part.isdigit() and int(part) < len(raw) else None
        else:
            raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def _same(a: Any, b: Any) -> bool:
    """Equal, and yes or no only to itself; of a mapping, what ``b`` names."""
    if isinstance(a, dict) and isinstance(b, dict):
        return all(key in a and _same(a[key], value) for key, value in b.items())
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _stored(p: Parameter, value: Any, where: str) -> Any:
    for text in p.choices:
        if _same(json.loads(text), value):
            return text
    if p.choices:
        raise UserError(f"{where}: {p.name}: {value!r} is not in the space. Allowed: {', '.join(p.choices)}.")
    low, high = p.range.low, p.range.high
    assert low is not None and high is not None
    number = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    step = p.range.step or (1 if p.range.whole else None)
    if not number or (step is not None and abs((value - low) / step - round((value - low) / step)) > 1e-9):
        steps = "" if step is None else f" in steps of {step}"
        raise UserError(f"{where}: {p.name}: {value!r} is not in the space. Allowed: {low} to {high}{steps}.")
    return value if p.range.whole else float(value)
