"""The updates of the family written out by hand, as their papers state them, with two-pass loops of their own."""

from __future__ import annotations

import torch
from flat_problem import problem

STEPS = 5


class Hand:
    """A training step by hand: gradients at chosen points, running statistics of the first pass alone."""

    def __init__(self, kind, base):
        self.model = problem.build(kind)
        self.base = base(self.model)
        self.params = list(self.model.parameters())
        self.names = [n for n, _ in self.model.named_parameters()]

    def gradient(self, t, shift=None, rows=slice(None)):
        saved = [p.detach().clone() for p in self.params]
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        with torch.no_grad():
            for p, e in zip(self.params, shift or []):
                p.add_(e)
        x, y = problem.batch(t)
        grads = torch.autograd.grad(problem.loss_fn(self.model(x[rows]), y[rows]), self.params)
        with torch.no_grad():
            for p, w in zip(self.params, saved):
                p.copy_(w)
            if self.seen:
                for n, b in self.model.named_buffers():
                    b.copy_(buffers[n])
        self.seen = True
        return list(grads)

    def step(self, g):
        for p, x in zip(self.params, g):
            p.grad = x
        self.base.step()

    def run(self, rule):
        for t in range(STEPS):
            self.seen = False
            rule(self, t)
        return self.model


def norm(v):
    return torch.sqrt(sum((x**2).sum() for x in v))


def times(a, v):
    return [a * x for x in v]


def plus(a, b, k=1.0):
    return [x + k * y for x, y in zip(a, b)]


def part(a, b):
    """The part of a orthogonal to b."""
    k = sum((x * y).sum() for x, y in zip(a, b)) / sum((y * y).sum() for y in b)
    return plus(a, b, -k)


def ball(g, rho=0.05):
    return times(rho / (norm(g) + 1e-12), g)


def gsam(h, t):
    g0 = h.gradient(t)
    g1 = h.gradient(t, ball(g0))
    h.step(plus(g1, part(g0, g1), -0.4))


def gsam_absolute(h, t):
    g0 = h.gradient(t)
    tg = [p.detach().abs() * g for p, g in zip(h.params, g0)]
    g1 = h.gradient(t, [p.detach().abs() * x * 0.3 / (norm(tg) + 1e-12) for p, x in zip(h.params, tg)])
    h.step(plus(g1, part(g0, g1), -0.4))


def gam(h, t):
    g0 = h.gradient(t)
    g1 = h.gradient(t, ball(g0, 0.02))
    e2 = ball(plus(g1, g0, -1.0), 0.2)
    g2 = h.gradient(t, e2)
    g3 = h.gradient(t, plus(e2, ball(g2, 0.02)))
    m, g = plus(g0, g2), plus(g1, g3)
    h.step(plus(g, part(m, g), -0.03))


def wsam_coupled(h, t):
    g0 = h.gradient(t)
    g1 = h.gradient(t, ball(g0))
    h.step(plus(times(9.0, g1), times(1 - 9.0, g0)))


def wsam_decoupled(h, t):
    g0 = h.gradient(t)
    g1 = h.gradient(t, ball(g0))
    h.step(g0)
    lr = h.base.param_groups[0]["lr"]
    with torch.no_grad():
        for p, a, b in zip(h.params, g1, g0):
            p.sub_(lr * 9.0 * (a - b))


def looksam_all(h, t):
    g0 = h.gradient(t)
    if t % 2 == 0:
        g1 = h.gradient(t, ball(g0, 0.1))
        h.v = part(g1, g0)
        h.step(g1)
    else:
        h.step(plus(g0, times(0.7 * norm(g0) / norm(h.v), h.v)))


def looksam_each(h, t):
    g0 = h.gradient(t)
    if t % 2 == 0:
        g1 = h.gradient(t, times(0.1 / (norm(g0) + 1e-8), g0))
        h.v = [part([a], [b])[0] for a, b in zip(g1, g0)]
        h.step(g1)
    else:
        h.step([g + 0.7 * g.norm() / (v.norm() + 1e-8) * v for g, v in zip(g0, h.v)])


def friendly(h, t):
    g0 = h.gradient(t)
    d = g0 if t == 0 else plus(g0, h.m, -1.0)
    h.m = g0 if t == 0 else plus(times(0.9, h.m), g0, 0.1)
    h.step(h.gradient(t, ball(d, 0.1)))


