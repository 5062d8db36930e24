"""What a run shows on the terminal: the ledger as a table, and live progress that is quiet when nobody watches.

Both take the plain data of the ledger and of log events. On a terminal `Progress` keeps one live line (stage, epoch,
loss, accuracy, what is being measured, time left with the measuring in it) below a line for every decision and every
finished stage; anywhere else it prints those lines alone, so that a log file of a batch system stays readable.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flatcompress.report.numbers import duration, mapping, number, percent, records, significant, size, text
from flatcompress.report.remaining import Remaining
from flatcompress.report.tables import columns_of, lookup


def ledger_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The ledger as a rich table: a row per stage, columns that nobody measured left out, a dash for a null."""
    plain = [dict(row) for row in rows]
    columns = [c for c in columns_of(plain) if c.key != "passes" and any(lookup(r, c.key) is not None for r in plain)]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("method", style="dim", overflow="ellipsis")
    for column in columns:
        table.add_column(column.title.lower(), justify="right", no_wrap=True)
    for i, row in enumerate(plain):
        style = "bold" if i == len(plain) - 1 else ""
        cells = [Text(column.show(lookup(row, column.key))) for column in columns]
        table.add_row(Text(text(row.get("stage"), 24)), Text(text(row.get("method"), 24)), *cells, style=style)
    return table


_CLASSES = 12  # that are named when a run begins
_WHOLE = 5  # lines on layers that stay whole, a stage


