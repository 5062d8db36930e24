"""GAQAT's remedy for the fight between flatness and quantizer scales (arXiv 2412.05551): freeze by gradient disorder.

A two-probe method gives every scale two gradients: g_task at the weights, g_smooth at the perturbed weights. Over a
window of K steps the *disorder* of g_task counts its sign flips, and the *conflict rate* how often the two oppose:

    delta = mean over t of 1[u_t * u_(t-1) < 0],  u_t = sign g_task(t), a zero repeating the last sign
    C     = mean over t of 1[g_task(t) * g_smooth(t) < 0]

Pure noise has delta = 0.5 with deviation 0.5 / sqrt(K - 1). A scale whose delta is *below* the threshold sits where
both gradients hold it: its task gradient is dropped until a later window says otherwise. The combined gradient
a * m_task * g_task + b * m_smooth * g_smooth is composed anew, so the optimizer still sees every parameter.
The paper's text does not settle everything; what it leaves open is a switch of `ScaleConflict`, and so are two remedies
other than freezing: to move the scale less, and to take the opposing part out of the smaller gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError, unknown
from flatcompress.quant.layers import graph_of, scale_parameters, tensor_quantizers
from flatcompress.quant.placement import readers_of_quantizers
from flatcompress.quant.qat.disorder import Policy, Statistics, mean
from flatcompress.quant.qat.remedies import SlowSteps, dropped, projected
from flatcompress.quant.quantizers.protocol import learns_step

MODES = ("paper", "gated", "opposed", "standing", "random")
REMEDIES = ("freeze", "slow", "project")
TARGETS = ("task", "smooth", "both")
GRANULARITIES = ("quantizer", "layer", "channel")
TAU_KINDS = ("absolute", "quantile", "sigma")


class ScaleConflict:
    """Watches the scales of a quantized model and freezes gradients of the orderly ones.

    Put ``compose`` into the slot of a two-probe optimizer. ``K``: steps per window, at least 2. ``tau``: the threshold,
    read as ``tau_kind`` says: ``absolute`` (freeze below it), ``quantile`` (freeze that share, the least disordered),
    ``sigma`` (freeze what lies more than tau deviations of chance below 0.5). ``mode``: ``paper``; ``gated``, which
    also demands lasting opposition: C > 0.5 and summed gradients of opposite sign; ``opposed``, which reads the
    share of agreeing steps, 1 - C, in the place of disorder; ``standing``, which asks that the scale stand where it is
    (way over the window below half its path: one that is orderly because it has not arrived yet goes on); or
    ``random``, a control that ranks the scales by numbers drawn from (``seed``, window). ``freeze_target``: the
    gradient that is dropped.
    ``granularity``: one decision per quantizer, per layer (its weights and input together) or per channel.
    ``refreeze``: decide anew at every window, or keep what was once frozen. ``mix``: the weights (a, b) with which the
    method combines its probes; SAGM's are (0.5, 0.5), SAM's (0, 1). The first window never freezes.

    ``remedy``: ``freeze``, the paper's; ``slow``: a scale that would be frozen keeps both gradients and takes a tenth
    of its step instead, whatever the optimizer (call `after_step` after each); ``project``: no decisions at all, in
    every step the smaller of two opposing gradients loses its part along the larger (PCGrad, arXiv 2001.06782, one
    vector per ``granularity``), which of a single number leaves nothing.

    Everything is in `state_dict`, also the middle of a window.
    """

    def __init__(
        self,
        model: nn.Module,
        K: int = 200,
        tau: float = 0.3,
        mode: str = "paper",
        freeze_target: str = "task",
        granularity: str = "quantizer",
        refreeze: bool = True,
        tau_kind: str = "absolute",
        mix: tuple[float, float] = (0.5, 0.5),
        remedy: str = "freeze",
        seed: int = 0,
    ) -> None:
        for value, known, what in (
            (mode, MODES, "mode"), (freeze_target, TARGETS, "freeze_target"), (remedy, REMEDIES, "remedy"),
            (granularity, GRANULARITIES, "granularity"), (tau_kind, TAU_KINDS, "tau_kind"),
        ):  # fmt: skip
            if value not in known:
                raise unknown(what, value, known)
        if not isinstance(K, int) or K < 2:
            raise UserError(f"K must be a whole number of at least 2 steps; found {K!r}.")
        if not math.isfinite(tau) or tau < 0 or (tau_kind == "quantile" and tau > 1):
            raise UserError(f"tau must be at least 0 (and a quantile at most 1); found {tau!r}.")
        self.K, self.freeze_target, self.granularity, self.refreeze = K, freeze_target, granularity, refreeze
        self.mix, self.remedy, self.policy = mix, remedy, Policy(K, float(tau), tau_kind, mode, seed)
        self.scales = scale_parameters(model)
        if not self.scales:
            raise UserError("the model has no learned scales to watch.")
        self.names = list(self.scales)
        self.sizes = [p.numel() for p in self.scales.values()]
        device = next(iter(self.scales.values())).device
        self._owner = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes)).to(device)
        self._groups = self._group_ids(model).to(device)
        self._starts = self._initial(model)
        self.t, self.windows = 0, 0
        self.frozen = torch.zeros(sum(self.sizes), dtype=torch.bool, device=device)
        self._latest: dict[str, dict[str, Any]] = {}
        self.statistics = Statistics(sum(self.sizes), device)
        self._slow = SlowSteps(list(self.scales.values()))

    # -- the compose slot ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def compose(
        self, params: list[nn.Parameter], probes: list[list[Tensor | None]], combined: list[Tensor | None]
    ) -> None:
        """Drop frozen scale gradients from ``combined`` in place, then count this step. One probe: nothing to do."""
        if len(probes) < 2:
            return
        position = {id(p): i for i, p in enumerate(params)}
        where = [position.get(id(p)) for p in self.scales.values()]
        task, smooth = self._vector(where, probes[0]), self._vector(where, probes[1])
        self._remedy(where, combined, task, smooth)
        self.statistics.count(task, smooth, self._now())
        self.t += 1
        if self.t % self.K == 0:
            self._close_window()

    def _vector(self, where: list[int | None], probe: list[Tensor | None]) -> Tensor:
        parts = []
        for index, scale in zip(where, self.scales.values()):
            found = None if index is None else probe[index]
            parts.append(torch.zeros_like(scale).flatten() if found is None else found.detach().flatten())
        return torch.cat(parts)

    def after_step(self) -> None:
        """After the optimizer's step: a scale that is ``slow`` goes back nine tenths of it. Else nothing."""
        self._slow.after_step()

    def _remedy(self, where: list[int | None], combined: list[Tensor | None], task: Tensor, smooth: Tensor) -> None:
        if self.remedy == "project":
            self._write(where, combined, *projected(task, smooth, self._groups, self.mix))
        elif bool(self.frozen.any()) and self.remedy == "slow":
            self._slow.remember(self.frozen.split(self.sizes))
        elif bool(self.frozen.any()):
            changed = dropped(task, smooth, self.frozen, self.mix, self.freeze_target)
            self._write(where, combined, self.frozen, changed)

    def _write(self, where: list[int | None], combined: list[Tensor | None], changed: Tensor, composed: Tensor) -> None:
        for index, mask, new in zip(where, changed.split(self.sizes), composed.split(self.sizes)):
            gradient = None if index is None else combined[index]
            if gradient is not None and index is not None and bool(mask.any()):
                kept = mask.view_as(gradient)  # a channel that is not frozen keeps its bits
                combined[index] = torch.where(kept, new.view_as(gradient), gradient)

    # -- decisions -----------------------------------------------------------------------------------------------

    def _close_window(self) -> None:
        if self.remedy != "project":
            frozen, decided = self.policy.frozen(self.statistics, self._groups, self.windows)
            self._decide(frozen[self._groups], decided[self._groups])
        self.windows += 1
        self._latest = self._rows()
        self.statistics.reset()

    def _decide(self, frozen: Tensor, decided: Tensor) -> None:
        new = torch.where(decided, frozen, self.frozen)
        self.frozen = new if self.refreeze else new | self.frozen

    def _rows(self) -> dict[str, dict[str, Any]]:
        everywhere = torch.ones_like(self.frozen)
        columns = {
            **self.statistics.columns(self._owner),
            "frozen": mean(self.frozen.double(), everywhere, self._owner),
            "scale_ratio": mean(self._scale_ratio(), everywhere, self._owner),
        }
        lists = {key: value.tolist() for key, value in columns.items()}
        return {name: {key: _plain(lists[key][i]) for key in lists} for i, name in enumerate(self.names)}

    def _now(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.scales.values()])

    def _scale_ratio(self) -> Tensor:
        now = self._now()
        return (now / torch.where(self._starts == 0, torch.ones_like(now), self._starts)).double()

    def timeline(self) -> dict[str, dict[str, Any]]:
        """The last finished window by quantizer: disorder (of both gradients), conflict, frozen share, scale_ratio.

        Undefined figures (a dead quantizer) are None. Empty before the first window has ended.
        """
        return self._latest

    @property
    def frozen_share(self) -> float:
        """Share of quantizers with a frozen gradient."""
        per = mean(self.frozen.double(), torch.ones_like(self.frozen), self._owner)
        return float((per > 0).double().mean())

    # -- set-up and state ----------------------------------------------------------------------------------------

    def _group_ids(self, model: nn.Module) -> Tensor:
        if self.granularity == "channel":
            return torch.arange(sum(self.sizes))
        if self.granularity == "quantizer":
            return self._owner.cpu()
        readers = readers_of_quantizers(model, graph_of(model), set(tensor_quantizers(model)))
        keys = [readers.get(name.removesuffix(".beta"), name.removesuffix(".beta")) for name in self.names]
        index = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        return torch.tensor([index[key] for key in keys])[self._owner.cpu()]

    def _initial(self, model: nn.Module) -> Tensor:
        made = tensor_quantizers(model)
        parts = []
        for name, scale in self.scales.items():
            quantizer = made.get(name)
            start = quantizer.initial if learns_step(quantizer) else scale
            parts.append(start.detach().flatten().clone())
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        """Counters, decisions and position: what a resumed run needs to take the same decisions."""
        return {
            "names": self.names,
            "sizes": self.sizes,
            "t": self.t,
            "windows": self.windows,
            "frozen": self.frozen.clone(),
            "starts": self._starts.clone(),
            "latest": self._latest,
            "counters": self.statistics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`. UserError when it belongs to other quantizers."""
        if list(state["names"]) != self.names or list(state["sizes"]) != self.sizes:
            raise UserError("this conflict state belongs to a model with other quantizers.")
        device = self.frozen.device
        self.t, self.windows, self._latest = int(state["t"]), int(state["windows"]), dict(state["latest"])
        self.frozen = state["frozen"].clone().to(device)
        self._starts = state["starts"].clone().to(device)
        self.statistics.load_state_dict(state["counters"])


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