def fisher(h, t):
    g0 = h.gradient(t)
    f = [1 / (1 + g * g) for g in g0]
    size = torch.sqrt(sum((x * g * g).sum() for x, g in zip(f, g0))) + 1e-12
    h.step(h.gradient(t, [0.05 * x * g / size for x, g in zip(f, g0)]))


def samon(h, t):
    g0 = h.gradient(t)
    on = ["bn1" in n for n in h.names]
    geometry = [
        p.detach().abs() + 0.01 if n.endswith("weight") else torch.ones_like(p) for n, p in zip(h.names, h.params)
    ]
    size = norm([c * g for c, g, use in zip(geometry, g0, on) if use]) + 1e-16
    e = [0.5 * c * c * g / size if use else torch.zeros_like(g) for c, g, use in zip(geometry, g0, on)]
    h.step(h.gradient(t, e))


def masked(h, t):
    g0 = h.gradient(t)
    e = times(0.05 / (norm(g0) + 1e-7), g0)
    h.step(h.gradient(t, [problem.fixed_mask(n, p) * x for n, p, x in zip(h.names, h.params, e)]))


def momentum_sgd(h, t):
    if t == 0:
        h.step(h.gradient(t))
        return
    e = times(-1.0, ball([h.base.state[p]["momentum_buffer"] for p in h.params], 0.3))
    decay = h.base.param_groups[0]["weight_decay"]
    h.step(plus(h.gradient(t, e), e, decay))


def momentum_adamw(h, t):
    e = None
    if t:
        e = times(-1.0, ball([h.base.state[p]["exp_avg"] for p in h.params], 1.0))
    g = h.gradient(t, e)
    group = h.base.param_groups[0]
    decay, group["weight_decay"] = group["weight_decay"], 0.0
    h.step(g)
    group["weight_decay"] = decay
    with torch.no_grad():
        for p in h.params:
            p.mul_(1 - group["lr"] * decay)


def dpsat(h, t):
    e = None if t == 0 else times(0.05 / (norm(h.last) + 1e-16), h.last)
    h.last = h.gradient(t, e)
    h.step(h.last)


def dpsat_step(h, t):
    now = [p.detach().clone() for p in h.params]
    e = None
    if t:
        d = plus(h.before, now, -1.0)
        e = times(0.05 / (norm(d) + 1e-16), d)
    g = h.gradient(t, e)
    h.before = now
    h.step(g)


def lpf(h, t):
    g = [torch.zeros_like(p) for p in h.params]
    for j in range(2):
        n = fixed_noise(2 * t + j, h.params)
        e = [
            0.05 * x * (p.detach().norm() + 1e-16 if p.dim() < 2 else p.detach().norm(dim=1, keepdim=True))
            for x, p in zip(n, h.params)
        ]
        g = plus(g, h.gradient(t, e), 0.5)
    h.step(g)


def rsam(h, t):
    n = fixed_noise(t, h.params)
    n = [
        0.01 * x * (p.detach().norm() + 1e-16 if p.dim() < 2 else p.detach().norm(dim=1, keepdim=True))
        for x, p in zip(n, h.params)
    ]
    g_n = h.gradient(t, n)
    h.step(h.gradient(t, plus(n, ball(g_n))))


def bsam(h, t):
    if t == 0:
        h.s = [torch.ones_like(p) for p in h.params]
        h.m = [torch.zeros_like(p) for p in h.params]
    count, delta, lr = 40, 1.0, h.base.param_groups[0]["lr"]
    n = [x / torch.sqrt(count * s) for x, s in zip(fixed_noise(t, h.params), h.s)]
    g_n = h.gradient(t, n)
    g1 = h.gradient(t, [0.01 * g / s for g, s in zip(g_n, h.s)])
    h.m = [0.9 * m + 0.1 * (g + delta * p.detach()) for m, g, p in zip(h.m, g1, h.params)]
    with torch.no_grad():
        for p, m, s in zip(h.params, h.m, h.s):
            p.sub_(lr * m / s)
    h.s = [0.999 * s + 0.001 * (s.sqrt() * g.abs() + 0.1 + delta) for s, g in zip(h.s, g_n)]


def fixed_noise(draw, params):
    out, k = [], 0
    for p in params:
        out.append(torch.cos(1.7 * torch.arange(k, k + p.numel(), dtype=p.dtype) + draw).reshape(p.shape))
        k += p.numel()
    return out