class Progress:
    """Shows log events as they come; a context manager.

    ``console`` defaults to stderr. ``event`` takes one event dict and never raises for a strange one: showing progress
    must not cost a run.

    >>> import io
    >>> out = io.StringIO()
    >>> with Progress(Console(file=out)) as progress:
    ...     progress.event({"event": "warning", "stage": "1-prune", "message": "fc keeps its channels"})
    >>> print(out.getvalue().strip())
    ! 1-prune: fc keeps its channels
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._live: Live | None = None
        self._stage: dict[str, Any] = {}
        self._epoch: dict[str, Any] = {}
        self._entered = self._begun = clock()
        self._remaining = Remaining(clock)
        self._doing: tuple[str, bool, float] | None = None  # what, whether it measures, since when
        self._step: float | None = None  # epochs done, as steps tell it
        self._layers = ""  # what was last said of them
        self._kept: tuple[float, float] | None = None  # channels of this stage
        self._whole = 0  # layers of this stage that keep their channels or weights

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._stage = {}
            self._live.stop()
            self._live = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """The same as `event`."""
        self.event(event)

    def event(self, event: Mapping[str, Any]) -> None:
        """Take one event of the log."""
        self._remaining.event(event)
        show = getattr(self, f"_on_{text(event.get('event'), 20)}", None)
        if show is not None:
            show(event)

    def __rich__(self) -> Table | Text:
        """The live line."""
        if not self._stage and self._doing is None:
            return Text("")
        grid = Table.grid(padding=(0, 2))
        done, total = number(self._epoch.get("epoch")) or 0, number(self._stage.get("epochs"))
        cells: list[Any] = [Text(self._label(), style="bold")] if self._stage else []
        if self._doing is not None:
            what, measures, since = self._doing
            cells.append(Text(f"measuring: {what}" if measures else what))
            cells.append(Text(self._time_left() or duration(self._clock() - since), style="dim"))
        elif total is not None and 0 < total < 1e9:  # a bar counts in whole cells
            cells += [
                ProgressBar(total=total, completed=min(max(done, self._step or 0), total), width=24),
                Text(f"epoch {done:.0f}/{total:.0f}"),
            ]
            cells += [Text(part, style="dim") for part in (_measures(self._epoch), self._time_left()) if part]
        else:
            cells.append(Text(duration(self._clock() - self._entered), style="dim"))
        grid.add_row(*cells)
        return grid

    def _on_run(self, event: Mapping[str, Any]) -> None:
        resumed = text(event.get("resumed_at"), 60)
        self._say(
            f"{text(event.get('name'), 60)}: resumes at {resumed}" if resumed else text(event.get("name"), 60), "dim"
        )
        classes = event.get("classes")
        if isinstance(classes, list) and classes:
            more = f" and {len(classes) - _CLASSES} more" if len(classes) > _CLASSES else ""
            named = ", ".join(text(c, 30) for c in classes[:_CLASSES])
            self._say(f"{text(event.get('data'), 60)}: {len(classes)} classes: {named}{more}", "dim")

    def _on_stage(self, event: Mapping[str, Any]) -> None:
        self._stage, self._epoch, self._whole = dict(event), {}, 0
        self._kept = self._doing = self._step = None
        self._entered = self._clock()
        if self._live is None:
            epochs = number(event.get("epochs"))
            self._say(f"{self._label()}: {epochs:.0f} epochs" if epochs else self._label())

    def _on_epoch(self, event: Mapping[str, Any]) -> None:
        self._epoch = dict(event)
        self._stage.setdefault("epochs", event.get("epochs"))

    def _on_step(self, event: Mapping[str, Any]) -> None:
        step, steps, epochs = (
            number(found) for found in (event.get("step"), event.get("steps"), self._stage.get("epochs"))
        )
        if step is not None and steps and epochs:
            self._step = epochs * step / steps

    def _on_doing(self, event: Mapping[str, Any]) -> None:
        what = text(event.get("what"), 60)
        self._doing = (what, event.get("measuring") is True, self._clock()) if what else None

    def _on_prune(self, event: Mapping[str, Any]) -> None:
        kept, total = number(event.get("kept_channels")), number(event.get("total_channels"))
        if kept is not None and total is not None:
            self._kept = (kept, total)

    def _on_bits(self, event: Mapping[str, Any]) -> None:
        bits = mapping(event.get("bits"))
        counts = Counter(text(b, 8) for b in bits.values())
        listed = ", ".join(f"{count} at {b}" for b, count in sorted(counts.items()))
        budget, unit = number(event.get("budget")), text(event.get("unit"), 30).replace("_", " ")
        self._say(f"bits chosen for {significant(budget)} {unit}: {listed} (layers at bits)", "dim", mark="  ")

    def _on_selected(self, event: Mapping[str, Any]) -> None:
        measured = _measures(event)
        self._say(f"kept: the weights with {measured}" if measured else "", "dim", mark="  ")

    def _on_layers(self, event: Mapping[str, Any]) -> None:
        rows = records(event.get("layers"))
        bits = {text(row.get("name"), 60): number(row.get("weight_bits")) for row in rows}
        low = [name for name, b in bits.items() if b is not None and b < 32]
        dense = [name for name in bits if name not in low]
        if not low:
            return
        named = ", ".join(dense[:_WHOLE]) + (f" and {len(dense) - _WHOLE} more" if len(dense) > _WHOLE else "")
        stays = f"; stays float: {named}" if dense else ""
        line = f"{len(low)} of {len(bits)} layers quantized{stays}"
        if line != self._layers:  # the exported file's are said where they are others
            self._say(line, "dim", mark="  ")
        self._layers = line

    def _on_protected(self, event: Mapping[str, Any]) -> None:
        self._whole += 1
        if self._whole <= _WHOLE:
            self._say(f"{text(event.get('name'), 80)} stays whole: {text(event.get('reason'), 160)}", "dim", mark="  ")
        elif self._whole == _WHOLE + 1:
            self._say("and more layers stay whole: see the report", "dim", mark="  ")

    def _on_tie_free(self, event: Mapping[str, Any]) -> None:
        left = mapping(event.get("left"))
        for name, reason in list(left.items())[:_WHOLE]:
            self._say(f"{text(name, 80)}: sums may tie: {text(reason, 160)}", "dim", mark="  ")
        if len(left) > _WHOLE:
            self._say(f"and {len(left) - _WHOLE} more where sums may tie: see the log", "dim", mark="  ")

    def _on_sampled(self, event: Mapping[str, Any]) -> None:
        counts = [number(event.get(key)) for key in ("parts", "of_parts", "samples", "of_samples")]
        if event.get("what") == "corruption" and None not in counts:
            parts, of_parts, samples, of_samples = counts
            told = (
                f"under corruption: {parts:.0f} of {of_parts:.0f} kinds and severities, on {samples:.0f} of "
                f"{of_samples:.0f} samples (measure: full takes all)"
            )
            self._say(told, "dim", mark="  ")
        if event.get("what") == "proof" and None not in counts[2:]:
            told = f"proof on {counts[2]:.0f} of {counts[3]:.0f} test samples (measure: full takes all)"
            self._say(told, "dim", mark="  ")
        if event.get("what") in ("calibration", "statistics") and None not in counts[2:]:
            name = "activation scales" if event.get("what") == "calibration" else "BatchNorm's statistics"
            told = f"{name} from {counts[2]:.0f} of {counts[3]:.0f} samples: an eighth of so short a training"
            self._say(told, "dim", mark="  ")
        layers, of, samples = (number(event.get(key)) for key in ("layers", "of", "samples"))
        if layers is not None and of is not None and samples is not None:
            told = f"sharpness of {layers:.0f} of {of:.0f} layers, on {samples:.0f} samples (measure: full takes all)"
            self._say(told, "dim", mark="  ")

    def _on_row(self, event: Mapping[str, Any]) -> None:
        row = mapping(event.get("row"))
        name = text(event.get("stage"), 40) or text(row.get("stage"), 40)
        columns = [c for c in columns_of([row]) if c.key.startswith(("accuracy.", "metrics."))]
        parts = [f"{c.title.lower()} {c.show(lookup(row, c.key))}" for c in columns if lookup(row, c.key) is not None]
        if self._kept is not None:
            self._say(f"{self._kept[0]:.0f} of {self._kept[1]:.0f} channels stay", "dim", mark="  ")
        parts += [size(row["bytes"])] if row.get("bytes") is not None else []
        parts += [duration(row["seconds"])] if row.get("seconds") is not None else []
        self._stage, self._epoch, self._kept = {}, {}, None
        self._say(f"{name}  " + " · ".join(parts), mark="✓ ")

    def _on_warning(self, event: Mapping[str, Any]) -> None:
        where = text(event.get("stage"), 40)
        self._say((f"{where}: " if where else "") + text(event.get("message"), 300), "yellow", mark="! ")

    def _on_done(self, event: Mapping[str, Any]) -> None:
        self._say(f"done in {duration(self._clock() - self._begun)}", "dim")

    def _on_stopped(self, event: Mapping[str, Any]) -> None:
        self._say(text(event.get("reason"), 300), "yellow", mark="! ")

    def _label(self) -> str:
        index, total = number(self._stage.get("index")), number(self._stage.get("of"))
        place = f"[{index + 1:.0f}/{total:.0f}] " if index is not None and total is not None else ""
        method = text(self._stage.get("method"), 30)
        return place + text(self._stage.get("stage"), 40).split("-", 1)[-1] + (f" ({method})" if method else "")

    def _time_left(self) -> str:
        """Of the stage and of the run, as far as they are known; the measuring is in it, or it says so."""
        stage, run = self._remaining.stage, self._remaining.run
        if stage is None or (stage[0] <= 0 and run is None):
            return ""
        left = f"{duration(stage[0])} left" + ("" if stage[1] else ", then measuring")
        return left + (f", about {duration(run)} for the run" if run is not None else "")

    def _say(self, line: str, style: str = "", mark: str = "") -> None:
        if line.strip():
            self.console.print(Text(mark + line, style=style), soft_wrap=True)


def _measures(epoch: Mapping[str, Any]) -> str:
    parts = [f"loss {significant(epoch['loss'])}"] if epoch.get("loss") is not None else []
    parts += [f"val {percent(epoch['val_accuracy'])}"] if epoch.get("val_accuracy") is not None else []
    if number(epoch.get("val_score")) is not None:
        shown = percent if epoch.get("share") is True else significant
        parts.append(f"val {text(epoch.get('metric'), 24)} {shown(epoch['val_score'])}")
    return " · ".join(parts)
