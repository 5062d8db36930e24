"""`find_groups`: what can be cut in a model, checked by cutting, and why the rest cannot."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.modules import check_patterns, evaluating, matches
from flatcompress.prune.channels import Surgery, head_counts, keep_channels
from flatcompress.prune.dependency import axes
from flatcompress.prune.dependency.attention import find_attention
from flatcompress.prune.dependency.coupling import call_counts, couple
from flatcompress.prune.dependency.groups import Group, Survey
from flatcompress.prune.dependency.units import channel_groups, head_groups
from flatcompress.prune.inputs import Example, call, tensors_of

# A wrong index map moves outputs by whole percents; float32 noise of a deep net stays below 1e-5. What attention over
# channels moves can be less than a thousandth, which is seen where there is no TF32 to hide it.
_TOLERANCE = 1e-3
_ON_CPU = 1e-4
_ORDINARY = ("Add", "Mul", "Relu", "Hardtanh", "Gelu", "Silu", "Hardswish", "Pool", "View", "Mean", "Sum", "TBackward")


def find_groups(model: nn.Module, example_input: Example, ignore: Sequence[str] = ()) -> list[Group]:
    """The groups of coupled channels of ``model`` that can be cut (see `survey`); layers in ``ignore`` stay whole.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> [(g.name, g.units) for g in find_groups(net, torch.zeros(1, 3, 8, 8))]
    [('0', 8)]
    """
    return survey(model, example_input, ignore).groups


def survey(model: nn.Module, example_input: Example, ignore: Sequence[str] = ()) -> Survey:
    """Every group of coupled channels (DepGraph, arXiv 2301.12900): what can be cut, and why the rest cannot.

    ``example_input`` is one batch, e.g. [1, C, H, W]; several arguments are a tuple, or a dictionary by name.
    ``ignore`` names layers whose output channels stay: exact names, or ``re:`` and a pattern for the whole name. Each
    group is checked once by cutting a unit: what does not give the masked model's output is protected. The model is
    left as it was.
    UserError: the model does not run, its graph cannot be read, it is quantized, or a pattern matches nothing.
    """
    _refuse_quantized(model)
    ignored = match(model, ignore)
    counts = call_counts(model, example_input)
    blocks = find_attention(model)
    groups = channel_groups(model, couple(model, example_input, blocks)) + head_groups(model, blocks)
    shared = _shared_layers(model)
    groups = [replace(g, reason=_reason(g, ignored, counts, shared)) for g in groups]
    rank = {name: i for i, (name, _) in enumerate(model.named_modules())}
    groups.sort(key=lambda g: min(rank[m.name] for m in g.members))
    groups = _checked(model, example_input, groups)
    return Survey([g for g in groups if g.reason is None], [g for g in groups if g.reason is not None])


def match(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of layers that ``patterns`` select: exact names (with everything inside) or ``re:PATTERN``."""
    names = [name for name, _ in model.named_modules() if name]
    check_patterns("ignore", patterns, names)
    return {name for name in names if any(matches(pattern, name) for pattern in patterns)}


def _refuse_quantized(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(base.__module__.partition(".")[0] == "brevitas" for base in type(module).__mro__):
            raise UserError(
                f"{name or type(module).__name__} is quantized: cutting it would reset its learned scales. "
                "Prune first, then quantize."
            )


def _shared_layers(model: nn.Module) -> set[str]:
    """Layers that share a parameter or are registered under two names."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _reason(group: Group, ignored: set[str], counts: Counter[str], shared: set[str]) -> str | None:
    if group.reason is not None:
        return group.reason
    for member in group.members:
        if (obstacle := _obstacle(member.name, member.module, counts, shared)) is not None:
            return obstacle
        if member.axis == axes.OUT and member.name in ignored:
            return f"{member.name} is ignored"
    if all(m.axis == axes.OUT for m in group.members):
        return "no layer consumes these channels: it is the output layer"
    return "a single unit: nothing would be left" if group.units < 2 else None


def _obstacle(name: str, module: nn.Module, counts: Counter[str], shared: set[str]) -> str | None:
    kind = type(module).__name__
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and not axes.cuttable(module):
        return f"{kind} {name} normalises over these channels, so cutting one changes the others"
    if not axes.cuttable(module):
        return f"{name} ({kind}) needs these channels whole"
    if name in shared:
        return f"{name} shares its weights with another layer"
    if counts[name] > 1:
        return f"{name} runs {counts[name]} times in one forward"
    return None


def _checked(model: nn.Module, example_input: Example, groups: list[Group]) -> list[Group]:
    """Cut one unit of every group and compare with the masked model; on a difference find the groups at fault."""
    open_groups = [g for g in groups if g.reason is None]
    least = _ON_CPU if all(p.device.type == "cpu" for p in model.parameters()) else _TOLERANCE
    fewer = [_one_less(g) for g in open_groups]
    if not open_groups or cut_equals_mask(model, example_input, open_groups, fewer, least):
        return groups
    bad = {
        g.name: "cutting it does not give the masked model's output" + _passing(g)
        for g in open_groups
        if not cut_equals_mask(model, example_input, [g], [_one_less(g)], least)
    }
    return [replace(g, reason=bad.get(g.name, g.reason)) for g in groups]


def _passing(group: Group) -> str:
    odd = [op for op in group.through if not any(known in op for known in _ORDINARY)]
    return f" (on the way: {', '.join(odd)})" if odd else ""


def _one_less(group: Group) -> Tensor:
    keep = torch.ones(group.units, dtype=torch.bool)
    keep[group.units // 3] = False
    return keep


def cut_equals_mask(
    model: nn.Module,
    example_input: Example,
    groups: Sequence[Group],
    keep: Sequence[Tensor],
    tolerance: float = _TOLERANCE,
) -> bool:
    """Whether the cut model computes what the masked one does on ``example_input`` (eval mode; model restored)."""
    surgery, saved = Surgery(model), []
    try:
        with torch.no_grad(), evaluating(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = zero_units(groups, keep)
            masked = _flat(call(model, example_input))
            surgery.cut(keep_channels(groups, keep), head_counts(groups, keep))
            cut = _flat(call(model, example_input))
    except Exception:
        return False
    finally:
        surgery.undo()
        for parameter, value in saved:
            parameter.data.copy_(value)
    if masked.shape != cut.shape:
        return False
    return bool((masked - cut).abs().max() <= tolerance * masked.abs().max().clamp(min=1e-6))


def zero_units(groups: Sequence[Group], keep: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Zero the dropped units' parameters; returns (parameter, copy of it before) for each that changed."""
    saved: dict[int, tuple[Tensor, Tensor]] = {}
    for group, units in zip(groups, keep, strict=True):
        for member in group.members:
            drop = ~member.spread(units.cpu(), True)
            for _, parameter, dim in axes.parameters(member.module, member.axis):
                saved.setdefault(id(parameter), (parameter, parameter.detach().clone()))
                axes.fill_(parameter, dim, axes.local(member.module, member.axis, drop))
    return list(saved.values())


def _flat(output: object) -> Tensor:
    return torch.cat([found.float().flatten() for found in tensors_of(output)])
