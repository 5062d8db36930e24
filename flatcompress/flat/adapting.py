"""Test-time adaptation of the normalisation layers: SAR, sharpness-aware and reliable (arXiv 2302.12400).

A deployed network meets data that it was not trained on, without labels. SAR lowers the entropy E(x) of its answers by
the scales and shifts of its normalisation layers alone, on samples that it is sure enough of (eq. 2), at the worst
point near by (eqs. 3 to 5), and starts over where the entropy collapses (section 4, model recovery).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flatcompress.errors import UserError
from flatcompress.flat.factory import create
from flatcompress.modules import check_patterns, logits_of, matches

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
SMOOTHING = 0.9  # of the moving average that decides on a reset
PAPERS_CLASSES = 1000  # the paper's recovery threshold, 0.2, is for so many


def entropy(logits: Tensor) -> Tensor:
    """The entropy of each row's softmax, [B], in nats.

    >>> entropy(torch.zeros(1, 4)).exp()
    tensor([4.])
    """
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


class Sar:
    """Adapts ``model``, in place, to the batches that it is called with; gives the logits [B, classes] of each.

    The answer to a batch is that of the model before it learns from it. ``margin``: samples of an entropy below margin
    x ln(classes) are reliable (eq. 2). ``rho``: radius of the perturbation (eq. 4). ``lr``: of SGD with momentum 0.9,
    for 64 samples; a smaller batch takes its share of it, at least a sixteenth. ``recovery``: where the moving average
    of the entropy falls below it, everything is as it was at first (default: the paper's 0.2 for 1000 classes, by the
    logarithm of the classes). ``ignore``: norm layers that stay, as names or ``re:PATTERN``.

    BatchNorm normalises by the stream's statistics and its own together, as if its own were of ``prior`` samples (arXiv
    2006.16971, eq. 2) and the stream's of one less than they are: a single sample says nothing about the spread of
    samples, and the first one is normalised by the network's own. The stream is the batch and what came before it, by
    the answers: every class keeps the statistics of its last ``memory`` / classes samples (at least one), fading, so
    that a stream of one class never counts for more than its share (after RoTTA, arXiv 2303.13899, whose bank of
    samples is balanced over the answers). Where the stream's means differ from the own by what chance explains,
    the own stay: the stream's share is times max(0, 1 - chance e / d), d the squared distance of the means over all
    channels in units of the own variance, e what a stream of so many samples has without a shift, from the spread of
    its samples' means (positive-part James and Stein, 1961, for chance 1). SAR's rule is the batch alone: prior,
    memory and chance 0.
    UserError: no normalisation layer with a scale, an ignore pattern without a match, inputs without logits.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    >>> adapted = Sar(net.eval())
    >>> adapted(torch.randn(16, 4)).shape
    torch.Size([16, 3])
    """

    def __init__(
        self, model: nn.Module, *, margin: float = 0.4, rho: float = 0.05, lr: float = 2.5e-4,
        recovery: float | None = None, prior: float = 16.0, memory: float = 64.0, chance: float = 2.0,
        ignore: Sequence[str] = (),
    ) -> None:  # fmt: skip
        found = {n: m for n, m in model.named_modules() if isinstance(m, NORMS) and m.weight is not None}
        if not found:
            raise UserError(
                f"{type(model).__name__} has no normalisation layer with a scale: there is nothing to adapt."
            )
        check_patterns("ignore", ignore, list(found))
        self.norms = {n: m for n, m in found.items() if not any(matches(p, n) for p in ignore)}
        if prior < 0 or margin < 0 or lr <= 0:
            raise UserError(f"prior {prior:g} and margin {margin:g} are at least 0 and lr {lr:g} is above 0.")
        if memory and memory < 1:
            raise UserError(f"memory is a number of samples from 1 on, or 0 for the batch alone; found {memory:g}.")
        self.model, self.margin, self.lr, self.recovery, self.prior = model.eval(), margin, lr, recovery, prior
        self.average: float | None = None
        self.resets = self.steps = 0
        self._frozen = [(p, p.requires_grad) for p in model.parameters()]
        model.requires_grad_(False)
        params = [p for m in self.norms.values() for p in (m.weight, m.bias) if isinstance(p, nn.Parameter)]
        for parameter in params:
            parameter.requires_grad_(True)
        self.params, self._first = params, [p.detach().clone() for p in params]
        base = torch.optim.SGD(params, lr, momentum=0.9)
        self.optimizer = create("sam", model, base, rho=rho)
        self._fresh = copy.deepcopy(self.optimizer.state_dict())
        self._streams = [
            _Stream(m, prior, memory, chance)
            for m in model.modules()
            if isinstance(m, _BatchNorm) and m.track_running_stats
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """The logits of ``x`` [B, ...]; then one step on those of its samples that are reliable."""
        with torch.enable_grad():
            logits = self._logits(x)
            entropies, limit = entropy(logits), self.margin * math.log(logits.shape[1])
            reliable = (entropies < limit).nonzero().flatten()
            if len(reliable):
                for group in self.optimizer.param_groups:
                    group["lr"] = self.lr * min(1.0, max(len(x) / 64, 1 / 16))
                self.optimizer.zero_grad()
                self.optimizer.step(self._closure(x, entropies[reliable], reliable, limit))
                self.steps += 1
                self._recover(logits.shape[1])
        for stream in self._streams:
            stream.remember(logits.argmax(1), logits.shape[1])
        return logits.detach()

    def _logits(self, x: Tensor) -> Tensor:
        logits = logits_of(self.model(x))
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
            raise UserError("adaptation by entropy needs logits [B, classes] of at least two classes.")
        return logits

    def _closure(self, x: Tensor, first: Tensor, reliable: Tensor, limit: float) -> Callable[[], Tensor]:
        """Entropy at the weights, which is there already, then at the perturbed ones, of what is reliable there too."""
        known = [first]

        def closure() -> Tensor:
            if known:
                loss = known.pop().mean()
            else:
                again = entropy(self._logits(x))[reliable]
                found = float(again.detach().mean())
                self.average = found if self.average is None else SMOOTHING * self.average + (1 - SMOOTHING) * found
                kept = again < limit
                loss = (again * kept).sum() / max(int(kept.sum()), 1)
            loss.backward()
            return loss

        return closure

    def _recover(self, classes: int) -> None:
        least = 0.2 * math.log(classes) / math.log(PAPERS_CLASSES) if self.recovery is None else self.recovery
        if self.average is not None and self.average < least:
            self._start_over()  # what was learned has collapsed, not what was seen: the stream's statistics stay
            self.resets += 1

    def reset(self) -> None:
        """Everything as it was before the first batch."""
        self._start_over()
        for stream in self._streams:
            stream.forget()

    @torch.no_grad()
    def _start_over(self) -> None:
        for parameter, value in zip(self.params, self._first, strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(self._fresh))
        self.average = None

    def close(self) -> None:
        """Let the model go, with what it has learned: BatchNorm has its own statistics again."""
        for stream in self._streams:
            stream.handle.remove()
        for parameter, trained in self._frozen:
            parameter.requires_grad_(trained)


class _Stream:
    """What a BatchNorm layer has seen and its own statistics, mixed by the numbers of samples behind both."""

    def __init__(self, norm: Any, prior: float, memory: float, chance: float) -> None:
        self.prior, self.memory, self.chance = prior, memory, chance
        self.handle = norm.register_forward_hook(self._normalised)
        self.forget()

    def forget(self) -> None:
        """Nothing seen yet."""
        # class -> samples, and means [3, C]: of values, of their squares, of the squares of the samples' means
        self._seen: dict[int, tuple[float, Tensor]] = {}
        self._last: Tensor | None = None  # the same of each sample of the last batch [B, 3, C]

    @torch.no_grad()
    def remember(self, answers: Tensor, classes: int) -> None:
        """Put the samples of the last batch to those of their class, by its ``answers`` [B]."""
        if not self.memory or self._last is None:
            return
        fade = 1 - 1 / max(self.memory / classes, 1.0)
        for kind, found in zip(answers.tolist(), self._last, strict=True):
            count, before = self._seen.get(kind, (0.0, found))
            total = fade * count + 1
            self._seen[kind] = (total, before + (found - before) / total)
        self._last = None

    def _statistics(self, norm: Any, x: Tensor) -> tuple[float, Tensor, Tensor]:
        """The share of the stream's, and mean and variance [C] of the batch and what came before it."""
        means, squares = (v.flatten(2).mean(2) if x.ndim > 2 else v for v in (x, x.square()))
        every = torch.stack([means, squares, means.square()], 1)
        before = list(self._seen.values()) if self.memory else []
        if self.memory and self._last is None:  # another pass over the same batch, at other weights, is not seen again
            self._last = every.detach()
        total = len(x) + sum(count for count, _ in before)
        mean, square, between = (every.sum(0) + sum(count * found for count, found in before)) / total
        share = 1 - self.prior / (self.prior + total - 1) if self.prior else 1.0
        return share * self._beyond_chance(norm, total, mean, between), mean, (square - mean.square()).clamp_min(0)

    def _beyond_chance(self, norm: Any, total: float, mean: Tensor, between: Tensor) -> float:
        """max(0, 1 - chance e / d): see `Sar`."""
        if not self.chance:
            return 1.0
        own = norm.running_var + norm.eps
        distance = float(((mean - norm.running_mean).square() / own).sum())
        expected = float(((between - mean.square()).clamp_min(0) / own).sum()) / max(total - 1, 1e-9)
        return max(0.0, 1 - self.chance * expected / distance) if distance else 0.0

    def _normalised(self, norm: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if x.numel() // x.shape[1] < 2 and self.prior == 0:
            raise UserError("one value for each channel has no statistics: give larger batches, or prior above 0.")
        share, mean, var = self._statistics(norm, x)
        mean = share * mean + (1 - share) * norm.running_mean
        var = share * var + (1 - share) * norm.running_var
        shape = [1, -1] + [1] * (x.ndim - 2)
        scaled = (x - mean.view(shape)) * (var + norm.eps).rsqrt().view(shape)
        return scaled if norm.weight is None else scaled * norm.weight.view(shape) + norm.bias.view(shape)
