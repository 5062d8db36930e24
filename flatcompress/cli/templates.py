"""The recipes that `flatcompress init` writes: the files in `starters/`."""

from __future__ import annotations

from importlib.resources import files

STARTERS: dict[str, str] = {
    file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
    for file in sorted(files("flatcompress.cli").joinpath("starters").iterdir(), key=lambda file: file.name)
}
