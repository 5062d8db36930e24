"""FlatQuant's learned transformations as far as they fold into weights (arXiv 2410.09426).

Before a linear layer, X W^T is computed as (X P) (W P^-T)^T with the P whose two factors lose least on their grids:
min over P of ||X W^T - Q(X P) Q(W P^-T)^T||^2. Behind a LayerNorm P is diagonal and folds into its gain (the paper's
scaling per channel); between attention's values and the projection P is one invertible matrix a head, and folds into
both layers. The paper's other products, dense ones before a layer, run in floats at every inference: left out.

P = Q1 diag(e^s) Q2^T with orthogonal Q1 and Q2, after the paper's decomposition. It begins as the identity and, a
second time, as a random rotation (SmoothQuant's factors, where it is diagonal), and what ends with less error is kept.
Grids end at learned shares of their range meanwhile, as in the paper; the ranges that the network gets are those of the
calibrator and the weight scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from flatcompress.quant.ptq.pairs import Pair, find_pairs, watch
from flatcompress.quant.ptq.values import ValuePath, find_values, undone

STEPS, RATE, BATCH = 300, 5e-3, 512
_ROWS = 8192  # read by a layer, that P is learned on
_OPEN, _WHOLE = 4.0, 50.0  # logits of nearly the whole range, where learning begins, and of the whole
_TOLERANCE = 1e-3
Bits = tuple[int, int | None]
Factors = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


@torch.no_grad()
def flatten(gm: fx.GraphModule, batches: Sequence[Tensor], bits: Bits = (8, 8)) -> list[dict[str, Any]]:
    """Transform the float network of ``gm`` in place for grids of ``bits`` (weights, activations or None).

    ``batches``: calibration inputs. A row per transformation: ``before`` and ``after`` are the relative squared errors
    without it and with it; where nothing was gained the weights stay and the row says so.
    """
    pairs, no_pair = find_pairs(gm)
    pairs = [p for p in pairs if p.producer is None and all(isinstance(r, nn.Linear) for r in p.readers.values())]
    paths, no_values = find_values(gm, batches[0])
    norms = {name: why for name, why in no_pair.items() if isinstance(gm.get_submodule(name), nn.LayerNorm)}
    if not pairs and not paths:
        why = "there is neither a LayerNorm before linear layers nor attention whose values can be transformed"
        return [{"step": "flatquant", "layer": "", "skipped": why}]
    every: list[Pair | ValuePath] = [*pairs, *paths]
    seen: dict[fx.Node, list[Tensor]] = {one.tensor: [] for one in every}
    watch(gm, seen, batches, lambda node, value: seen[node].append(value.flatten(0, -2)))
    rows: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(0)
    wanted = gm(batches[0])
    for one in every:
        weights = [cast(nn.Linear, reader).weight.detach() for reader in one.readers.values()]
        x, names = _some(torch.cat(seen[one.tensor]), generator), list(one.readers)
        before, after, made = _learned(one, x, torch.cat(weights), bits, generator)
        row = {"step": "flatquant", "layer": one.name, "readers": names, "before": before, "after": after}
        rows.append(row)
        if after >= before:
            row["skipped"] = "nothing was gained"
            continue
        kept = {k: v.clone() for k, v in gm.state_dict().items()}
        one.move(made.value())
        if not torch.allclose(gm(batches[0]), wanted, rtol=0, atol=_TOLERANCE * float(wanted.abs().max())):
            gm.load_state_dict(kept)
            row["skipped"] = "the network would compute something else: other operators read the same features"
    return rows + [{"step": "flatquant", "layer": name, "skipped": why} for name, why in (norms | no_values).items()]


def _some(rows: Tensor, generator: torch.Generator) -> Tensor:
    if len(rows) <= _ROWS:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:_ROWS].to(rows.device)]


class _Diagonal(nn.Module):
    """Factors per channel: X / c, W c."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.log = nn.Parameter(start.log())

    def factors(self) -> Factors:
        c = self.log.exp()
        return (lambda x: x / c), (lambda w: w * c)

    def value(self) -> Tensor:
        """What `Pair.move` takes."""
        return self.log.detach().exp()


