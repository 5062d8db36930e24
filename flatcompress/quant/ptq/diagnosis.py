"""Where accuracy goes: every layer and activation of a quantized network against the float one.

Local error: this place alone quantized, its input the float network's. Cumulative error: everything before it quantized
too. Both as a signal-to-noise ratio in decibels. A place is *bad* when its local ratio lies further below what its bits
allow (the scale of least squared error, computed here on the same values) than `EXCESS`, when output channels have
died, or when more of its values are clipped than the best grid would clip.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from flatcompress.errors import UserError
from flatcompress.modules import evaluating
from flatcompress.quant.ptq import calibrators, weight_scales
from flatcompress.quant.ptq.histogram import Histogram
from flatcompress.quant.ptq.paths import Paths, Values, float_layer, out_axis, weight_replaced
from flatcompress.quant.ptq.post_training import decibels, rows_of
from flatcompress.quant.quantizers.lsq import StepQuantizer
from flatcompress.quant.quantizers.modules import QuantizedLayer
from flatcompress.quant.quantizers.variants import OffsetQuantizer

EXCESS = 6.0  # decibels: one bit
CLIPPED = 0.02  # share of values beyond what the best grid would clip
_PERFECT = 200.0  # decibels written for an error of zero


def diagnose(model: nn.Module, twin: nn.Module, batches: Iterable[Any]) -> dict[str, Any]:
    """``model``: quantized and calibrated; ``twin``: the float network it stands for, same names; inputs to compare on.

    Returns ``rows`` in the order of the network, one per layer and activation quantizer: ``name``, ``what``, ``bits``,
    ``local_db``, ``possible_db`` (what the bits allow), ``cumulative_db``, ``clipped``, ``dead`` (channels that vary
    in float and are constant quantized), ``bad`` (reasons); ``first_bad``: the first row with a reason, or None;
    ``weakest``: the lowest local ratio; ``proposal``: what to write into a recipe. UserError without inputs.
    """
    sites: dict[fx.Node, _Site] = {}
    count = 0
    with evaluating(model), evaluating(twin), torch.no_grad():
        paths = Paths(model, twin)
        for node in paths.nodes:
            made = _site(paths, node)
            if made is not None:
                sites[node] = made
        for batch in batches:
            x = batch[0] if isinstance(batch, tuple | list) else batch
            _compare(paths, sites, x)
            count += len(x)
        if not count:
            raise UserError("finding where accuracy goes needs at least one batch of inputs.")
        rows = [site.row() for site in sites.values()]
    first = next((row for row in rows if row["bad"]), None)
    weakest = min(rows, key=lambda row: row["local_db"]) if rows else None
    return {"samples": count, "rows": rows, "first_bad": None if first is None else first["name"],
            "weakest": None if weakest is None else weakest["name"], "proposal": _proposal(first, weakest)}  # fmt: skip


def _site(paths: Paths, node: fx.Node) -> _Site | None:
    layer = paths.layer(node)
    if layer is not None:
        known = isinstance(layer.weight_quant.tensor_quant, StepQuantizer)
        return _LayerSite(paths, node, layer) if known else None
    if paths.is_quantizer(node):
        quantizer = paths.model.get_submodule(str(node.target)).tensor_quant  # type: ignore[union-attr]
        return _ActivationSite(node, quantizer) if isinstance(quantizer, StepQuantizer) else None
    return None


def _compare(paths: Paths, sites: dict[fx.Node, _Site], x: Tensor) -> None:
    """One batch through both paths, side by side."""
    exact: Values = {}
    quantized: Values = {}
    for node in paths.nodes:
        source: Any = exact[node.args[0]][0] if node in sites else None  # type: ignore[index]
        for values, path in ((exact, False), (quantized, True)):
            paths.advance([node], values, [x], path)
        if node in sites:
            sites[node].see(source, exact[node][0], quantized[node][0])


class _Site:
    """One place in the network and the sums that its row is made of."""

    what = ""

    def __init__(self, name: str, bits: int) -> None:
        self.name, self.bits = name, bits
        self.sums = dict.fromkeys(("signal", "local", "possible", "cumulative"), 0.0)

    def see(self, source: Tensor, exact: Tensor, quantized: Tensor) -> None:
        """Take a batch in: the float input, the float output, the output of the quantized path."""
        raise NotImplementedError

    def _add(self, exact: Tensor, local: Tensor, possible: Tensor | None, cumulative: Tensor) -> None:
        for key, other in (("local", local), ("possible", possible), ("cumulative", cumulative)):
            if other is not None:
                self.sums[key] += float((other.double() - exact.double()).square().sum())
        self.sums["signal"] += float(exact.double().square().sum())

    def ratio(self, key: str) -> float:
        """Decibels of the signal over this error."""
        found = decibels(self.sums["signal"], self.sums[key])
        if found is not None:
            return round(found, 2)
        return _PERFECT if self.sums["signal"] > 0 or self.sums[key] == 0 else -_PERFECT

    def row(self) -> dict[str, Any]:
        """The figures, and why the place is bad."""
        more = self._more()
        found = {"name": self.name, "what": self.what, "bits": self.bits, "local_db": self.ratio("local"),
                 "possible_db": self.ratio("possible"), "cumulative_db": self.ratio("cumulative"),
                 **more}  # fmt: skip
        reasons = self._reasons(found)
        lost = min(found["possible_db"], 90.0) - found["local_db"]  # beyond 90 dB both are float noise
        if lost > EXCESS:
            reasons.append(f"{lost:.1f} dB below what {self.bits} bits allow")
        return {**found, "bad": reasons}

    def _more(self) -> dict[str, Any]:
        return {"clipped": 0.0, "dead": 0}

    def _reasons(self, found: dict[str, Any]) -> list[str]:
        return []


class _LayerSite(_Site):
    """A layer: its output with its weights on their grid, against the best grid of the same bits."""

    what = "weight"

    def __init__(self, paths: Paths, node: fx.Node, layer: QuantizedLayer) -> None:
        quantizer: Any = layer.weight_quant.tensor_quant
        super().__init__(str(node.target), quantizer.bits)
        self.layer, self.axis = layer, out_axis(layer)
        exact: Tensor = float_layer(paths, self.name).weight.detach()  # type: ignore[union-attr, operator]
        self.bias = getattr(float_layer(paths, self.name), "bias", None)
        self.own = quantizer.quantize(layer.weight).detach()
        scale = weight_scales.mse(rows_of(exact, quantizer.scale), quantizer.qn, quantizer.qp)
        self.best = _on_grid(exact, scale.view(quantizer.scale.shape), quantizer.qn, quantizer.qp)
        self.weight_clipped = _beyond(exact / quantizer.step(), quantizer.qn, quantizer.qp)
        self.best_clipped = _beyond(exact / _safe(scale.view(quantizer.scale.shape)), quantizer.qn, quantizer.qp)
        rows, own = rows_of(exact, quantizer.scale), rows_of(self.own, quantizer.scale)
        best = rows_of(self.best, quantizer.scale)
        self.silent = int(((own == 0).all(1) & (best != 0).any(1) & (rows != 0).any(1)).sum())

    def see(self, source: Tensor, exact: Tensor, quantized: Tensor) -> None:
        local, possible = (self._output(source, weight) for weight in (self.own, self.best))
        self._add(exact, local, possible, quantized)

    def _output(self, source: Tensor, weight: Tensor) -> Tensor:
        """The layer's output with ``weight`` and the float network's bias: a corrected bias is no error."""
        with weight_replaced(self.layer, weight):
            made = self.layer(source)
        if self.layer.bias is None or self.bias is None:
            return made
        moved = self.bias - self.layer.bias
        return made + (moved if self.axis == -1 else moved.view(-1, *[1] * (made.dim() - 2)))

    def _more(self) -> dict[str, Any]:
        return {"clipped": round(self.weight_clipped, 5), "dead": self.silent}

    def _reasons(self, found: dict[str, Any]) -> list[str]:
        reasons = [f"{self.silent} channels are all zero once quantized"] if self.silent else []
        if self.weight_clipped - self.best_clipped > max(CLIPPED, self.best_clipped):
            reasons.append(f"{self.weight_clipped:.1%} of its weights are clipped")
        return reasons


class _ActivationSite(_Site):
    """An activation quantizer on the float network's values, against the best range for them."""

    what = "activation"

    def __init__(self, node: fx.Node, quantizer: Any) -> None:
        super().__init__(str(node.target), quantizer.bits)
        self.quantizer = quantizer
        self.histogram = Histogram(self.name)
        self.beyond, self.count = 0.0, 0
        self.best_clipped = 0.0

    def see(self, source: Tensor, exact: Tensor, quantized: Tensor) -> None:
        local = self.quantizer.quantize(source)
        self.histogram.see(source)
        self._add(exact, local, None, quantized)
        low, high = self._ends()
        self.beyond += float(((source < low) | (source > high)).sum())
        self.count += source.numel()

    def _ends(self) -> tuple[float, float]:
        """The range of the grid, half a step beyond its outermost levels."""
        spec = self.quantizer.activation_spec()
        low, high = (spec.scale * (q - spec.zero_point) for q in (spec.qmin, spec.qmax))
        return low - spec.scale / 2, high + spec.scale / 2

    def _more(self) -> dict[str, Any]:
        found = self.histogram.finish()
        levels = calibrators.Levels(self.quantizer.qn, self.quantizer.qp, isinstance(self.quantizer, OffsetQuantizer))
        ends = calibrators.mse(found, levels)
        mean = calibrators.squared_error(found, levels, *ends)
        self.sums["possible"] = mean * self.count
        half = levels.step(*ends) / 2
        outside = (found.points < ends[0] - half) | (found.points > ends[1] + half)
        self.best_clipped = float(found.counts[outside].sum() / found.counts.sum().clamp_min(1))
        return {"clipped": round(self.beyond / max(self.count, 1), 5), "dead": 0}

    def _reasons(self, found: dict[str, Any]) -> list[str]:
        clipped = self.beyond / max(self.count, 1)
        return [f"{clipped:.1%} of its values are clipped"] if clipped - self.best_clipped > CLIPPED else []


