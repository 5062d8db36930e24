"""`post_training`: a trained float network becomes a calibrated quantized one, in place, without labels."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from flatcompress.errors import UserError, unknown
from flatcompress.graph import trace
from flatcompress.modules import evaluating
from flatcompress.plan import Plan
from flatcompress.quant.layers import activation_quantizers, quantize, quantized_layers
from flatcompress.quant.ptq.blocks import blocks
from flatcompress.quant.ptq.calibrators import CALIBRATORS, Levels
from flatcompress.quant.ptq.corrections import CORRECTIONS
from flatcompress.quant.ptq.gptq import gptq
from flatcompress.quant.ptq.histogram import Histogram
from flatcompress.quant.ptq.paths import Paths, Values, channel_moments, float_twin, out_axis
from flatcompress.quant.ptq.reconstruct import reconstruct
from flatcompress.quant.ptq.rounding import ROUNDINGS, Rounding
from flatcompress.quant.ptq.scaling import SCALINGS
from flatcompress.quant.ptq.weight_scales import WEIGHT_SCALES
from flatcompress.quant.quantizers.lsq import StepQuantizer
from flatcompress.quant.quantizers.variants import OffsetQuantizer
from flatcompress.registry import Registry

BATCH = 32
MEMORY = 1 << 30  # bytes that the largest tensor of all samples at once may take where both paths are kept


@dataclass
class PostTraining:
    """What `post_training` did. ``plan``: repeats the quantizers; load the model's state dict afterwards.

    ``settings``: the steps by name. ``steps``: a row per pair of the scaling. ``layers``: a row per quantized layer.
    ``activations``: a row per activation quantizer. ``samples``: how many each part used. ``seconds``: of each part.
    """

    plan: Plan
    settings: dict[str, Any]
    steps: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    activations: list[dict[str, Any]]
    samples: dict[str, int]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the plan."""
        return {k: v for k, v in asdict(self).items() if k != "plan"}


