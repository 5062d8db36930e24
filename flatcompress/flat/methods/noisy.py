"""Methods that perturb by noise, alone or before an ascent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.ball import Ball, Rho
from flatcompress.flat.engine.context import Probe, Program, Result, Step, normal
from flatcompress.flat.engine.hyper import non_negative, plus, share
from flatcompress.flat.engine.vectors import Vector
from flatcompress.flat.methods.method import Method
from flatcompress.randomness import spaced


def filter_noise(step: Step, std: float) -> list[Tensor | None]:
    """N(0, (std ||row||)^2) on matrices and filters (a row is a slice along dim 0), N(0, (std ||b||)^2) on vectors."""
    noise = step.noise()
    return step.scatter([noise[i] * (_filter_size(step.weights[i]) * std) for i in step.selected])


def _filter_size(w: Tensor) -> Tensor:
    if w.dim() < 2:
        return torch.linalg.vector_norm(w) + 1e-16
    return torch.linalg.vector_norm(w, dim=tuple(range(1, w.dim())), keepdim=True)


def rsam(rho: Rho = 0.05, sigma: float = 0.01, **ball: Any) -> Method:
    """R-SAM: smooth, then climb: e = n + rho g_n / ||g_n||, g_n = grad L(w + n), n filter-wise noise (NeurIPS 2022)."""
    ascent = Ball(rho, **ball)
    non_negative(sigma=sigma)

    def program(step: Step) -> Program:
        n = filter_noise(step, sigma)
        g_n = yield Probe(n)
        return (yield Probe(plus(n, ascent(step, g_n))))

    return Method(program, ascent)


def lpf_sgd(std: float = 0.001, samples: int = 1, growth: float = 0.0, total_steps: int | None = None) -> Method:
    """LPF-SGD: the mean gradient over ``samples`` draws of filter-wise noise (arXiv 2201.08025, algorithm 1).

    The published cost is one pass: give the M parts of the batch as a list of closures, each gets its own draw.
    std grows to ``std (1 + growth)`` over ``total_steps`` along a half cosine when ``growth`` is not 0.
    """
    non_negative(std=std, growth=growth)
    if samples < 1:
        raise UserError(f"samples is {samples!r}; it must be a whole number >= 1")
    if growth and not total_steps:
        raise UserError("growth needs total_steps, the number of steps over which the noise grows")

    def now(step: Step) -> float:
        if not growth or not total_steps:
            return std
        return std * (growth / 2 * (1 - math.cos(math.pi * min(1.0, step.t / total_steps))) + 1)

    def program(step: Step) -> Program:
        total = yield Probe(filter_noise(step, now(step)))
        for _ in range(samples - 1):
            total = vectors.add(total, (yield Probe(filter_noise(step, now(step)))))
        return total if samples == 1 else vectors.scale(total, 1 / samples)

    return Method(program)


def bsam(
    rho: float = 0.01,
    num_data: int = 50_000,
    prior: float = 40.0,
    damping: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.999,
    s_init: float = 1.0,
    delta: float | None = None,
) -> Method:
    """bSAM: SAM as the optimal relaxation of Bayes, a Gaussian of precision N s (arXiv 2210.01620, algorithm 1).

    n = N(0, 1) / sqrt(N s), g_n = grad L(w + n), g1 = grad L(w + rho g_n / s), then with delta = prior / N
        m := beta1 m + (1 - beta1) (g1 + delta w);  w := w - lr m / s;
        s := beta2 s + (1 - beta2) (sqrt(s) |g_n| + damping + delta).
    The base optimizer gives the learning rate and the parameters; its own update rule is not used. num_data: N, the
    size of the training set. s starts at ``s_init``.
    """
    non_negative(rho=rho, prior=prior, damping=damping)
    share("beta1", beta1)
    share("beta2", beta2)
    if num_data < 1 or s_init <= 0:
        raise UserError(f"num_data is {num_data!r} and s_init {s_init!r}; both must be > 0")
    pull = prior / num_data if delta is None else delta

    def precision(step: Step) -> Vector:
        return step.recall("s") or [torch.full_like(p, s_init) for p in step.params]

    def program(step: Step) -> Program:
        s = precision(step)
        n = [x / torch.sqrt(num_data * si) for x, si in zip(step.noise(), s)]
        g_n = yield Probe(step.scatter([n[i] for i in step.selected]))
        g1 = yield Probe(step.scatter([step.option(i, "rho", rho) * g_n[i] / s[i] for i in step.selected]))
        return Result(g1, [[g.abs() for g in g_n]])

    def update(step: Step, kept: Sequence[Vector], combined: Vector, apply: Callable[[], None]) -> None:
        s = precision(step)
        m = step.recall("m") or [torch.zeros_like(p) for p in step.params]
        m = [beta1 * mi + (1 - beta1) * (g + pull * w) for mi, g, w in zip(m, combined, step.weights)]
        for i, p in enumerate(step.params):
            p.sub_(step.rate(i) * m[i] / s[i])
        step.store("m", m)
        if kept:
            grown = [torch.sqrt(si) * a + damping + pull for si, a in zip(s, kept[0])]
            step.store("s", [beta2 * si + (1 - beta2) * x for si, x in zip(s, grown)])

    return Method(program, update=update, keeps=True)


@dataclass(frozen=True)
class Adapter:
    """One low-rank layer: the frozen ``base`` [out, in], factors ``a`` [r, in] and ``b`` [out, r], and its scale."""

    name: str
    base: Tensor
    a: nn.Parameter
    b: nn.Parameter
    scale: float


def adapters(model: nn.Module) -> list[Adapter]:
    """The LoRA layers of a model, by the attribute names of peft (``base_layer``, ``lora_A``, ``lora_B``)."""
    found = []
    for name, module in model.named_modules():
        base, a, b = (getattr(module, key, None) for key in ("base_layer", "lora_A", "lora_B"))
        if base is None or not isinstance(a, nn.ModuleDict) or not isinstance(b, nn.ModuleDict):
            continue
        for key in a:
            factor = float(getattr(module, "scaling", {}).get(key, 1.0))
            down, up = cast(nn.Parameter, a[key].weight), cast(nn.Parameter, b[key].weight)
            found.append(Adapter(f"{name}.{key}", base.weight, down, up, factor))
    return found


def ggpo(sigma: float = 0.03, beta: float = 0.01, layers: Callable[[nn.Module], list[Adapter]] = adapters) -> Method:
    """LoRA-GGPO: noise on the weights below LoRA layers, row i scaled by norms of weight and gradient (2502.14538).

        s_i = (sigma sqrt(W^2 + ||(BA)_i||^2) + beta ||G_i||^2) / sqrt(out)
    W is the mean row norm of the frozen weight, G = scale (B gA + gB A) from the last step. ``layers(model)`` finds
    the adapters. In a model without any, every trainable matrix takes the part of BA, with W = 0.
    """
    non_negative(sigma=sigma, beta=beta)

    def program(step: Step) -> Program:
        found = layers(step.model)
        if not found:
            return (yield Probe(_own_noise(step, sigma, beta)))
        seeds = range(len(found))
        outside = [(x.base, _like(x.base, step, j) * _rows(step, x, sigma, beta)) for j, x in zip(seeds, found)]
        return (yield Probe(outside=outside))

    def remember(step: Step, kept: Sequence[Vector], combined: Vector) -> None:
        found, where = layers(step.model), {id(p): i for i, p in enumerate(step.params)}
        if not found:
            step.memory.values["rows"] = {step.names[i]: _row_norms(combined[i]) for i in _matrices(step)}
            return
        rows = {}
        for x in found:
            ga, gb = (combined[where[id(p)]] if id(p) in where else torch.zeros_like(p) for p in (x.a, x.b))
            rows[x.name] = _row_norms(x.scale * (x.b @ ga + gb @ x.a))
        step.memory.values["rows"] = rows

    return Method(program, remember=remember)


def _row_norms(w: Tensor) -> Tensor:
    return torch.linalg.vector_norm(w.flatten(1), dim=1)


def _matrices(step: Step) -> list[int]:
    return [i for i in step.selected if step.params[i].dim() > 1]


def _own_noise(step: Step, sigma: float, beta: float) -> list[Tensor | None]:
    """Without adapters: each matrix takes the part of BA, with W = 0; vectors stay put."""
    noise = step.noise()
    shift: list[Tensor | None] = [None] * len(step.params)
    for i in _matrices(step):
        w = step.weights[i]
        rows = sigma * _row_norms(w) + beta * _last_rows(step, step.names[i], w) ** 2
        shift[i] = noise[i] * (rows / math.sqrt(w.shape[0])).reshape(-1, *[1] * (w.dim() - 1))
    return shift


def _rows(step: Step, x: Adapter, sigma: float, beta: float) -> Tensor:
    known = step.memory.values.setdefault("base_rows", {})
    if x.name not in known:
        known[x.name] = float(_row_norms(x.base).mean())
    size = torch.sqrt(known[x.name] ** 2 + _row_norms(x.scale * (x.b @ x.a)) ** 2)
    s = (sigma * size + beta * _last_rows(step, x.name, x.base) ** 2) / math.sqrt(x.base.shape[0])
    return s.to(x.base).reshape(-1, *[1] * (x.base.dim() - 1))


def _last_rows(step: Step, name: str, like: Tensor) -> Tensor:
    rows = step.memory.values.get("rows", {}).get(name)
    return like.new_zeros(like.shape[0]) if rows is None else rows.to(like)


def _like(base: Tensor, step: Step, j: int) -> Tensor:
    return normal([base], spaced(spaced(step.seed, step.t + 1), j, 104_729))[0]
