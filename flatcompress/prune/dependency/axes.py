"""Which dimension of which tensor holds a layer's channels: the one table behind scores, masks and cuts.

A layer has up to two channel axes: ``out`` (what it produces) and ``in`` (what it consumes). Layers that treat
every channel alone (norms, PReLU, depthwise convolutions) have ``out`` only, recurrent layers ``in`` only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from flatcompress.prune.dependency.recurrent import RECURRENT, output_width

OUT, IN = "out", "in"


class Slot(NamedTuple):
    """Tensor ``name`` of a layer holds the axis' channels along ``dim``."""

    name: str
    dim: int


def is_depthwise(module: nn.Module) -> bool:
    """Every input channel has its own filters: groups == in_channels, out_channels a multiple of it."""
    return isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.in_channels


def layer_kind(module: nn.Module) -> str:
    """The layer's class, with depthwise and grouped convolutions told from dense ones.

    >>> layer_kind(nn.Conv2d(8, 8, 3, groups=8)), layer_kind(nn.Conv2d(8, 8, 3))
    ('depthwise Conv2d', 'Conv2d')
    """
    name = type(module).__name__
    if is_depthwise(module):
        return f"depthwise {name}"
    return f"grouped {name}" if conv_groups(module) > 1 else name


def _conv_slots(module: _ConvNd, axis: str) -> tuple[Slot, ...]:
    if axis == OUT:
        return (Slot("weight", 1 if module.transposed else 0), Slot("bias", 0))
    return () if is_depthwise(module) else (Slot("weight", 0 if module.transposed else 1),)


def _linear_slots(module: nn.Linear, axis: str) -> tuple[Slot, ...]:
    return (Slot("weight", 0), Slot("bias", 0)) if axis == OUT else (Slot("weight", 1),)


def _channelwise_slots(module: nn.Module, axis: str) -> tuple[Slot, ...]:
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return ()
    names = ("weight", "bias", "running_mean", "running_var")
    return tuple(Slot(name, 0) for name in names) if axis == OUT else ()


def _recurrent_slots(module: nn.Module, axis: str) -> tuple[Slot, ...]:
    """What reads the layer's input; the hidden size is kept."""
    if axis == OUT:
        return ()
    names = ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")
    return tuple(Slot(name, 1) for name in names if hasattr(module, name))


def _slot_table(module: nn.Module) -> Callable[[Any, str], tuple[Slot, ...]] | None:
    if isinstance(module, _ConvNd):
        return None if module.transposed and module.groups > 1 else _conv_slots
    if isinstance(module, nn.Linear):
        return _linear_slots
    if isinstance(module, RECURRENT):
        return _recurrent_slots
    if isinstance(module, (_BatchNorm, _InstanceNorm, nn.PReLU)):
        return _channelwise_slots
    if isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels:
        return _channelwise_slots
    return None


def cuttable(module: nn.Module) -> bool:
    """Whether channels can be taken out of ``module`` without changing what the others compute."""
    return _slot_table(module) is not None


def tensors(module: nn.Module, axis: str) -> Iterator[tuple[str, Tensor, int]]:
    """(name, tensor, dimension) of everything that the axis cuts; masks of a weight's shape are cut with it."""
    table = _slot_table(module)
    slots = table(module, axis) if table else ()
    for slot in slots:
        value = getattr(module, slot.name, None)
        if isinstance(value, Tensor):
            yield slot.name, value, slot.dim
            mask = getattr(module, f"{slot.name}_mask", None)
            if isinstance(mask, Tensor) and mask.shape == value.shape:
                yield f"{slot.name}_mask", mask, slot.dim


def parameters(module: nn.Module, axis: str) -> Iterator[tuple[str, nn.Parameter, int]]:
    """`tensors` without buffers."""
    for name, value, dim in tensors(module, axis):
        if isinstance(value, nn.Parameter):
            yield name, value, dim


def width(module: nn.Module, axis: str) -> int:
    """How many channels the axis has now."""
    if isinstance(module, _ConvNd):
        return module.out_channels if axis == OUT else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if axis == OUT else module.in_features
    if isinstance(module, RECURRENT):
        return output_width(module) if axis == OUT else int(module.input_size)
    return int(getattr(module, _count_names(module)[0]))


def _count_names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.PReLU):
        return ("num_parameters",)
    return ("num_channels", "num_groups") if isinstance(module, nn.GroupNorm) else ("num_features",)


def resized(module: nn.Module, axis: str, channels: int) -> dict[str, int]:
    """The attributes that must change, and to what, when the axis has ``channels`` channels."""
    if isinstance(module, _ConvNd):
        if not is_depthwise(module):
            return {"out_channels" if axis == OUT else "in_channels": channels}
        inputs = channels * module.in_channels // module.out_channels
        return {"out_channels": channels, "in_channels": inputs, "groups": inputs}
    if isinstance(module, nn.Linear):
        return {"out_features" if axis == OUT else "in_features": channels}
    if isinstance(module, RECURRENT):
        return {"input_size": channels}
    return dict.fromkeys(_count_names(module), channels)


def conv_groups(module: nn.Module) -> int:
    """Blocks that a grouped convolution splits its channels into; 1 for everything else, depthwise too."""
    return module.groups if isinstance(module, _ConvNd) and not is_depthwise(module) else 1


def local(module: nn.Module, axis: str, values: Tensor) -> Tensor:
    """Per-channel ``values`` along the stored dimension: a grouped convolution stores one block of its inputs.

    All blocks must keep the same channels (they are tied when groups are built), so the first one stands for all.
    """
    blocks = conv_groups(module) if axis == IN else 1
    return values[: len(values) // blocks]


def along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """A vector reshaped so that it broadcasts along ``dim`` of ``like``."""
    shape = [1] * like.dim()
    shape[dim] = -1
    return values.to(like.device).reshape(shape)


def per_channel(module: nn.Module, axis: str, values: Tensor, dim: int) -> Tensor:
    """Sum of ``values`` (shaped like a tensor of the layer) over all dimensions but ``dim``: [channels of axis].

    For the inputs of a grouped convolution the sum is taken inside each block, so every input channel keeps its own.
    """
    blocks = conv_groups(module) if axis == IN else 1
    if blocks == 1:
        return values.sum(dim=[d for d in range(values.dim()) if d != dim]) if values.dim() > 1 else values
    split = values.reshape(blocks, -1, *values.shape[1:])  # [blocks, out / blocks, in / blocks, ...]
    return split.sum(dim=[d for d in range(split.dim()) if d not in (0, 2)]).reshape(-1)


def fill_(tensor: Tensor, dim: int, drop: Tensor) -> None:
    """Zero the channels of ``tensor`` where ``drop`` is True; a fill, because 0 * NaN is NaN."""
    with torch.no_grad():
        tensor.masked_fill_(along(drop, tensor, dim), 0)
