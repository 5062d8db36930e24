"""Pages that are made when the site is built: the recipe's keys, the registries, the command line, the Python API.

MkDocs calls ``on_files`` and ``on_nav``; every page comes from the code that it describes, so none can go out of date.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGES = ("flatcompress", "flat", "quant", "prune", "graph", "onnx_export", "models", "data", "training", "report")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages to the files of the site."""
    made = {
        "reference/recipe.md": recipe_page(),
        "reference/lists.md": lists_page(),
        "reference/command-line.md": command_line_page(),
        "reference/api.md": api_page(),
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    for path in sorted(p.relative_to(config.docs_dir) for p in (Path(config.docs_dir) / "results").glob("*.md")):
        if path.name != "README.md":
            config.nav[-1] = _results(config.nav[-1], str(path))
    return files


def _results(entry: dict[str, Any], path: str) -> dict[str, Any]:
    """The results section of the navigation, with one more page."""
    (title, pages), *_ = entry.items()
    listed = pages if isinstance(pages, list) else [pages]
    return {title: listed if path in listed else [*listed, path]}


def recipe_page() -> str:
    """Every key of a recipe: type, default, what it does; from the JSON schema."""
    from flatcompress.recipe import json_schema

    schema = json_schema()
    lines = [
        "# Recipe keys",
        "",
        "Made from the schema (`flatcompress schema` prints it for editors). A stage also takes the hyper-parameters",
        "of the flat-minima method that it names; their defaults are the method's own: see [the lists](lists.md).",
        "",
        *_section("The recipe", schema),
    ]
    for name, section in schema["$defs"].items():
        if "properties" in section and name != "StageEntry":
            lines += _section(name.removesuffix("Config"), section)
    return "\n".join(lines)


def _section(title: str, schema: dict[str, Any]) -> list[str]:
    about = schema.get("description", "").split("\n\n")[0].replace("\n", " ")
    lines = [f"## {title}", "", about, "", "| key | type | default | what it does |", "|---|---|---|---|"]
    for key, field in schema["properties"].items():
        if field.get("description", "").startswith("hyper-parameter of the flat method"):
            continue
        shown = "*(required)*" if key in schema.get("required", ()) else _shown(field)
        lines.append(f"| `{key}` | {_type(field)} | {shown} | {_cell(field.get('description', ''))} |")
    return [*lines, ""]


def _shown(field: dict[str, Any]) -> str:
    if "$ref" in field or isinstance(field.get("default"), dict):
        return "see its section"
    default = field.get("default", [] if field.get("type") == "array" else None)
    return "none" if default in (None, []) else f"`{_cell(str(default))}`"


def _type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return " \\| ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[1].removesuffix("Config")
    for several in ("anyOf", "allOf", "oneOf"):
        if several in field:
            return " or ".join(dict.fromkeys(_type(part) for part in field[several] if part.get("type") != "null"))
    name = str(field.get("type", "any"))
    if name == "array":
        return f"list of {_type(field.get('items', {}))}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]}" for key, sign in bounds.items() if key in field]
    return f"{name} {', '.join(limits)}".strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def lists_page() -> str:
    """Every registry as a table: what can be named in a recipe."""
    from flatcompress.cli.commands import catalogue

    lines = [
        "# Methods, models, data, profiles",
        "",
        "What a recipe can name; `flatcompress list` prints the same.",
        "",
    ]
    for kind, rows in catalogue().items():
        lines += [f"## {kind}", "", "| name | what it is | defaults | paper |", "|---|---|---|---|"]
        for row in rows:
            defaults = ", ".join(f"`{k}={v!r}`" for k, v in row["defaults"].items())
            paper = f"arXiv {row['paper']}" if row["paper"] else ""
            lines.append(f"| `{row['name']}` | {_cell(row['summary'])} | {_cell(defaults)} | {paper} |")
        lines.append("")
    return "\n".join(lines)


def command_line_page() -> str:
    """The help text of every command."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from flatcompress.cli import app as module

    names = sorted(get_command(module.app).commands)  # type: ignore[attr-defined]
    runner = CliRunner()
    lines = [
        "# Command line",
        "",
        "Exit codes: 0 done; 2 the input is wrong; 3 the run failed or a certificate does not hold;",
    ]
    lines += ["130 interrupted. Results go to stdout (`--json` for machines), progress to stderr.", ""]
    for name in names:
        text = runner.invoke(
            module.app, [name, "--help"], env={"COLUMNS": "110", "TERM": "dumb", "NO_COLOR": "1"}
        ).output
        lines += [f"## flatcompress {name}", "", "```text", text.strip(), "```", ""]
    return "\n".join(lines)


USUAL = (
    "Five arguments mean the same everywhere: `model`, a torch module, changed in place where the text says so; "
    "`example_input`, a tensor [B, ...] of any B, or a tuple or dictionary of them for several inputs, by which the "
    "model is traced; `batches`, an iterable of inputs or of (input, target); `seed`, a whole number, the same one "
    "giving the same result on a processor; `path`, a file's path."
)


def api_page() -> str:
    """One section per public package with everything in its ``__all__``."""
    lines = ["# Python API", "", "What a package exports is public; everything else may change.", "", USUAL, ""]
    for package in PACKAGES:
        name = package if package == "flatcompress" else f"flatcompress.{package}"
        module = importlib.import_module(name)
        public = [n for n in getattr(module, "__all__", ()) if not n.startswith("_") and n not in PACKAGES]
        if not public:
            continue
        lines += [f"## `{name}`", "", (module.__doc__ or "").strip(), ""]
        for public_name in public:
            lines += [f"::: {_where(module, public_name)}", "    options: {heading_level: 3}", ""]
    return "\n".join(lines)


def _where(module: Any, name: str) -> str:
    """The path at which a public object is defined; plain values are documented where they are exported."""
    found = getattr(module, name)
    if hasattr(found, "__path__") or type(found).__name__ == "module":
        return str(found.__name__)
    own = str(getattr(found, "__module__", "")).startswith("flatcompress")
    if own and hasattr(found, "__qualname__"):
        return f"{found.__module__}.{found.__qualname__}"
    return f"{module.__name__}.{name}"
