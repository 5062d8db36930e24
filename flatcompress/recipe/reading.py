"""YAML in, a checked `Recipe` out, or an error that says what to do.

Every error names the file, the line, the key, what was found, what is allowed and the nearest valid spelling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from flatcompress.errors import UserError, nearest
from flatcompress.recipe.schema import SCHEMA, Recipe
from flatcompress.stages import stage_of
from flatcompress.stages.keys import KeyProblem
from flatcompress.yaml_source import MAX_BYTES, override, parse_yaml


def parse_recipe(raw: Any, where: str = "recipe", lines: dict[tuple[Any, ...], int] | None = None) -> Recipe:
    """Check plain data and return the `Recipe`. UserError lists every problem found, one a line."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a recipe is a mapping of keys (name, data, model, stages ...), found {_short(raw)}.")
    schema = raw.get("schema", SCHEMA)
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        at = f"{where}:{lines['schema',]}" if lines and ("schema",) in lines else where
        raise UserError(
            f"{at}: schema: found {_short(schema)}; this version of flatcompress reads recipes up to schema {SCHEMA}. "
            "A newer one wrote this recipe: update flatcompress, or leave the key out."
        )
    try:
        return Recipe.model_validate({key: value for key, value in raw.items() if key != "schema"})
    except ValidationError as error:
        problems = [_message(e, where, lines or {}) for e in error.errors()]
        raise UserError("\n".join(dict.fromkeys(problems))) from None


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read, override and check a recipe file. UserError for everything that is wrong with it."""
    try:
        size = Path(path).stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: {size} bytes is no recipe; at most {MAX_BYTES} are read.")
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            f"{path}: cannot be read ({reason}). Give the path of a recipe, or write one: flatcompress init."
        ) from None
    raw, lines = parse_yaml(text, str(path))
    for setting in overrides:
        if not isinstance(raw, dict):
            break
        override(raw, setting)
    return parse_recipe(raw, str(path), lines)


def _message(error: Any, where: str, lines: dict[tuple[Any, ...], int]) -> str:
    loc = list(error["loc"])
    cause = (error.get("ctx") or {}).get("error")
    if isinstance(cause, KeyProblem):
        loc += [int(k) if k.isdigit() else k for k in cause.key.split(".")]
    line = _line(loc, lines)
    at = f"{where}:{line}" if line else where
    key = ".".join(str(k) for k in loc) or "recipe"
    return f"{at}: {key}: {_what(error, loc, cause)}"


def _line(loc: list[Any], lines: dict[tuple[Any, ...], int]) -> int | None:
    """The line of the key, or of the closest parent that stands in the file."""
    for end in range(len(loc), -1, -1):
        if tuple(loc[:end]) in lines:
            return lines[tuple(loc[:end])]
    return None


def _what(error: Any, loc: list[Any], cause: Any) -> str:
    if isinstance(cause, KeyProblem):
        return str(cause)
    if error["type"] == "extra_forbidden":
        return _unknown_key(loc)
    if error["type"] == "missing":
        return "this key is missing."
    found = f", found {_short(error['input'])}" if "found" not in error["msg"] else ""
    return f"{error['msg'].removeprefix('Value error, ')}{found}."


def _unknown_key(loc: list[Any]) -> str:
    known = _known_keys(loc[:-1])
    guess = nearest(str(loc[-1]), known)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return f"unknown key.{hint} Allowed: {', '.join(known)}."


def _known_keys(loc: list[Any]) -> list[str]:
    """The keys of the section that ``loc`` leads to; none where that is no section."""
    model: Any = Recipe
    if loc[:1] == ["stages"] and len(loc) > 2:
        model, loc = stage_of(loc[2]).config, loc[3:]
    for key in loc:
        field = model.model_fields.get(key)
        model = field.annotation if field else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
