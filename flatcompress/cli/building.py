"""The commands that build a data set's folder. Argument passing only, as in `flatcompress.cli.app`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flatcompress.cli.results import Json, show

app = typer.Typer(help="Build a data set from what you have fetched.", no_args_is_help=True)


@app.callback()
def _begin() -> None:
    """Build a data set from what you have fetched."""


@app.command("emoji-domains")
def emoji_domains(
    packages: Annotated[Path, typer.Option(help="folder with the packages, as `npm pack` writes them")],
    out: Annotated[Path, typer.Option(help="where DOMAIN/CLASS/image goes: a folder that is empty or not there")],
    size: Annotated[int, typer.Option(help="side of the pictures in pixels")] = 64,
    domains: Annotated[
        list[str] | None, typer.Option("--domain", help="render, art, cartoon, outline (the default), flat")
    ] = None,
    most: Annotated[int, typer.Option(help="emoji of a class at most")] = 60,
    as_json: Json = False,
) -> None:
    """The same emoji drawn by several vendors, for `data: {name: domains}`: classes from Unicode's subgroups."""
    from flatcompress.data.emoji.building import build
    from flatcompress.data.emoji.packages import DOMAINS

    made = build(packages, out, size, domains or DOMAINS, most)
    classes = ", ".join(f"{name} {count}" for name, count in made["classes"].items())
    left_out = ", ".join(f"{count} {why}" for why, count in made["left_out"].items())
    text = (
        f"wrote {made['folder']}: {made['images']:,} images, {made['identities']} emoji in {len(made['classes'])} "
        f"classes by {', '.join(made['domains'])}.\n{classes}\nleft out: {left_out}\n"
        "The artwork's licences are in LICENSES.txt. Recipe: data: {name: domains, path: FOLDER, group: name, "
        "held_out: DOMAIN}"
    )
    show(made, as_json, text)
