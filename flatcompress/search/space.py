"""The space: what a search file lets vary as single parameters, and the recipe that values of them make."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flatcompress import prune
from flatcompress.errors import UserError
from flatcompress.graph import trace
from flatcompress.pipeline import Pipeline
from flatcompress.quant.placement import Settings, place
from flatcompress.recipe import Recipe, parse_recipe
from flatcompress.search.spec import Range, Search
from flatcompress.stages.context import RunContext
from flatcompress.stages.prune import PRUNE_BUDGETS
from flatcompress.yaml_source import override

Values = Mapping[str, Any]  # parameter -> value, as it is stored in the study


@dataclass(frozen=True)
class Parameter:
    """One thing that varies: ``key`` of the recipe, for ``part`` (a layer's or group's name) of it, or for all of it.

    Of settings that go together ``key`` is a name, and a value is {recipe key: value}. ``choices``: texts (JSON) in
    their order; a number has ``low`` and ``high`` instead.
    """

    name: str
    key: str
    range: Range
    part: str | None = None
    choices: tuple[str, ...] = ()

    def value(self, stored: Any) -> Any:
        """The recipe's value for what the study holds."""
        return json.loads(stored) if self.choices else stored

    def stored(self, value: Any) -> Any:
        """What the study holds for a recipe's value: the text of a choice."""
        return json.dumps(value) if self.choices else value


