"""PSP-entropy: how much a neuron's firing depends on the class that it is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.modules import evaluating

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU)


def firing_entropy(rates: Tensor) -> Tensor:
    """H = -sum over fires and rests of p log2 p, in bits, of firing rates p in [0, 1]; the same shape.

    >>> firing_entropy(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0., 1., 0.], dtype=torch.float64)
    """
    p = rates.double()
    return (torch.special.entr(p) + torch.special.entr(1 - p)) / math.log(2)


class _Watch:
    """Counts, for every use of a rectifier in a pass, how often each of its inputs was positive, by class."""

    def __init__(self, classes: int) -> None:
        self.fired: dict[str, Tensor] = {}
        self.seen = torch.zeros(classes, dtype=torch.float64)
        self._labels = torch.zeros(0, dtype=torch.int64)
        self._used: dict[str, int] = {}

    def begin(self, labels: Tensor) -> None:
        """A batch with these labels comes next."""
        self._labels, self._used = labels.cpu(), {}
        self.seen += torch.bincount(self._labels, minlength=len(self.seen)).double()

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A hook before the rectifier ``name``; its second use in a pass is called ``name#2``."""

        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._used[name] = use = self._used.get(name, 0) + 1
            key = name if use == 1 else f"{name}#{use}"
            fires = (inputs[0] > 0).flatten(1).double().cpu()
            empty = torch.zeros(len(self.seen), fires.shape[1], dtype=torch.float64)
            self.fired.setdefault(key, empty).index_add_(0, self._labels, fires)

        return count


@torch.no_grad()
def psp_entropy(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], classes: int) -> dict[str, float]:
    """Mean PSP-entropy in bits of the neurons before every rectifier, by its name (arXiv 2004.14765, first order).

    A neuron, each place of a feature map being one, fires where its post-synaptic potential, the rectifier's input, is
    positive. Its entropy is that of firing given the class (`firing_entropy`), and the mean is over neurons and
    classes, as the authors' later code has it. High: neurons do not belong to certain classes. UserError for a model
    without rectifier modules, and for a class without samples.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RECTIFIERS)}
    if not layers:
        known = ", ".join(kind.__name__ for kind in RECTIFIERS)
        raise UserError(f"PSP-entropy looks at what goes into rectifiers, and the model has no such module ({known}).")
    watch = _Watch(classes)
    handles = [module.register_forward_pre_hook(watch.hook(name)) for name, module in layers.items()]
    try:
        with evaluating(model):
            for x, y in batches:
                watch.begin(y)
                model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not bool((watch.seen > 0).all()):
        raise UserError(f"class {int((watch.seen == 0).nonzero()[0])} has no samples: its entropy is not known.")
    return {name: float(firing_entropy(n / watch.seen[:, None]).mean()) for name, n in watch.fired.items()}
