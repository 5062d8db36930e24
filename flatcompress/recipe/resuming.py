"""Whether a recipe can resume the run that is in a folder, and from which stage on."""

from __future__ import annotations

from flatcompress.errors import UserError
from flatcompress.recipe import identity
from flatcompress.recipe.reading import parse_recipe
from flatcompress.recipe.schema import SCHEMA, Recipe
from flatcompress.store import checkpoint
from flatcompress.store.runfolder import RunFolder
from flatcompress.yaml_source import parse_yaml


def first_changed_stage(folder: RunFolder, recipe: Recipe) -> int | None:
    """None when the folder's recipe is this one; else the first stage that changed, if that is still to come.

    UserError when what changed was already used, or the run is of a version that this one cannot resume.
    """
    text = folder.read_recipe()
    if text is None:
        if next(checkpoint.newest_first(folder.checkpoints), None) is not None:
            raise UserError(
                f"{folder.path} holds checkpoints and no recipe.yaml, so nothing says whose run they are. Run with "
                "--restart to start over (they are removed), or give this run another name."
            )
        return None
    before, schema = _recipe_before(folder, text)
    found = identity.differences(before, recipe)
    if schema == SCHEMA and not found:
        return None
    latest = checkpoint.load_latest(folder.checkpoints)
    begun = 0 if latest is None else latest.stage_index + 1
    if begun and schema != SCHEMA:
        raise UserError(
            f"{folder.path} holds a run of an earlier version of flatcompress (recipe schema {schema}, this version "
            f"has {SCHEMA}), which cannot be resumed. Its files can still be read (report, verify, export). Run with "
            "--restart to start over (its results are removed), or give this run another name."
        )
    if not found:
        return None
    first = identity.first_stage(found)
    if first < begun:
        raise UserError(
            f"{folder.path} holds a run of another recipe, and what changed was already used:\n"
            f"{identity.as_text(found)}\n"
            "Run with --restart to start over (its results are removed), or give this run another name."
        )
    return first


def _recipe_before(folder: RunFolder, text: str) -> tuple[Recipe, int]:
    """The folder's own recipe and its schema number, 1 where there is none. UserError when it cannot be read."""
    where = str(folder.recipe)
    try:
        raw, _ = parse_yaml(text, where)
        return parse_recipe(raw, where), int(raw.get("schema", 1))
    except UserError as error:
        raise UserError(f"{where}: not a recipe any more ({error}). Run with --restart to start over.") from None
