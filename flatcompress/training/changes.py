"""What differs between two recipes, as plain data, and the first stage that it touches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

# Keys that cannot change what is computed: where it goes, how often it is saved, who watches, what a failure does.
HARMLESS = frozenset(
    {"output_dir", "name", "device", "threads", "data.workers", "checkpoint_every", "log"}
    | {"on_divergence", "max_rollbacks", "on_out_of_memory"}
)
Change = tuple[str, Any, Any]


def changes(before: Any, after: Any, path: str = "") -> Iterator[Change]:
    """(key, old, new) of every leaf that differs, harmless keys left out.

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