def _on_grid(weight: Tensor, scale: Tensor, qn: int, qp: int) -> Tensor:
    step = _safe(scale)
    return (weight / step).round().clamp(-qn, qp) * step


def _safe(scale: Tensor) -> Tensor:
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)


def _beyond(levels: Tensor, qn: int, qp: int) -> float:
    """The share of values that lie more than half a step outside of the grid."""
    return float(((levels < -qn - 0.5) | (levels > qp + 0.5)).double().mean())


def _proposal(first: dict[str, Any] | None, weakest: dict[str, Any] | None) -> str:
    if first is None and weakest is None:
        return "nothing is quantized."
    if first is None:
        assert weakest is not None
        kind = "layer" if weakest["what"] == "weight" else "activation"
        return (
            f"no place is worse than its bits allow. The lowest local ratio is {weakest['local_db']:.1f} dB at {kind} "
            f"{weakest['name']!r}: {_pin(weakest)}."
        )
    return f"start at {first['name']!r} ({'; '.join(first['bad'])}): {_pin(first)}."


def _pin(row: dict[str, Any]) -> str:
    if row["what"] == "activation":
        return "give it a range from calibration data again, or more bits (activation_bits, residual_bits)"
    if row["bits"] < 8:
        return f"pin it with bits: {{{row['name']}: 8}}, or keep it float with ignore: [{row['name']}]"
    return f"set its weights anew, or keep it float with ignore: [{row['name']}]"
