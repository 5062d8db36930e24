"""The recipe: YAML in, a typed `Recipe` out, and what makes two recipes compute the same."""

from flatcompress.recipe.reading import load_recipe, parse_recipe
from flatcompress.recipe.schema import SCHEMA, Recipe, StageEntry, json_schema

__all__ = ["SCHEMA", "Recipe", "StageEntry", "json_schema", "load_recipe", "parse_recipe"]
