"""The ledger: one row of measurements per finished stage, every number measured here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from flatcompress import flat, graph, quant
from flatcompress.plan import Plan, apply_plan
from flatcompress.quant.layers import graph_of
from flatcompress.stages import budget, members, predictions
from flatcompress.stages.context import RunContext
from flatcompress.stages.reported import reported
from flatcompress.training import layout
from flatcompress.training.batches import fitting, loader

FULL = budget.Sizes(whole=256, each=64, layers=10**6, map=32)
SHARPNESS_RHO = 0.05


def measure(
    run: RunContext, stage: str, method: str, seconds: float, passes: int, flatness: bool = True
) -> dict[str, Any]:
    """A ledger row for ``run`` as it is now: accuracy, sharpness, size and cost. What was not measured is None.

    Of a family of widths it is the full network's.
    """
    run = members.full(run)
    with layout.lying(run.model, run.layout):
        row = _row(run, stage, method, seconds, passes, flatness)
    return {**row, "memory_format": run.layout} if passes and run.layout != "contiguous" else row


def _row(run: RunContext, stage: str, method: str, seconds: float, passes: int, flatness: bool) -> dict[str, Any]:
    twin = float_twin(run)
    flatness = flatness and run.measuring != "off"
    sizes = budget.sizes(run.measuring, passes * run.batch_size, len(_probed(run.model)), FULL)
    costs: dict[str, int] = reported(
        "the cost in MACs could not be counted", lambda: graph.macs(twin, run.example().cpu()), {}
    )
    with quant.held(run.model):
        scored = scores(run, lambda dataset, task: run.evaluate(run.model, dataset, task))  # type: ignore[arg-type]
    row = {
        "stage": stage,
        "method": method,
        **scored,
        "sharpness": _measured_sharpness(run, sizes.whole) if flatness else None,
        "params": sum(p.numel() for p in twin.parameters()),
        "nonzero": nonzero(run.model),
        "macs": sum(costs.values()) if costs else None,
        "bytes": weight_bytes(run.model),
        "seconds": seconds,
        "passes": passes,
        "latency_ms": None,
    }
    if passes:
        _say_where_guessing_does_as_well(run, row["accuracy"])
    with run.timed("sharpness of each layer"):
        some = sizes if flatness else None
        rows = reported("the table of layers could not be made", lambda: layer_rows(run, costs, some), None)
    if rows is not None:
        run.emit("layers", layers=rows)
    return row


def _say_where_guessing_does_as_well(run: RunContext, accuracy: dict[str, float | None]) -> None:
    """A warning where the test accuracy is within two standard errors of a guess among the classes."""
    reached, classes, samples = accuracy["test"], len(run.data.classes), len(run.data.test)
    if run.task.selects != "accuracy" or reached is None or classes < 2 or not samples:
        return
    guess = 1 / classes
    if reached <= guess + 2 * math.sqrt(guess * (1 - guess) / samples):
        run.emit(
            "warning",
            message=f"test accuracy {reached:.1%} on {samples:,} samples is no better than a guess among {classes} "
            f"classes ({guess:.1%}): more samples, more epochs, another learning rate, or larger inputs may help",
        )


def _measured_sharpness(run: RunContext, samples: int) -> float | None:
    with run.timed("sharpness"):
        return reported("the sharpness could not be measured", lambda: sharpness(run, samples), None)


def scores(run: RunContext, score: Callable[[Any, predictions.Watched], dict[str, float]]) -> dict[str, Any]:
    """``score(dataset, task)`` on test, held-out domain and every corrupted copy; logs which classes were predicted.

    None where there is none or it cannot be read; ``held_out_seen`` alone is left out where there is none.

    ``accuracy`` is every row's, null where the task has none. Of a task that has more to tell than accuracy ``metrics``
    has all of them, and ``metric`` says which one selects, and its direction.
    """
    data, task = run.data, run.task
    seen: dict[str, predictions.Watched] = {}

    def on(part: str, dataset: Any) -> dict[str, float]:
        said = f"the {'accuracy' if task.selects == 'accuracy' else 'score'} on the {part} part could not be measured"
        watched = seen["held_out" if part == "held-out" else part] = predictions.Watched(task)
        return reported(said, lambda: score(dataset, watched), {})

    with run.timed("metrics"):
        held_out = on("held-out", data.held_out) if data.held_out is not None else {}
        parts = {"test": on("test", data.test), "held_out": held_out}
        if (known_things := data.held_out_seen) is not None:
            said = "the held-out domain's identities that were trained on could not be measured"
            parts["held_out_seen"] = reported(said, lambda: score(known_things, predictions.Watched(task)), {})
    with run.timed("metrics under corruption"):
        kinds, sampled = corrupted_parts(run)
        corrupted = {name: on(name, dataset) for name, dataset in kinds.items()}
    predictions.emit(run, seen)
    found = {}
    for name in ["accuracy", *(n for n in task.reported if n != "accuracy")]:
        values = {part: known(figures.get(name)) for part, figures in parts.items()}
        measured = [v for v in (known(figures.get(name)) for figures in corrupted.values()) if v is not None]
        found[name] = {**values, "corrupted": sum(measured) / len(measured) if measured else None}
    row = {
        "accuracy": found["accuracy"],
        "corruptions": {name: known(figures.get(task.selects)) for name, figures in corrupted.items()},
        **({"corruptions_sampled": sampled} if sampled else {}),
    }
    if task.plain:
        return row
    chosen = {"name": task.selects, "higher": bool(task.metric.higher), "share": task.metric.share}
    return {**row, "metric": chosen, "metrics": {name: found[name] for name in task.reported}}


def corrupted_parts(run: RunContext, say: bool = True) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The corrupted parts of the test data that every row is measured on, and what is said where they are not all.

    They are chosen once and kept: what was corrupted for one stage need not be for the next. say: in the log too.
    """
    if run.measuring == "off" or not run.data.corrupted:
        return {}, None
    given = run.data.corrupted
    names, each = budget.corrupted(run.measuring, run.planned, {name: len(part) for name, part in given.items()})
    if run.corrupted is None:
        run.corrupted = {name: some(given[name], each) for name in names}
    most = max(len(part) for part in given.values())
    if len(names) == len(given) and each >= most:
        return run.corrupted, None
    said = {"parts": len(names), "of_parts": len(given), "samples": each, "of_samples": most}
    if say:
        run.emit("sampled", what="corruption", **said)
    return run.corrupted, said


