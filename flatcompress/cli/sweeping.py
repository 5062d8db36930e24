"""The commands that run many recipes: sweep and search. Argument passing only, as in `flatcompress.cli.app`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flatcompress.cli.results import Json, show

Jobs = Annotated[int | None, typer.Option(min=1, max=256, help="runs at the same time")]
On = Annotated[str, typer.Option("--on", help="where runs are computed: local | ray | ray://HOST:PORT")]
StoragePath = Annotated[str | None, typer.Option(help="on Ray: folder or URL (s3://...) that all machines reach")]


def sweep(
    file: Annotated[Path, typer.Argument(help="the sweep, a YAML file", show_default=False)],
    jobs: Jobs = None,
    on: On = "local",
    storage_path: StoragePath = None,
    plan: Annotated[bool, typer.Option("--plan", help="write every run's recipe and print its command")] = False,
    as_json: Json = False,
) -> None:
    """Run methods x seeds x held-out domains and write one table; the same command again resumes it."""
    from flatcompress.cli.commands import plan_sweep, run_sweep_file

    if plan:
        commands = plan_sweep(file)
        show(commands, as_json, "\n".join(commands))
        return
    text, data = run_sweep_file(file, jobs, on, storage_path)
    show(data, as_json, text)


def search(
    file: Annotated[Path, typer.Argument(help="the search, a YAML file", show_default=False)],
    jobs: Jobs = None,
    n_trials: Annotated[int | None, typer.Option(min=1, help="points that are tried")] = None,
    timeout: Annotated[str | None, typer.Option(help="begin nothing after so long: 90s, 5m, 2h")] = None,
    storage: Annotated[str | None, typer.Option(help="Optuna storage: sqlite:///FILE, postgresql://...")] = None,
    on: On = "local",
    storage_path: StoragePath = None,
    as_json: Json = False,
) -> None:
    """Search bits, channels, methods and any key of a recipe for a Pareto front; the same command goes on with it."""
    from flatcompress.cli.commands import run_search_file

    given = {"jobs": jobs, "n_trials": n_trials, "timeout": timeout, "storage": storage, "storage_path": storage_path}
    text, data = run_search_file(file, {k: v for k, v in given.items() if v is not None}, on)
    show(data, as_json, text)
