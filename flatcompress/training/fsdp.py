"""Weights, gradients and the optimizer's state divided over the processes while a job trains (PyTorch's FSDP2).

A process then holds its share of them, and the whole weights of one block at a time. Outside of training the network is
whole in every process again: calibration, measuring, checkpoints and export work on that.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.sharded import broadcast_, whole

LEAST = 1_000_000  # parameters of a block that is gathered by itself; a smaller one is not worth a message


def divide(model: nn.Module, kept: Iterable[Tensor] = (), least: int = LEAST) -> nn.Module:
    """Divide the parameters of ``model`` over all processes, in place; returns what `gather` puts it together in.

    The blocks (children of a Sequential or a ModuleList) of ``least`` parameters or more are gathered one after the
    other, what is outside of them at once. ``kept``: parameters that stay whole in every process, as those without a
    dimension do; whoever trains averages their gradients. UserError where torch has no `fully_shard` with
    ``ignored_params``.
    """
    fully_shard = _fully_shard()
    shell = copy.deepcopy(model, {id(p): _empty(p) for p in model.parameters()})
    stay = {id(p) for p in kept}
    ignored = {p for p in model.parameters() if id(p) in stay or not p.dim()}
    # The model itself too lets go of its weights after a forward: epochs are judged by forwards alone.
    for block in (*_blocks(model, least), model):
        fully_shard(block, ignored_params=ignored, reshard_after_forward=True)
    model.register_forward_pre_hook(_same_buffers)
    return shell


def gather(model: nn.Module, shell: nn.Module) -> nn.Module:
    """``shell`` with the weights and buffers of the divided ``model``, whole; every process calls it."""
    named = dict(model.named_parameters())
    for name, empty in shell.named_parameters():
        empty.data = whole(named[name].detach()).clone()
        empty.requires_grad_(named[name].requires_grad)
    buffers = dict(model.named_buffers())
    for name, buffer in shell.named_buffers():
        buffer.copy_(buffers[name])
    return shell.train(model.training)


def _same_buffers(model: nn.Module, inputs: Any) -> None:
    """What DistributedDataParallel does before a forward too: all have the running statistics of the first process."""
    with torch.no_grad():
        broadcast_(list(model.buffers()))


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter in its place that holds nothing."""
    return nn.Parameter(torch.empty(0, dtype=parameter.dtype, device=parameter.device), parameter.requires_grad)


def _blocks(model: nn.Module, least: int) -> list[nn.Module]:
    """Large children of Sequentials and ModuleLists, inner ones first, without the model itself."""
    lists = [m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
    children = {id(child): child for m in lists for child in m.children()}
    found = [m for m in model.modules() if id(m) in children and m is not model]
    return [m for m in reversed(found) if sum(p.numel() for p in m.parameters()) >= least]


def _fully_shard() -> Callable[..., Any]:
    """PyTorch's; not imported before it is needed."""
    found: Any = getattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard", None)
    if found is None or "ignored_params" not in inspect.signature(found).parameters:
        raise UserError(f"strategy: fsdp needs a newer torch than {torch.__version__}: 2.8 or later.")
    return found  # type: ignore[no-any-return]
