"""Float model <-> quantized model, in place: `quantize` decides and does it, `apply` does it again from the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import fx, nn

from flatcompress.errors import RunError, UserError
from flatcompress.graph import install, installed_graph, trace
from flatcompress.graph.interface import call, first_tensor, inputs_of_batch, interface_of, mapped
from flatcompress.graph.interface import tensors as graph_tensors
from flatcompress.graph.plain import make_plain
from flatcompress.graph.runtime import attach
from flatcompress.graph.wrapped import check_plain
from flatcompress.modules import evaluating
from flatcompress.plan import Plan, Step
from flatcompress.quant import floats, operators, placement
from flatcompress.quant.qat.rounding import with_rounding
from flatcompress.quant.quantizers.lsq import Observer
from flatcompress.quant.quantizers.modules import ActivationQuantizer, QuantizedLayer, quantize_layer
from flatcompress.quant.quantizers.protocol import learns_step
from flatcompress.quant.quantizers.table import QUANTIZERS, Quantizer, float_dtype
from flatcompress.quant.rectifiers import into_quantizers
from flatcompress.stale import accompany

HOLDER = "quantizers"


class Quantizers(nn.ModuleDict):
    """A quantized model's activation quantizers by name, and the plan data they were made from."""

    data: dict[str, Any]


def quantize(
    model: nn.Module,
    weight_bits: int = 4,
    activation_bits: int | None = 4,
    *,
    example_input: Any = None,
    method: str = "lsq",
    first_last_bits: int = 8,
    input_bits: int = 8,
    input_signed: bool = True,
    residual_bits: int = 8,
    per_channel: bool = True,
    ignore: Iterable[str] = (),
    bits: Mapping[str, Any] | None = None,
    symmetric: bool = False,
    max_float_macs: float = floats.MAX_FLOAT_MACS,
) -> Plan:
    """Put quantizers into ``model``, in place; the same object, under the same state-dict names.

    ``weight_bits``, ``activation_bits``: 2..8 (``activation_bits=None``: weights only). ``method``: a name in
    `QUANTIZERS`. ``per_channel``: a weight scale a channel. ``first_last_bits``: weights of the first and last layers
    and the last one's input. ``input_bits``, ``input_signed``: the network's input. ``residual_bits``: signed tensors
    that enter a residual add. ``ignore``: layers (or ``re:`` patterns, or parents) that stay float. ``bits``: per layer
    or pattern an integer (weights) or
    ``{"weight": .., "activation": ..}``. ``symmetric``: every activation fits int8 with zero point 0, so that 8-bit
    ones without negative values use half of a signed grid. ``example_input``: a tensor [B, ...], a tuple of arguments
    or a dictionary of them; without it ``model.input_shape``, or else the first usual size that the model takes.
    ``max_float_macs``: the share of multiply-accumulates in convolutions and linear layers that may stay float without
    being named.

    Layers are what the graph says they are: a convolution that pads like TensorFlow is one, a computed weight (weight
    norm, weight standardisation) is materialised first, and attention's input projection becomes a linear layer. What
    stays float all the same is warned of, with its share.

    Weight scales are set from the weights; activation scales by `calibrate`, or else by the first batch. Returns the
    `Plan` that `flatcompress.apply_plan` repeats; `explain` says what was decided and why. Raises UserError for
    bits outside 2..8, names that match nothing, models that cannot be traced, and more float work than is allowed.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    >>> plan = quantize(model, 4, 4, example_input=torch.randn(2, 3, 4, 4))
    >>> [(row["name"], row["bits"], row["signed"]) for row in plan.of_kind("quantizers")[0]["activations"]]
    [('input', 8, True), ('2', 8, False)]
    """
    settings = placement.Settings(
        weight_bits, activation_bits, first_last_bits, input_bits, residual_bits, input_signed, tuple(ignore),
        dict(bits or {}), symmetric,
    )  # fmt: skip
    check_plain(model)
    entry = QUANTIZERS[method]
    if symmetric and entry.facts.zero_point:
        raise UserError(f"quantizer {method!r} has zero points, which symmetric: true excludes; take 'lsq'.")
    example = _example(model, example_input)
    data = _convert(model, example, entry.name, per_channel, settings, max_float_macs)
    return Plan([Step("quantizers", data)])


def apply(model: nn.Module, data: dict[str, Any], example_input: Any = None) -> nn.Module:
    """Repeat a plan's quantizers on a freshly built model; load the checkpoint's state dict afterwards.

    ``data``: what the plan recorded.

    UserError names the first difference when the model does not give the placement that the plan recorded.
    """
    try:
        settings = placement.Settings(**{**data["settings"], "ignore": tuple(data["settings"]["ignore"])})
        shape, method, per_channel = tuple(data["input_shape"]), data["method"], data["per_channel"]
    except (KeyError, TypeError) as error:
        raise UserError(f"plan: the 'quantizers' step is incomplete ({error}).") from None
    if example_input is None and "example" in data:
        raise UserError("plan: this model was quantized with several inputs; pass example_input.")
    example = example_input if example_input is not None else torch.zeros(2, *shape)
    found = _convert(model, _on_model(model, example), method, per_channel, settings)
    for key in ("layers", "activations"):
        _compare(key, data.get(key, []), found[key])
    return model


