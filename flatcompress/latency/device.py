"""What a model costs on a microcontroller before it is trained: flash, RAM and instructions of its C, at any widths.

A copy of the untrained model is quantized and read as profile `c` would read it, and the C's own plan and cost model
answer (`onnx_export.c.costs`, `onnx_export.c.sizing`). The figures are those of a Cortex-M4 and gcc -Os. Layers are
taken as dense: weights that training sets to zero make them smaller and faster, and give them a scratch of other size.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from flatcompress import onnx_export, prune, quant
from flatcompress.errors import UserError
from flatcompress.modules import evaluating
from flatcompress.onnx_export.c import costs, sizing
from flatcompress.onnx_export.c import model as c_model
from flatcompress.onnx_export.c.layers import Decided
from flatcompress.prune.budgets.cost import Widths
from flatcompress.quant.sensitivity import CHOICES

UNITS = ("flash", "ram", "instructions")


def decided(model: nn.Module, example: Tensor, **settings: Any) -> Decided:
    """The C program of a float model, quantized with ``settings`` (as `quant.quantize`), calibrated on ``example``.

    ``model`` is not changed. UserError where a module has no C form.
    """
    twin, x = copy.deepcopy(model).cpu().eval(), example.cpu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are not trained yet
        quant.quantize(twin, example_input=x, **settings)
        quant.calibrate(twin, [x])
        onnx_export.untie(twin.eval(), x)
    return of_quantized(twin, x)


def of_quantized(model: nn.Module, example: Tensor) -> Decided:
    """The C program of a quantized model as it is. UserError where a module has no C form."""
    with evaluating(model):
        return c_model.prepare(onnx_export.lower(model, example))


def measured(found: Decided) -> dict[str, float]:
    """{unit: figure} of a program."""
    return figures(costs.estimate(found))


def figures(estimate: costs.Estimate) -> dict[str, float]:
    """{unit: figure} of an estimate: bytes of flash and RAM, instructions of one inference."""
    return {unit: float(getattr(estimate, unit)) for unit in UNITS}


def written(found: Mapping[str, float]) -> str:
    """Figures for people.

    >>> written({"flash": 14284.0, "ram": 3072.0})
    'flash 14,284 B, ram 3,072 B'
    """
    return ", ".join(f"{unit} {value:,.0f}{'' if unit == 'instructions' else ' B'}" for unit, value in found.items())


def bits_price(model: nn.Module, example: Tensor, choices: Iterable[int] = CHOICES, **settings: Any) -> quant.Price:
    """What `quant.auto_bits` needs for a budget of flash: each layer's constants at every width, and whole programs.

    settings: as `quant.quantize`, but bits and weight_bits. Masks that the weights have are counted as they would be
    stored.
    """
    each: dict[str, dict[int, float]] = {}
    for bits in choices:
        made = decided(model, example, weight_bits=bits, **settings)
        for layer in made.layers.values():
            found = each.setdefault(layer.step.path, {})
            found[bits] = found.get(bits, 0.0) + costs.stored(made, layer) + costs.channel_bytes(layer)

    def total(bits: dict[str, int]) -> float:
        return measured(decided(model, example, bits=bits, **settings))["flash"]

    return quant.Price(each, total)


class DeviceCost:
    """A cost function for `prune.Budget` (kind cost, absolute): the largest share of its limits that widths take.

    limits: {unit: most} of ``UNITS``. settings: how the model will be quantized (default: 4 bits, 8 of the first and
    the last layer's weights). ``called``: the limits for messages.
    """

    def __init__(self, model: nn.Module, example: Tensor, limits: Mapping[str, float], **settings: Any) -> None:
        self.limits = dict(limits)
        self.called = " and ".join(f"{unit} {most:,.0f}" for unit, most in self.limits.items())
        self.sketch = sizing.Sketch.of(decided(model, example, **settings))
        layers = set(prune.CostModel(model, example).layers)
        if unknown := sorted(layers - self.sketch.modules):
            raise UserError(
                f"{unknown[0]}: its {' and '.join(self.limits)} in the C is not known. Take another budget."
            )
        self._layers = sorted(layers)
        self._known: dict[tuple[int, ...], dict[str, float]] = {}

    def __call__(self, widths: Widths) -> float:
        """The largest of figure / limit; at most 1 where all of them are met."""
        found = self.figures(widths)
        return max(found[unit] / most for unit, most in self.limits.items())

    def figures(self, widths: Widths) -> dict[str, float]:
        """{unit: figure} of the limits' units at ``widths``."""
        outputs = {name: widths[name].outputs for name in self._layers}
        key = tuple(outputs.values())
        if key not in self._known:
            found = figures(self.sketch.at(outputs, planned="ram" in self.limits))
            self._known[key] = {unit: found[unit] for unit in self.limits}
        return self._known[key]

    def unmet(self, widths: Widths) -> str:
        """What to say where ``widths``, the narrowest there are, do not meet the limits."""
        return (
            f"{self.called} cannot be met: with every layer as narrow as pruning leaves it the C takes "
            f"{written(self.figures(widths))}. Raise the budget, or lower round_to, min_channels or floor, or the bits."
        )

    @property
    def weighs(self) -> bool:
        """Whether it is close to a sum over layers, so that importance can be weighed against it. RAM is a peak."""
        return len(self.limits) == 1 and "ram" not in self.limits