@dataclass
class Space:
    """Every parameter, and the recipes that it makes.

    ``shared``: leading stages that are trained in full at every fidelity, once for all points that agree in them.
    """

    search: Search
    parameters: list[Parameter]
    shared: int
    base: dict[str, Any] = field(default_factory=dict)

    def recipe(self, values: Values, fidelity: Any = "full", where: str = "trial") -> Recipe:
        """The recipe of one point at one fidelity. UserError where the values do not go together."""
        raw = copy.deepcopy(self.base)
        self._set(raw, self._by_key(values, self.parameters))
        raw["stages"] = _kept_stages(raw["stages"], self.shared, fidelity)
        raw["name"] = "trial"
        return parse_recipe(raw, where)

    def beginning(self, values: Values) -> Recipe | None:
        """The stages that a point begins with and shares with others; None where it begins with none."""
        if not self.shared:
            return None
        raw = copy.deepcopy(self.base)
        by_key = self._by_key(values, self.parameters)
        self._set(raw, {k: v for k, v in by_key.items() if _stage_index(k, self.base) < self.shared})
        raw["stages"] = _kept_stages(raw["stages"][: self.shared], self.shared, "full")
        raw["name"] = "start"
        return parse_recipe(raw, "recipe") if raw["stages"] else None

    def _set(self, raw: dict[str, Any], by_key: dict[str, Any]) -> None:
        for key, value in by_key.items():
            if key.endswith(".ratios"):
                _without_budget(raw, key)
            override(raw, f"{key}={json.dumps(value)}")

    def _by_key(self, values: Values, parameters: Iterable[Parameter]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for parameter in parameters:
            value = parameter.value(values[parameter.name])
            if parameter.range.together is not None:
                found |= value
            elif parameter.part is None:
                found[parameter.key] = value
            else:
                found.setdefault(parameter.key, {})[parameter.part] = value
        return found


def _without_budget(raw: dict[str, Any], key: str) -> None:
    """Every group's ratio is given: what the base recipe says of the whole network goes."""
    _, index, kind, _ = key.split(".")
    keys = raw["stages"][int(index)][kind]
    for budget in PRUNE_BUDGETS:
        (keys or {}).pop(budget, None)


def _kept_stages(stages: list[Any], shared: int, fidelity: Any) -> list[Any]:
    """The stages at a fidelity: fewer epochs of what varies, no export, no prune stage where nothing is to go."""
    kept = []
    for index, entry in enumerate(stages):
        ((kind, keys),) = entry.items() if isinstance(entry, dict) else ((entry, None),)
        keys = dict(keys or {})
        ratios = keys.get("ratios")
        if kind == "prune" and ratios and not keys.get("ratio") and not any(ratios.values()):
            continue
        if fidelity != "full" and index >= shared:
            if kind == "export":
                continue
            most = 0 if kind == "quantize" and fidelity == "post_training" else 1
            most = most if fidelity == "post_training" else int(fidelity)
            keys["epochs"] = min(most, int(keys.get("epochs", 10)))
            if not keys["epochs"]:
                keys.pop("patience", None)
        kept.append({kind: keys})
    return kept


def expand(search: Search) -> tuple[Space, RunContext]:
    """The space of a search, and the run as it is before its first stage. UserError for whatever does not fit."""
    if not isinstance(search.recipe, dict):
        raise UserError("search: the recipe is a file name; load the search with load_search.")
    base = copy.deepcopy(search.recipe)
    stages = base.get("stages")
    if not isinstance(stages, list) or not stages:
        raise UserError("search: the recipe has no stages.")
    base["stages"] = [s if isinstance(s, dict) else {s: {}} for s in stages]
    parse_recipe(base, "recipe")
    touched = [_stage_index(key, base) for key in _keys_of(search)]
    shared = (0 if -1 in touched else min(touched)) if search.full_stages is None else search.full_stages
    if shared >= len(base["stages"]):
        raise UserError(
            f"search: full_stages is {shared}, and the recipe has {len(base['stages'])} stages: leave the last ones "
            "to the fidelities, which shorten them."
        )
    space = Space(search, [], shared, base)
    _check_keys(search, base)
    run = Pipeline.from_recipe(parse_recipe({**base, "name": "search"}, "recipe")).prepare(tried=False)
    for key, found in search.space.items():
        space.parameters += _parameters(key, found, run, base)
    return space, run


def _keys_of(search: Search) -> list[str]:
    """Every key of the recipe that varies. UserError for one that varies twice."""
    found: list[str] = []
    for name, range_ in search.space.items():
        together = dict.fromkeys(key for setting in range_.together or () for key in setting)
        for key in [name] if range_.together is None else together:
            if key in found:
                raise UserError(f"space: {key}: it is varied twice, once by {name!r}. Leave it in one place.")
            found.append(key)
    return found


def _stage_index(key: str, base: dict[str, Any]) -> int:
    """The stage that a key belongs to; -1 for one of the whole recipe. UserError where there is no such stage."""
    parts = key.split(".")
    if parts[0] != "stages":
        return -1
    kinds = [next(iter(s)) for s in base["stages"]]
    if len(parts) < 4 or not parts[1].isdigit() or int(parts[1]) >= len(kinds) or kinds[int(parts[1])] != parts[2]:
        known = ", ".join(f"stages.{i}.{kind}" for i, kind in enumerate(kinds))
        raise UserError(f"space: {key}: no such key in the recipe; its stages are {known} (then .KEY).")
    return int(parts[1])


def _check_keys(search: Search, base: dict[str, Any]) -> None:
    """Every end of every range by itself in the recipe. UserError names the key and what is wrong with it."""
    for key, found in search.space.items():
        last = key.rpartition(".")[2]
        if found.per_layer is not None and last != "bits":
            raise UserError(f"space: {key}: per_layer is for bits of a quantize stage.")
        if found.per_group is not None and last != "ratios":
            raise UserError(f"space: {key}: per_group is for ratios of a prune stage.")
        if found.per_layer is not None or found.per_group is not None:
            _check_parts(key, found, base)
            continue
        for value in found.together or found.choice or (found.low, found.high):
            setting = value if isinstance(value, dict) and found.together else {key: value}
            others: dict[str, Any] = {}  # a method's radius is a key only with that method
            for other, range_ in search.space.items():
                if other != key and range_.choice:
                    others[other] = range_.choice[0]
                elif other != key and range_.together:
                    others |= range_.together[0]
            _parsed(base, setting, others, f"space: {key} {value!r}")


def _parsed(base: dict[str, Any], setting: dict[str, Any], others: dict[str, Any], where: str) -> None:
    raw = copy.deepcopy(base)
    for key, value in (setting | others).items():
        override(raw, f"{key}={json.dumps(value)}")
    try:
        parse_recipe(raw, where)
    except UserError:
        plain = copy.deepcopy(base)
        for key, value in setting.items():
            override(plain, f"{key}={json.dumps(value)}")
        parse_recipe(plain, where)


def _check_parts(key: str, found: Range, base: dict[str, Any]) -> None:
    parts = key.split(".")
    kind = {"bits": "quantize", "ratios": "prune"}[parts[-1]]
    if len(parts) != 4 or parts[2] != kind:
        raise UserError(f"space: {key}: expected stages.N.{kind}.{parts[-1]}.")
    for value in found.per_layer or found.per_group or ():
        raw = copy.deepcopy(base)
        override(raw, f"{key}={json.dumps({'layer': value})}")
        if kind == "prune":
            _without_budget(raw, key)
        parse_recipe(raw, f"space: {key} {value!r}")


def _parameters(key: str, found: Range, run: RunContext, base: dict[str, Any]) -> list[Parameter]:
    if found.per_layer is not None:
        texts = tuple(json.dumps(v) for v in sorted(found.per_layer))
        names = free_layers(key, run, base)
        return [Parameter(f"{key}:{name}", key, found, name, texts) for name in names]
    if found.per_group is not None:
        texts = tuple(json.dumps(v) for v in sorted(found.per_group))
        names = [name for name, _ in groups(key, run, base)]
        return [Parameter(f"{key}:{name}", key, found, name, texts) for name in names]
    choices = found.together or found.choice
    if choices is not None:
        return [Parameter(key, key, found, None, tuple(json.dumps(v) for v in choices))]
    return [Parameter(key, key, found)]


def _keys(key: str, base: dict[str, Any]) -> dict[str, Any]:
    _, index, kind, _ = key.split(".")
    return dict(base["stages"][int(index)][kind] or {})


def free_layers(key: str, run: RunContext, base: dict[str, Any]) -> list[str]:
    """Layers whose bits the recipe leaves open: not the first, the last, or one that stays float."""
    keys = _keys(key, base)
    names = ("first_last_bits", "activation_bits", "weight_bits")
    given = {name: keys[name] for name in names if name in keys}
    rows, _, _ = place(
        trace(run.model, run.example()), run.model, Settings(**given, ignore=tuple(keys.get("ignore", ())))
    )
    free = [row.name for row in rows if row.why == "weight_bits"]
    if not free:
        raise UserError(f"space: {key}: no layer is free to choose its bits: all are first, last or ignored.")
    return free


def groups(key: str, run: RunContext, base: dict[str, Any]) -> list[tuple[str, Any]]:
    """(name of its first layer, group) of every group of channels that may be cut."""
    found = prune.find_groups(run.model, run.example(), _keys(key, base).get("ignore", ()))
    if not found:
        raise UserError(f"space: {key}: the model has no channels that can be cut.")
    return [((group.outs or group.members)[0].name, group) for group in found]