def _compare(key: str, recorded: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    strip = [{k: v for k, v in row.items() if k != "why"} for row in recorded]
    other = [{k: v for k, v in row.items() if k != "why"} for row in found]
    for a, b in zip(strip, other):
        if a != b:
            raise UserError(f"plan: this model does not fit; {key}: the plan has {a}, the model gives {b}.")
    if len(strip) != len(other):
        raise UserError(
            f"plan: this model does not fit; the plan has {len(strip)} {key}, the model gives {len(other)}."
        )


def _convert(
    model: nn.Module, example: Any, method: str, per_channel: bool, settings: placement.Settings,
    max_float_macs: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    if hasattr(model, HOLDER):
        what = "is quantized already" if is_quantized(model) else f"has an attribute {HOLDER!r} of its own"
        raise UserError(f"the model {what}.")
    gm = trace(model, example)
    _check_finite(model)
    made_plain = make_plain(model, gm)
    try:
        operators.hoist_scalars(gm)
        layers, tensors, why_float = placement.place(gm, model, settings)
        stays = floats.record(gm, {row.name for row in layers}, why_float)
        if max_float_macs is not None:
            floats.say(stays, max_float_macs)
    except UserError:
        if made_plain:
            install(model, gm)  # its layers are plain ones now, which only the graph calls
        raise
    data = _data(example, method, per_channel, settings, layers, tensors, why_float)
    data["float_layers"] = stays
    data["materialised"] = sorted(name for name, how in made_plain.items() if "materialised" in how)
    _put(model, gm, first_tensor(example).device, method, per_channel, data, layers, tensors)
    return data


def _put(
    model: nn.Module, gm: fx.GraphModule, device: torch.device, method: str, per_channel: bool, data: dict[str, Any],
    layers: list[placement.LayerRow], tensors: list[operators.TensorRow],
) -> None:  # fmt: skip
    """The quantizers into the model, and the graph that calls them."""
    chosen: Quantizer = QUANTIZERS[method]()
    holder = Quantizers()
    for row in tensors:
        injected = chosen.activation(f"{HOLDER}.{row.name}", bits=row.bits, signed=row.signed)
        holder[row.name] = ActivationQuantizer(injected, row.bits, row.signed)
    holder.data = data
    attach(model, gm)
    for layer in layers:
        module = model.get_submodule(layer.name)
        made = chosen.weight(layer.name, module, bits=layer.bits, per_channel=per_channel)
        quantize_layer(module, made)
    holder.to(device, float_dtype(model)).train(model.training)
    model.add_module(HOLDER, holder)
    gm.add_module(HOLDER, holder)
    operators.insert(gm, tensors, HOLDER)
    running = with_rounding(model, gm.graph)
    into_quantizers(model, running.graph)
    install(model, running, shown=gm.graph)
    for quantized in quantized_layers(model).values():
        accompany(quantized.weight, list(quantized.weight_quant.parameters()))


def _data(
    example: Any, method: str, per_channel: bool, settings: placement.Settings,
    layers: list[placement.LayerRow], tensors: list[operators.TensorRow], why_float: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    several = {} if isinstance(example, torch.Tensor) else {"example": [list(t.shape) for t in graph_tensors(example)]}
    return {
        "method": method,
        "per_channel": per_channel,
        "input_shape": list(first_tensor(example).shape[1:]),
        "settings": _plain(settings),
        "layers": [{"name": r.name, "bits": r.bits, "why": r.why} for r in layers],
        "activations": [{"name": r.name, "bits": r.bits, "signed": r.signed, "why": r.why} for r in tensors],
        "float": why_float,
        **several,
    }


def _plain(settings: placement.Settings) -> dict[str, Any]:
    """As data; a key that came later is left out at its default, so that plans stay what they were."""
    found = {**asdict(settings), "ignore": list(settings.ignore)}
    return {key: value for key, value in found.items() if key != "symmetric" or value}


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"the model's {name!r} contains NaN or infinity: it cannot be quantized.")


def _example(model: nn.Module, example_input: Any) -> Any:
    if example_input is not None:
        if not all(bool(torch.isfinite(t).all()) for t in graph_tensors(example_input)):
            raise UserError("example_input contains NaN or infinity.")
        return _on_model(model, example_input)
    shape = getattr(model, "input_shape", None)
    candidates = [tuple(shape)] if shape is not None else _plausible_shapes(model)
    for candidate in candidates:
        example = _on_model(model, torch.zeros(2, *candidate))
        if shape is not None or _accepts(model, example):
            return example
    raise UserError(
        f"{type(model).__name__} does not say the size of its input: pass example_input, or set model.input_shape."
    )


def _plausible_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Input shapes that the first layer with weights would take, the usual image sizes in turn."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return [(module.in_channels, side, side) for side in (32, 28, 64, 96, 224, 16, 8)]
        if isinstance(module, nn.Conv1d):
            return [(module.in_channels, length) for length in (64, 128, 256, 1000, 16000)]
        if isinstance(module, nn.Linear):
            return [(module.in_features,)]
    return []


def _accepts(model: nn.Module, example: torch.Tensor) -> bool:
    try:
        with torch.no_grad(), evaluating(model):  # running statistics must not see the guess
            model(example)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return True


def _on_model(model: nn.Module, example: Any) -> Any:
    device, dtype = next((p.device for p in model.parameters()), torch.device("cpu")), float_dtype(model)
    return mapped(example, lambda t: t.to(device, dtype) if t.is_floating_point() else t.to(device))


# -- using a quantized model ---------------------------------------------------------------------------------------


def is_quantized(model: nn.Module) -> bool:
    """Whether `quantize` or `apply` has been here."""
    return isinstance(getattr(model, HOLDER, None), Quantizers)


def holder_of(model: nn.Module) -> Quantizers:
    """The activation quantizers of a quantized model. UserError for any other model."""
    if not is_quantized(model):
        raise UserError(f"{type(model).__name__} is not quantized: call flatcompress.quant.quantize first.")
    return getattr(model, HOLDER)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The layers with quantized weights, by qualified name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The activation quantizers, by qualified name."""
    return {f"{HOLDER}.{n}": q for n, q in holder_of(model).items()}  # type: ignore[misc]


def tensor_quantizers(model: nn.Module) -> dict[str, nn.Module]:
    """Every tensor quantizer of a quantized model, weights first, by the name that reports use."""
    found = {n: layer.weight_quant.tensor_quant for n, layer in quantized_layers(model).items()}
    return {**found, **{n: q.tensor_quant for n, q in activation_quantizers(model).items()}}


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set every activation scale from data: one pass in eval mode, activations unquantized, weights quantized.

    ``batches``: inputs (a tensor [B, ...], a tuple of a model's arguments, a dictionary of them), alone or before
    their labels in a pair. Raises UserError for no batch, and for NaN naming the quantizer that met it; a quantizer
    that saw only zeros warns by name. Stock Brevitas quantizers collect their own statistics in training mode instead.
    """
    holder_of(model)
    chosen = {n: q for n, q in tensor_quantizers(model).items() if learns_step(q) and q.per_sample}
    names = interface_of(graph_of(model)).names
    for name, quantizer in chosen.items():
        quantizer.observer = Observer(name)
    count = 0
    try:
        with evaluating(model):
            for batch in batches:
                _observe(model, inputs_of_batch(batch, names), count)
                count += 1
        observers = {name: q.observer for name, q in chosen.items()}
    finally:
        for quantizer in chosen.values():
            quantizer.observer = None
    if not count:
        raise UserError("calibration needs at least one batch.")
    for name, quantizer in chosen.items():
        observer = observers[name]
        if observer is not None and observer.count:
            quantizer.start_from_observer(observer)


def _observe(model: nn.Module, inputs: Any, index: int) -> None:
    """One calibration batch. UserError when the model does not take it."""
    try:
        call(model, inputs)
    except (UserError, RunError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        lines = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
        raise UserError(f"calibration batch {index}: {type(model).__name__} cannot be run on it ({what}).") from error


def scale_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every learned scale (and offset) of the quantizers by quantizer name, in a fixed order; stock ones as well."""
    found: dict[str, nn.Parameter] = {}
    for name, quantizer in tensor_quantizers(model).items():
        for key, parameter in quantizer.named_parameters():
            last = key.split(".")[-1]
            found[name if last in ("scale", "value") else f"{name}.{last}"] = parameter
    return found


def scale_names(model: nn.Module) -> set[str]:
    """The qualified names of the scale parameters, as ``named_parameters`` gives them."""
    ids = {id(p) for p in scale_parameters(model).values()}
    return {n for n, p in model.named_parameters() if id(p) in ids}


def explain(model: nn.Module) -> list[dict[str, Any]]:
    """What was decided, a row each: ``name``, ``what`` (weight, activation or float), ``bits``, ``signed``, ``why``."""
    data = holder_of(model).data
    rows = [
        {"name": r["name"], "what": "weight", "bits": r["bits"], "signed": True, "why": r["why"]}
        for r in data["layers"]
    ]
    rows += [{"what": "activation", **row, "name": f"{HOLDER}.{row['name']}"} for row in data["activations"]]
    rows += [{"name": n, "what": "float", "bits": None, "signed": None, "why": w} for n, w in data["float"].items()]
    return rows


def graph_of(model: nn.Module) -> fx.Graph:
    """The graph a quantized model runs."""
    holder_of(model)
    graph = installed_graph(model)
    assert graph is not None
    return graph