def post_training(
    model: nn.Module,
    batches: Iterable[Any],
    weight_bits: int = 8,
    activation_bits: int | None = 8,
    *,
    example_input: Tensor | None = None,
    method: str = "lsq+",
    scaling: str = "none",
    weight_scale: str = "mse",
    calibrator: str = "mse",
    rounding: str | Rounding = "nearest",
    correction: str = "bias",
    seed: int = 0,
    **placement: Any,
) -> PostTraining:
    """Quantize the trained float ``model`` in place, calibrated on ``batches``; no labels, no training.

    ``batches``: input tensors [B, ...] (or pairs that begin with one), a few hundred samples in all. ``weight_bits``,
    ``activation_bits``: as of `quantize`. ``scaling``,
    ``weight_scale``, ``calibrator``, ``rounding``, ``correction``: rows of the registries of those names, each to be
    switched off by ``none``, ``lsq``, ``min-max`` or ``nearest``. ``method``: a learned-scale quantizer (``lsq+`` gives
    signed activations a zero point, ``lsq`` does not). ``placement``: what `quantize` takes beside the bits.

    Ranges are taken on the float network with all samples; rounding and corrections go through the network in order,
    on both paths at once, with as many samples as a gigabyte per tensor holds. The same seed gives the same bits on
    CPU. Raises UserError for no batch, unknown rows, NaN (naming the quantizer), and whatever `quantize` refuses.
    """
    chosen = ROUNDINGS[rounding].make() if isinstance(rounding, str) else rounding
    rows = (SCALINGS[scaling], WEIGHT_SCALES[weight_scale], CALIBRATORS[calibrator], CORRECTIONS[correction])
    inputs = _inputs(model, batches)
    example = inputs[0][:2] if example_input is None else example_input
    clock, known, training = _Clock(), set(model.modules()), model.training
    with evaluating(model), torch.no_grad():
        grids = ((weight_bits, activation_bits),) if rows[0].facts.needs_bits else ()
        moved = rows[0].make(trace(model, example), inputs, *grids) if scaling != "none" else []
        clock.mark("scaling")
        twin = float_twin(model)
        plan = quantize(model, weight_bits, activation_bits, method=method, example_input=example, **placement)
        _check_quantizers(model, method)
        layers = set_weight_scales(model, rows[1].make)
        clock.mark("weight_scales")
        paths = Paths(model, twin)
        activations = _calibrate(paths, inputs, rows[2].make)
        clock.mark("calibration")
        few = inputs[: _affordable(paths, inputs)]
        walk = _Walk(paths, few, chosen, rows[3], layers, torch.Generator().manual_seed(seed))
        if chosen.by != "nothing" or correction != "none":
            walk.run()
        clock.mark("rounding_and_correction")
    for module in set(model.modules()) - known:
        module.training = training
    settings = {"method": method, "scaling": scaling, "weight_scale": weight_scale, "calibrator": calibrator,
                "rounding": rounding if isinstance(rounding, str) else asdict(rounding), "correction": correction,
                "weight_bits": weight_bits, "activation_bits": activation_bits, "seed": seed}  # fmt: skip
    samples = {"calibration": sum(len(b) for b in inputs), "rounding_and_correction": sum(len(b) for b in few)}
    return PostTraining(plan, settings, moved, list(layers.values()), activations, samples, clock.seconds)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def mark(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = round(now - self._last, 3), now


def _inputs(model: nn.Module, batches: Iterable[Any]) -> list[Tensor]:
    """The samples in batches of `BATCH`, on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = [batch[0] if isinstance(batch, tuple | list) else batch for batch in batches]
    found = [batch.to(device) for batch in found if len(batch)]
    if not found:
        raise UserError("post-training quantization needs at least one batch of inputs to calibrate on.")
    return list(torch.cat(found).split(BATCH))


def _check_quantizers(model: nn.Module, method: str) -> None:
    quantizers = [q.tensor_quant for q in activation_quantizers(model).values()]
    quantizers += [layer.weight_quant.tensor_quant for layer in quantized_layers(model).values()]
    if not all(isinstance(q, StepQuantizer) for q in quantizers):
        raise UserError(
            f"post-training quantization sets scales and ranges itself, which quantizer {method!r} does not let it: "
            "choose lsq+, lsq or pact."
        )


@torch.no_grad()
def set_weight_scales(model: nn.Module, scale_of: Any) -> dict[str, dict[str, Any]]:
    """Set every quantized layer's weight scales by ``scale_of(rows, Qn, Qp)``; a row per layer by name."""
    found = {}
    for name, layer in quantized_layers(model).items():
        quantizer = layer.weight_quant.tensor_quant
        rows = rows_of(layer.weight.detach(), quantizer.scale)
        quantizer.set_scale(scale_of(rows, quantizer.qn, quantizer.qp))
        weight = layer.weight.detach()
        error = (quantizer.quantize(weight) - weight).square().sum()
        found[name] = {
            "name": name,
            "bits": quantizer.bits,
            "weight_sqnr_db": decibels(float(weight.square().sum()), float(error)),
            "rounding": "nearest",
            "correction": "none",
        }
    return found


def rows_of(weight: Tensor, scale: Tensor) -> Tensor:
    """[scales, elements that share one]."""
    if scale.numel() == 1:
        return weight.reshape(1, -1)
    axis = max(range(scale.dim()), key=lambda d: scale.shape[d])
    return weight.movedim(axis, 0).flatten(1)


def decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None where there is no noise, or no signal."""
    return 10 * float(torch.tensor(signal / noise, dtype=torch.float64).log10()) if signal > 0 and noise > 0 else None


def _calibrate(paths: Paths, inputs: Sequence[Tensor], range_of: Any) -> list[dict[str, Any]]:
    """One pass over the float network: how far every quantized tensor reaches, and how it is distributed."""
    histograms = {n: Histogram(str(n.target)) for n in paths.nodes if paths.is_quantizer(n)}

    def take(node: fx.Node, outputs: list[Any]) -> None:
        if node in histograms:
            histograms[node].see(outputs[0])

    for batch in inputs:
        paths.advance(paths.nodes, {}, [batch], quantized=False, after=take)
    return [_set_range(paths, node, found.finish(), range_of) for node, found in histograms.items()]


def _set_range(paths: Paths, node: fx.Node, found: Histogram, range_of: Any) -> dict[str, Any]:
    quantizer: Any = paths.model.get_submodule(str(node.target)).tensor_quant  # type: ignore[union-attr]
    offset = isinstance(quantizer, OffsetQuantizer)
    levels = Levels(quantizer.qn, quantizer.qp, offset)
    low, high = range_of(found, levels)
    if offset:
        quantizer.set_range(low, high)
    else:
        quantizer.set_scale(torch.tensor(levels.step(low, high)))
    clipped = (found.counts[(found.points < low) | (found.points > high)]).sum() / found.counts.sum()
    return {"name": str(node.target), "bits": quantizer.bits, "signed": quantizer.signed or offset, "seen": [found.low,
            found.high], "range": [low, high], "clipped": float(clipped)}  # fmt: skip


def _affordable(paths: Paths, inputs: Sequence[Tensor]) -> int:
    """How many batches fit in `MEMORY` at the network's largest tensor."""
    largest = 1
    for node in paths.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() > 1:
            largest = max(largest, int(torch.tensor([int(side) for side in value.shape[1:]]).prod()))
    return max(1, MEMORY // (4 * largest * len(inputs[0])))


class _Walk:
    """Both paths through the network, block by block: round, compare with float, correct, go on."""

    def __init__(
        self,
        paths: Paths,
        batches: Sequence[Tensor],
        rounding: Rounding,
        correction: Any,
        rows: Mapping[str, dict[str, Any]],
        generator: torch.Generator,
    ) -> None:
        self.paths, self.batches, self.rounding, self.correction = paths, batches, rounding, correction
        self.rows, self.generator = rows, generator
        self.moments: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self.outputs: dict[fx.Node, list[Tensor]] = {}

    def run(self) -> None:
        exact: Values = {}
        quantized: Values = {}
        for nodes in blocks(self.paths):
            end = nodes[-1] if nodes[-1].op != "output" else nodes[-2]
            self.paths.advance(nodes, exact, self.batches, False, after=self._note, keep=(end,))
            if self.rounding.by == "block":
                self._block(nodes, quantized, exact[end], end)
            self.paths.advance(nodes, quantized, self.batches, True, self._before, self._after)
            self.outputs.clear()
            if not any(end in n.all_input_nodes for n in self.paths.nodes[self.paths.nodes.index(nodes[-1]) + 1 :]):
                exact.pop(end, None)

    def _note(self, node: fx.Node, outputs: list[Any]) -> None:
        layer = self.paths.layer(node)
        if layer is None:
            return
        self.moments[node] = channel_moments(outputs, out_axis(layer))
        if self.rounding.by == "layer":
            self.outputs[node] = outputs

    def _block(self, nodes: list[fx.Node], inputs: Values, wanted: list[Tensor], end: fx.Node) -> None:
        outside = dict(inputs)
        for node in nodes:
            if node.op == "placeholder":
                outside[node] = list(self.batches)
        inner = [n for n in nodes if n.op not in ("placeholder", "output")]
        found = reconstruct(self.paths, inner, outside, wanted, end, self.rounding.schedule, self.generator)
        for node in nodes:
            if self.paths.layer(node) is not None:
                self.rows[str(node.target)] |= {"rounding": "reconstructed", "block": found}

    def _before(self, node: fx.Node, values: Values) -> None:
        layer = self.paths.layer(node)
        if layer is None or self.rounding.by in ("nothing", "block"):
            return
        row = self.rows[str(node.target)]
        if str(node.target) in self.paths.shared:
            row["rounding"] = "nearest (called more than once)"
        elif self.rounding.by == "hessian":
            row["rounding"] = gptq(layer, values[node.args[0]], self.generator)  # type: ignore[index]
        else:
            wanted = self.outputs[node]
            found = reconstruct(self.paths, [node], values, wanted, node, self.rounding.schedule, self.generator)
            row |= {"rounding": "reconstructed", "block": found}

    def _after(self, node: fx.Node, outputs: list[Any]) -> None:
        layer = self.paths.layer(node)
        if layer is None or self.correction.name == "none":
            return
        row = self.rows[str(node.target)]
        if str(node.target) in self.paths.shared:
            row["correction"] = "skipped: called more than once"
            return
        axis = out_axis(layer)
        wanted, found = self.moments.pop(node), channel_moments(outputs, axis)
        had = None if layer.bias is None else layer.bias.detach().clone()
        row["correction"] = self.correction.make(layer, self.paths.norm_after(node), wanted, found)
        if had is not None and layer.bias is not None and axis is not None:
            moved = (layer.bias.detach() - had).view(-1, *[1] * (outputs[0].dim() - 2 if axis == 1 else 0))
            for output in outputs:
                output.add_(moved)


def check_rows(**names: str) -> None:
    """UserError for a name that is in none of the registries given by keyword."""
    known: dict[str, Registry[Any]] = {"scaling": SCALINGS, "weight_scale": WEIGHT_SCALES, "calibrator": CALIBRATORS,
             "rounding": ROUNDINGS, "correction": CORRECTIONS}  # fmt: skip
    for key, name in names.items():
        if name not in known[key]:
            raise unknown(key.replace("_", " "), name, known[key])
