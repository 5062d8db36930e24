"""From coupled channels to groups: join all answers, tie what cannot be cut apart, and give each unit its members."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from flatcompress.prune.dependency import axes
from flatcompress.prune.dependency.attention import Attention
from flatcompress.prune.dependency.coupling import Atom, Coupled
from flatcompress.prune.dependency.groups import Group, Member

Key = tuple[tuple[str, str], ...]  # the (layer, axis) pairs that a unit lives in


class _Union:
    """Disjoint sets of atoms; the representative is the atom seen first."""

    def __init__(self) -> None:
        self.parent: dict[Atom, Atom] = {}

    def find(self, atom: Atom) -> Atom:
        root = atom
        while (parent := self.parent.setdefault(root, root)) != root:
            root = parent
        while self.parent[atom] != root:
            self.parent[atom], atom = root, self.parent[atom]
        return root

    def join(self, one: Atom, other: Atom) -> None:
        self.parent[self.find(other)] = self.find(one)


def _tie_convolutions(union: _Union, names: Iterable[tuple[str, nn.Module]]) -> None:
    """A grouped convolution must keep the same channels in every block; a depthwise one its inputs and outputs."""
    for name, module in names:
        if not isinstance(module, _ConvNd) or module.groups == 1:
            continue
        if axes.is_depthwise(module):
            multiple = module.out_channels // module.in_channels
            for channel in range(module.out_channels):
                union.join((name, axes.IN, channel // multiple), (name, axes.OUT, channel))
            continue
        for axis in (axes.IN, axes.OUT):
            block = axes.width(module, axis) // module.groups
            for channel in range(block, axes.width(module, axis)):
                union.join((name, axis, channel % block), (name, axis, channel))


def _join_all(coupled: list[Coupled], model: nn.Module) -> dict[Atom, list[Atom]]:
    """Sets of atoms that go together, in the order of their roots."""
    union = _Union()
    for one in coupled:
        for link in one.links:
            for index, root in zip(link.channels, link.roots, strict=True):
                union.join((one.root, axes.OUT, root), (link.name, link.axis, index))
    present = {link.name for one in coupled for link in one.links}
    _tie_convolutions(union, ((n, m) for n, m in model.named_modules() if n in present))
    sets: dict[Atom, list[Atom]] = defaultdict(list)
    for atom in list(union.parent):
        sets[union.find(atom)].append(atom)
    return sets


def _unit_key(atoms: list[Atom]) -> Key:
    return tuple(sorted({(name, axis) for name, axis, _ in atoms}))


def _group(model: nn.Module, key: Key, sets: list[list[Atom]], through: tuple[str, ...]) -> Group:
    rank = {name: i for i, (name, _) in enumerate(model.named_modules())}
    layers = [k for k in key if not k[0].startswith("!") and _has_axis(model, *k)]
    layers.sort(key=lambda k: (rank[k[0]], k[1] == axes.OUT))
    owners = {k: torch.full((_width(model, *k),), -1) for k in layers}
    ordered = sorted(sets, key=lambda atoms: min((rank.get(n, -1), a == axes.IN, c) for n, a, c in atoms if n in rank))
    for unit, atoms in enumerate(ordered):
        for name, axis, channel in atoms:
            if (name, axis) in owners and channel < len(owners[name, axis]):
                owners[name, axis][channel] = unit
    members = [Member(n, model.get_submodule(n), axis, owners[n, axis]) for n, axis in layers]
    name = next((m.name for m in members if m.axis == axes.OUT and _is_root(m.module)), members[0].name)
    reasons = [n[1:] for n, _ in key if n.startswith("!")]
    return Group(name, len(sets), tuple(members), reason=reasons[0] if reasons else None, through=through)


def _is_root(module: nn.Module) -> bool:
    return isinstance(module, (_ConvNd, nn.Linear))


def _has_axis(model: nn.Module, name: str, axis: str) -> bool:
    return axis == axes.OUT or not axes.is_depthwise(model.get_submodule(name))


def _width(model: nn.Module, name: str, axis: str) -> int:
    module = model.get_submodule(name)
    return axes.width(module, axis) if axes.cuttable(module) else 0


def channel_groups(model: nn.Module, coupled: list[Coupled]) -> list[Group]:
    """Groups of channels, in module order; a group that something blocks carries the reason."""
    by_key: dict[Key, list[list[Atom]]] = defaultdict(list)
    for atoms in _join_all(coupled, model).values():
        by_key[_unit_key(atoms)].append(atoms)
    through = {k.name: one.through for one in coupled for k in one.links if k.axis == axes.OUT}
    groups = []
    for key, sets in by_key.items():
        operations = dict.fromkeys(op for name, _ in key for op in through.get(name, ()))
        groups.append(_group(model, key, sets, tuple(operations)))
    return _named_apart(groups)


def head_groups(model: nn.Module, blocks: list[Attention]) -> list[Group]:
    """One group per attention block; its units are the heads."""
    groups = []
    for block in blocks:
        head = torch.arange(block.heads * block.head_dim) // block.head_dim
        members = [
            Member(n, model.get_submodule(n), axes.OUT, head.repeat(3) if block.fused else head) for n in block.inputs
        ]
        members.append(Member(block.output, model.get_submodule(block.output), axes.IN, head))
        groups.append(Group(block.name or block.inputs[0], block.heads, tuple(members), "heads", block.counts))
    return groups


def _named_apart(groups: list[Group]) -> list[Group]:
    """Two groups may start in the same layer (halves of a concatenation): number the later ones."""
    seen: Counter[str] = Counter()
    result = []
    for group in groups:
        seen[group.name] += 1
        suffix = f"#{seen[group.name]}" if seen[group.name] > 1 else ""
        result.append(Group(**{**group.__dict__, "name": group.name + suffix}))
    return result
