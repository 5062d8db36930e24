"""How a command gives its result: as text, or as JSON for machines."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def show(value: Any, as_json: bool, text: str) -> None:
    """Print a result: JSON for machines, else text."""
    typer.echo(json.dumps(value, indent=1) if as_json else text)
