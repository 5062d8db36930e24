"""What a finished run says of its point: accuracies from the ledger, costs of the widths that its plan leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flatcompress.errors import UserError
from flatcompress.latency import device
from flatcompress.latency.table import BELOW, LatencyTable
from flatcompress.plan import Plan, apply_plan
from flatcompress.prune import CostModel
from flatcompress.recipe import Recipe
from flatcompress.search.spec import Search
from flatcompress.session import restore, stage_id
from flatcompress.stages.context import RunContext
from flatcompress.store.runfolder import RunFolder
from flatcompress.sweep.pool import val_accuracy


def _table(run: RunContext, activation_bits: int = 8) -> LatencyTable:
    try:
        return LatencyTable(run.model.cpu(), run.example().cpu(), activation_bits=activation_bits)
    except UserError as error:
        raise UserError(f"objective 'ms': {error} Leave it out, or take latency_ms with an export stage.") from None


class Measuring:
    """Measures of runs of one search. ``run``: as it is before its first stage."""

    def __init__(self, search: Search, run: RunContext) -> None:
        self.run = run
        wanted = {*search.objectives, *search.budgets}
        self._check(wanted, search)
        self.tables = {8: _table(run)} if "ms" in wanted else {}
        self.on_device = not wanted.isdisjoint(device.UNITS)

    def _check(self, wanted: set[str], search: Search) -> None:
        """UserError for what this data and recipe cannot say."""
        data = self.run.data
        kinds = data.corrupted if self.run.measuring != "off" else {}
        there = {"held_out": data.held_out is not None, "corrupted": bool(kinds)}
        there["robust"] = any(there.values())
        missing = [name for name, found in there.items() if name in wanted and not found]
        if missing:
            raise UserError(
                f"objective {missing[0]!r}: the data has no held-out domain and no corrupted images"
                f"{' (measure: off)' if self.run.measuring == 'off' else ''}. Give data.held_out or data.corruptions, "
                "or another objective (val, test)."
            )
        stages = search.recipe["stages"] if isinstance(search.recipe, dict) else []
        if "latency_ms" in wanted and not any("export" in s or s == "export" for s in stages):
            raise UserError("objective 'latency_ms' is of an exported file: put an export stage last, or use 'ms'.")
        of_device = [name for name in device.UNITS if name in wanted]
        if not of_device:
            return
        if not any("quantize" in s or s == "quantize" for s in stages):
            raise UserError(f"objective {of_device[0]!r} is of integer C: the recipe needs a quantize stage.")
        try:
            device.decided(self.run.model, self.run.example())
        except UserError as error:
            raise UserError(f"objective {of_device[0]!r}: {error}") from None

    def of(self, folder: Path, recipe: Recipe) -> dict[str, float | None]:
        """Every measure of a finished run; None for what it does not have."""
        there = RunFolder(folder)
        rows = there.read_ledger()
        last = rows[-1]
        accuracy = last["metrics"][last["metric"]["name"]] if "metric" in last else last["accuracy"]
        seen = [v for v in (accuracy["held_out"], accuracy["corrupted"]) if v is not None]
        found: dict[str, Any] = {
            **{k: accuracy[k] for k in ("test", "held_out", "corrupted")},
            "robust": sum(seen) / len(seen) if seen else None,
            "val": val_accuracy(there.log),
            **{k: last.get(k) for k in ("bytes", "macs", "params", "latency_ms")},
            "passes": sum(row["passes"] or 0 for row in rows),
            "seconds": sum(row["seconds"] or 0 for row in rows),
        }
        found["sharpness"] = next((r["sharpness"] for r in reversed(rows) if r.get("sharpness") is not None), None)
        found["ms"] = self._ms(there, recipe) if self.tables else None
        if self.on_device:
            found |= self._device(there)
        return found

    def _ms(self, there: RunFolder, recipe: Recipe) -> float:
        """Milliseconds at the run's widths and activation bits; float activations count as 8 bits."""
        given = [entry.config.activation_bits for entry in recipe.stages if entry.kind == "quantize"]
        narrow = BELOW if given and (given[-1] or 8) < 8 else 8
        if narrow not in self.tables:
            self.tables[narrow] = _table(self.run, narrow)
        return self.tables[narrow](self._widths(there, recipe))

    def _device(self, there: RunFolder) -> dict[str, float]:
        """Flash, RAM and instructions of the trained network that the run left."""
        run = replace(self.run, model=self.run.build(), plan=Plan(), corrupted=None)
        restore(run, there.load())
        return device.measured(device.of_quantized(run.model.cpu(), run.example().cpu()))

    def _widths(self, there: RunFolder, recipe: Recipe) -> Any:
        """Widths of every layer of the network that the run's plan leaves."""
        plan = Plan.load(there.checkpoints / stage_id(recipe, len(recipe.stages) - 1) / "plan.json")
        cut = Plan([step for step in plan.steps if step.kind != "quantizers"])
        twin = apply_plan(self.run.build().cpu(), cut, self.run.example().cpu())
        return CostModel(twin, self.run.example().cpu()).dense