def some(dataset: Any, count: int) -> Any:
    """``count`` samples, evenly spread over ``dataset``; all of one that has no more."""
    if count >= len(dataset):
        return dataset
    indices = torch.linspace(0, len(dataset) - 1, count).round().long()
    return dataset.narrowed(indices) if hasattr(dataset, "narrowed") else Subset(dataset, indices.tolist())


def known(value: float | None) -> float | None:
    """The value; None for one that is not defined."""
    return value if value is not None and math.isfinite(value) else None


def float_twin(run: RunContext) -> nn.Module:
    """The float model with the same channels, on the CPU, weights fresh: what size and cost are counted on."""
    steps = [s for s in run.plan.steps if s.kind != "quantizers"]
    return apply_plan(run.build().cpu(), Plan(steps), run.example().cpu())


def train_batches(run: RunContext, samples: int, size: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """The first batches of a fixed shuffle of the training split, on the model's device.

    ``size`` of a batch: 128, or fewer of large images, 32 at least.
    """
    size = fitting(run.data.input_shape, 128, least=32, numbers=1 << 20) if size is None else size
    n = min(samples, len(run.data.train))
    order = torch.randperm(len(run.data.train), generator=torch.Generator().manual_seed(0)).tolist()[:n]
    batches = [order[i : i + size] for i in range(0, n, size)]
    return [(x.to(run.device), y.to(run.device)) for x, y in loader(run.data.train, batches)]


def sharpness(run: RunContext, samples: int = FULL.whole) -> float:
    """One-step sharpness: mean over batches of L(w + e) - L(w), ||e|| = 0.05, eval mode."""
    batches = train_batches(run, samples)
    return float(flat.sharpness.sharpness(run.model, batches, run.task.loss, rho=SHARPNESS_RHO))


def sharpness_report(run: RunContext, samples: int) -> dict[str, Any]:
    """Every sharpness measure of the flat package on ``samples`` training samples."""
    logits = run.task.agreement == "argmax"
    return flat.sharpness.report(run.model, train_batches(run, samples), run.task.loss, logits=logits)


def weights(model: nn.Module) -> Iterable[tuple[str, nn.Module, Tensor, int]]:
    """(name, module, values, bits) of every weight: the integers of a quantized layer, else the floats at 32 bits."""
    for name, module in model.named_modules():
        if hasattr(module, "weight_spec"):
            spec = module.weight_spec()
            yield name, module, spec.values, spec.bits
        elif isinstance(module, nn.Conv2d | nn.Linear | nn.Conv1d | nn.Conv3d):
            yield name, module, module.weight.detach(), 32


def nonzero(model: nn.Module) -> int:
    """Parameters that are not zero; a quantized weight counts by its integer, scales of quantizers do not count."""
    counted = {id(m.weight) for _, m, _, _ in weights(model)}
    total = sum(int(torch.count_nonzero(values)) for _, _, values, _ in weights(model))
    scales = {id(p) for p in quantizer_parameters(model)}
    rest = (p for p in model.parameters() if id(p) not in counted and id(p) not in scales)
    return total + sum(int(torch.count_nonzero(p)) for p in rest)


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales, or nothing for a float model."""
    return list(quant.scale_parameters(model).values()) if quant.is_quantized(model) else []


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters at their true width: bits x weights, 4 bytes for everything else."""
    counted = {id(m.weight) for _, m, _, _ in weights(model)}
    bits = sum(values.numel() * b for _, _, values, b in weights(model))
    rest = sum(p.numel() for p in model.parameters() if id(p) not in counted)
    return math.ceil(bits / 8) + 4 * rest


def layer_rows(run: RunContext, costs: dict[str, int], sizes: budget.Sizes | None = FULL) -> list[dict[str, Any]]:
    """What the report shows per layer: channels, bits, bytes, sparsity, cost and, of so many, flatness."""
    original = dict(run.build().named_modules())
    flatness: dict[str, float] = (
        {}
        if sizes is None
        else reported("the sharpness of each layer could not be measured", lambda: layer_sharpness(run, sizes), {})
    )
    inputs = activation_bits(run.model)
    rows = []
    for name, _, values, bits in weights(run.model):
        before = original.get(name)
        rows.append(
            {
                "name": name,
                "kind": "conv" if values.ndim > 2 else "linear",
                "channels": values.shape[0],
                "channels_before": before.weight.shape[0] if before is not None else None,
                "weight_bits": bits if bits < 32 else None,
                "activation_bits": inputs.get(name),
                "bytes": math.ceil(values.numel() * bits / 8),
                "sparsity": 1.0 - int(torch.count_nonzero(values)) / values.numel(),
                "sharpness": flatness.get(name),
                "macs": costs.get(name),
            }
        )
    return rows


def activation_bits(model: nn.Module) -> dict[str, int]:
    """Bits of the tensor that each quantized layer reads, by layer name; empty for a float model."""
    from flatcompress import quant

    if not quant.is_quantized(model):
        return {}
    bits = {name: quantizer.bits for name, quantizer in quant.activation_quantizers(model).items()}
    layers = quant.quantized_layers(model)
    found = {}
    for node in graph_of(model).nodes:
        if node.op == "call_module" and node.target in layers:
            source = node.args[0]
            while source.op == "call_function" and source.args:  # reshapes and pools keep the grid
                source = source.args[0]
            if source.op == "call_module" and source.target in bits:
                found[str(node.target)] = bits[source.target]
    return found


def layer_sharpness(run: RunContext, sizes: budget.Sizes = FULL) -> dict[str, float]:
    """Loss rise when one layer's weight alone is perturbed by ||e|| = 0.05, on one batch, by layer name.

    Frozen layers are left out; where all are, nothing is measured. Where ``sizes`` are too small for every layer, some
    are measured, from the first to the last; an event says how many, and on how many samples, where not all are taken.
    """
    every = _probed(run.model)
    chosen = set(budget.spread(every, sizes.layers))
    if len(chosen) < len(every) or sizes.each < FULL.each:
        run.emit("sampled", layers=len(chosen), of=len(every), samples=sizes.each)
    if not chosen:
        return {}
    found = flat.sharpness.layerwise(
        run.model,
        train_batches(run, sizes.each),
        run.task.loss,
        rho=SHARPNESS_RHO,
        perturbed=lambda name, parameter: name in chosen,
    )
    return {name.removesuffix(".weight"): value for name, value in found.items()}


def _probed(model: nn.Module) -> list[str]:
    """Names of the weights whose sharpness is measured one by one."""
    return [n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".weight") and p.ndim > 1]
