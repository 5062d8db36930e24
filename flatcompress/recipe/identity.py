"""What a recipe computes: the one place that says which recipes are the same.

Run folders, the change of a recipe under a run, certificates and sweeps all ask here. Keys at their defaults are left
out of `digest`, so a key that comes later, off by default, leaves older runs alone. That holds as long as no default
changes what it means: whoever changes one raises `SCHEMA` (a test pins the defaults and says so).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from flatcompress.recipe.schema import SCHEMA, Recipe, StageEntry
from flatcompress.stages.keys import TrainingKeys, flat_hyper

# Keys that cannot change what is computed: where it goes, how often it is saved, who watches, what it is compared with,
# what a failure does.
HARMLESS = frozenset(
    {"output_dir", "name", "device", "threads", "data.workers", "checkpoint_every", "log", "expected", "measure"}
    | {"on_divergence", "max_rollbacks", "on_out_of_memory"}
)
Change = tuple[str, Any, Any]


def digest(recipe: Recipe, stages: int | None = None) -> str:
    """SHA-256 of everything that can change the result of the first ``stages`` stages (None: of all)."""
    raw = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"stages"})
    kept = {"schema": SCHEMA, **_without_harmless(raw), "stages": [_stage(entry) for entry in recipe.stages[:stages]]}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _without_harmless(raw: dict[str, Any], path: str = "") -> dict[str, Any]:
    kept = {}
    for key, value in raw.items():
        if path + key not in HARMLESS:
            left = _without_harmless(value, f"{path}{key}.") if isinstance(value, dict) else value
            if left != {}:
                kept[key] = left
    return kept


def _stage(entry: StageEntry) -> dict[str, Any]:
    """A stage's keys that are not at their defaults, those of the flat method's row in the registry included."""
    keys = entry.config.model_dump(mode="json", exclude_defaults=True)
    usual = flat_hyper(entry.config.flat_method()) if isinstance(entry.config, TrainingKeys) else {}
    return {entry.kind: {k: v for k, v in keys.items() if k not in usual or v != usual[k]}}


def differences(before: Recipe, after: Recipe) -> list[Change]:
    """(key, old, new) of every leaf that differs, harmless keys left out; empty: the two compute the same."""
    return list(changes(before.to_dict(), after.to_dict()))


def changes(before: Any, after: Any, path: str = "") -> Iterator[Change]:
    """`differences` of plain data.

    >>> list(changes({"seed": 0, "stages": [{"train": {"rho": 1}}]}, {"seed": 0, "stages": [{"train": {"rho": 2}}]}))
    [('stages.0.train.rho', 1, 2)]
    """
    if path in HARMLESS:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(k for k in after if k not in before)]:
            yield from changes(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(before, list) and isinstance(after, list) and path == "stages":
        for i in range(max(len(before), len(after))):
            old, new = before[i] if i < len(before) else None, after[i] if i < len(after) else None
            yield from changes(old, new, f"{path}.{i}")
    elif before != after:
        yield path, before, after


def first_stage(found: Iterable[Change]) -> int:
    """The first stage that the changes touch; a key outside ``stages`` touches all.

    >>> first_stage([("stages.2.export.profile", "a", "b")]), first_stage([("stages.1", 1, 2), ("seed", 0, 1)])
    (2, 0)
    """
    return min(_stage_of(path) for path, _, _ in found)


def as_text(found: Iterable[Change]) -> str:
    """A diff, one change a line."""
    return "\n".join(f"  {path}: {_short(old)} -> {_short(new)}" for path, old, new in found)


def _stage_of(path: str) -> int:
    parts = path.split(".")
    return int(parts[1]) if parts[0] == "stages" and len(parts) > 1 else 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