class _Heads(nn.Module):
    """One matrix a head, P = Q1 diag(e^s) Q2^T; ``start`` [heads, d, d] is Q1's first."""

    def __init__(self, start: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.register_buffer("columns", columns)
        self.skew = nn.Parameter(torch.zeros(2, *start.shape, device=start.device))
        self.log = nn.Parameter(torch.zeros(start.shape[:2], device=start.device))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """P and its inverse."""
        skew, one = self.skew - self.skew.mT, torch.eye(self.skew.shape[-1], device=self.skew.device)
        left, right = torch.linalg.solve(one + skew, one - skew)  # Cayley's map onto orthogonal matrices
        left = self.start @ left  # type: ignore[operator]
        return (left * self.log.exp().unsqueeze(1)) @ right.mT, (right * self.log.neg().exp().unsqueeze(1)) @ left.mT

    def factors(self) -> Factors:
        there, back = self.matrices()
        heads, size = there.shape[:2]
        columns: Tensor = self.columns.flatten()  # type: ignore[operator, union-attr]

        def values(x: Tensor) -> Tensor:
            return torch.einsum("nhi,hij->nhj", x[:, columns].view(-1, heads, size), there).flatten(1)

        return values, lambda w: undone(w[:, columns], back)

    def value(self) -> Tensor:
        """What `ValuePath.move` takes."""
        return self.matrices()[0].detach()


def _learned(
    one: Pair | ValuePath, x: Tensor, w: Tensor, bits: Bits, generator: torch.Generator
) -> tuple[float, float, _Diagonal | _Heads]:
    """The error without a transformation (the grids' ends alone learned, or left), the best of two, and that one."""
    if isinstance(one, Pair):
        reach = x.abs().amax(0) / w.abs().amax(0)
        usable = torch.isfinite(reach) & (reach > 0)
        begins: list[_Diagonal | _Heads] = [
            _Diagonal(torch.ones_like(reach)),
            _Diagonal(torch.where(usable, reach, torch.ones_like(reach)).sqrt()),  # SmoothQuant's at alpha 1/2
        ]
    else:
        heads, size = one.columns.shape
        plain = torch.eye(size).expand(heads, size, size).clone()
        turned = torch.linalg.qr(torch.randn(heads, size, size, generator=generator)).Q
        begins = [_Heads(start.to(x), one.columns) for start in (plain, turned)]
    begins[0].requires_grad_(False)
    ends_alone = _fit(begins[0], x, w, bits, generator)
    begins[0].requires_grad_(True)
    start = min(ends_alone, _Loss(begins[0], w, bits, _WHOLE)(x).item())
    ends = [_fit(made, x, w, bits, generator) for made in begins]
    return start, min(ends), begins[ends.index(min(ends))]


def _fit(made: _Diagonal | _Heads, x: Tensor, w: Tensor, bits: Bits, generator: torch.Generator) -> float:
    """The error in the end; of a frozen ``made`` the grids' ends alone are learned."""
    loss = _Loss(made, w, bits)
    with torch.enable_grad():
        optimizer = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            some = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator).to(x.device)
            optimizer.zero_grad()
            loss(x[some]).backward()
            optimizer.step()
            schedule.step()
    return loss(x).item()


class _Loss(nn.Module):
    """The relative squared error of X W^T on grids; ``clip``: logit of the share of a range that they begin with."""

    def __init__(self, made: _Diagonal | _Heads, w: Tensor, bits: Bits, clip: float = _OPEN) -> None:
        super().__init__()
        self.made, self._w, self._bits = made, w, bits
        self.clip_x = nn.Parameter(w.new_tensor(clip))
        self.clip_w = nn.Parameter(w.new_full((len(w), 1), clip))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [rows, features]."""
        there, back = self.made.factors()
        moved, weight = there(x), _rounded(back(self._w), self.clip_w, self._bits[0], 1)
        if self._bits[1] is not None:
            moved = _rounded(moved, self.clip_x, self._bits[1], None)
        exact = x @ self._w.T
        return (moved @ weight.T - exact).square().sum() / exact.square().sum().clamp_min(1e-12)


def _rounded(value: Tensor, clip: Tensor, bits: int, axis: int | None) -> Tensor:
    """On a symmetric grid that ends at a learned share of the range; rounding passes gradients through."""
    top = 2 ** (bits - 1) - 1
    reach = value.abs().amax() if axis is None else value.abs().amax(axis, keepdim=True)
    step = (torch.sigmoid(clip) * reach / top).clamp_min(1e-12)
    scaled = (value / step).clamp(-top, top)
    return (scaled + (scaled.round() - scaled).detach()) * step
