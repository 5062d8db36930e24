"""The family: every member is a row of `METHODS`, a function of its hyper-parameters that returns a `Method`.

Each program is the update as its paper writes it: ``g0 = yield HERE`` is the gradient at w, ``g1 = yield Probe(e)``
the one at w + e, and what is returned goes to the base optimizer. Programs that need more than the ball stand in
`flatcompress.flat.methods.masked`, `flatcompress.flat.methods.onepass` and `flatcompress.flat.methods.noisy`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatcompress.errors import UserError, unknown
from flatcompress.flat.engine import (
    combine,
    vectors,
)
from flatcompress.flat.engine.ball import Ball, Rho
from flatcompress.flat.engine.context import HERE, Probe, Program, Result, Step
from flatcompress.flat.engine.hyper import non_negative, plus, share
from flatcompress.flat.engine.vectors import Vector
from flatcompress.flat.methods import (
    cheap,
    combined,
    masked,
    multitask,
    noisy,
    onepass,
    trust,
)
from flatcompress.flat.methods.method import Bounds, Facts, Method
from flatcompress.registry import Registry


def none() -> Method:
    """The base optimizer alone."""
    return Method()


def sam(rho: Rho = 0.05, **ball: Any) -> Method:
    """SAM: g = grad L(w + e), e = rho g0 / ||g0|| (arXiv 2010.01412, eq. 2 and 3)."""
    ascent = Ball(rho, **ball)

    def program(step: Step) -> Program:
        # g0 and e have no names, so that they do not take memory during the second pass.
        return (yield Probe(ascent(step, (yield HERE))))

    return Method(program, ascent)


def asam(rho: Rho = 0.5, eta: float = 0.01, geometry: Any = "elementwise", **ball: Any) -> Method:
    """ASAM: SAM in the metric T = |w| + eta on weights, 1 on biases (arXiv 2102.11600, eq. 3, algorithm 1)."""
    return sam(rho, **{"eta": eta, "geometry": geometry, "tiny": 1e-16, **ball})


def fisher_sam(rho: Rho = 0.05, eta: float = 1.0, **ball: Any) -> Method:
    """Fisher SAM: SAM in the metric T = (1 + eta g0^2)^(-1/2), the batch's diagonal Fisher (arXiv 2206.04920)."""
    return sam(rho, **{"eta": eta, "geometry": "fisher", **ball})


def gsam(rho: Rho = 0.05, alpha: float = 0.4, **ball: Any) -> Method:
    """GSAM: g = g1 - alpha (g0 - proj_g1(g0)), which also closes the surrogate gap (arXiv 2203.08065, algorithm 1).

    The paper ties rho to the learning rate: ``rho=flat.radius.tied_to_lr(...)``.
    """
    ascent = Ball(rho, **ball)
    non_negative(alpha=alpha)

    def program(step: Step) -> Program:
        g0 = yield HERE
        g1 = yield Probe(ascent(step, g0))
        return vectors.sub(g1, combine.orthogonal(g0, g1), alpha)

    return Method(program, ascent)


def sagm(rho: Rho = 0.05, alpha: float = 0.001, **ball: Any) -> Method:
    """SAGM: g = (g0 + g1) / 2 with e = (rho / ||g0|| - alpha) g0 (arXiv 2303.10353, eq. 8)."""
    ascent = Ball(rho, **ball)
    non_negative(alpha=alpha)

    def program(step: Step) -> Program:
        g0 = yield HERE
        g1 = yield Probe(plus(ascent(step, g0), ascent.metric(step, g0), -alpha))
        return vectors.scale(vectors.add(g0, g1), 0.5)

    return Method(program, ascent)


def gam(
    grad_rho: Rho = 0.02,
    grad_norm_rho: Rho = 0.2,
    gamma: float = 0.03,
    beta1: float = 1.0,
    beta2: float = 1.0,
    beta3: float = 1.0,
    **ball: Any,
) -> Method:
    """GAM: first-order flatness, rho * max ||grad L||, by finite differences (arXiv 2303.03108, the released form).

    d = g1 - g0 estimates the gradient of the gradient norm; four passes. G = beta1 g1 + beta3 g3 adds two gradients,
    so under SGD the effective learning rate doubles.
    """
    inner = Ball(grad_rho, key="grad_rho", **ball)
    outer = Ball(grad_norm_rho, key="grad_norm_rho", **ball)
    non_negative(gamma=gamma)

    def program(step: Step) -> Program:
        g0 = yield HERE
        g1 = yield Probe(inner(step, g0))
        e2 = outer(step, vectors.sub(g1, g0))
        g2 = yield Probe(e2)
        g3 = yield Probe(plus(e2, inner(step, g2)))
        m = vectors.add(g0, g2, abs(beta2))
        g = vectors.add(vectors.scale(g1, beta1), g3, beta3)
        return vectors.sub(g, combine.orthogonal(m, g), gamma)

    return Method(program, outer)


def wsam(rho: Rho = 0.05, gamma: float = 0.9, decouple: bool = True, **ball: Any) -> Method:
    """WSAM: sharpness as a weighted regulariser, alpha = gamma / (1 - gamma) (arXiv 2305.15817, algorithms 1 and 2).

    Coupled: g = alpha g1 + (1 - alpha) g0. Decoupled: the base optimizer steps with g0, then
    w -= lr alpha (g1 - g0), which knows neither momentum nor Adam's scaling.
    """
    ascent = Ball(rho, **ball)
    if not 0 <= gamma < 1:
        raise UserError(f"gamma is {gamma!r}; it must lie in 0 <= gamma < 1 (0.5 is SAM, 0 the base optimizer)")
    alpha = gamma / (1 - gamma)

    def coupled(step: Step) -> Program:
        g0 = yield HERE
        g1 = yield Probe(ascent(step, g0))
        return vectors.add(g0, vectors.sub(g1, g0), alpha)

    def decoupled(step: Step) -> Program:
        g0 = yield HERE
        g1 = yield Probe(ascent(step, g0))
        return Result(g0, [g0, g1])

    def update(step: Step, kept: Sequence[Vector], combined: Vector, apply: Any) -> None:
        if len(kept) < 2:
            apply()
            return
        # Each gradient is clipped on its own, as in the paper; and taken now, the base may write into its gradients.
        sharpness = vectors.sub(step.clip(kept[1]), step.clip(kept[0]))
        apply()
        for i, p in enumerate(step.params):
            p.sub_(sharpness[i] * step.rate(i) * alpha)

    return Method(decoupled, ascent, update=update, keeps=True) if decouple else Method(coupled, ascent)


def wsam_mix(hyper: Mapping[str, Any]) -> tuple[float, float] | None:
    """What each of the two gradients counts in the gradient that the base optimizer takes; decoupled: not so made."""
    alpha = hyper["gamma"] / (1 - hyper["gamma"])
    return None if hyper["decouple"] else (1 - alpha, alpha)


def looksam(rho: Rho = 0.1, k: int = 5, alpha: float = 0.7, scope: str = "all", **ball: Any) -> Method:
    """LookSAM: a SAM step every k-th time, its part v orthogonal to g0 reused in between (arXiv 2203.02714).

    v = g1 - proj_g0(g1); in between g = g0 + alpha ||g0|| v / ||v||. scope: projection and norms over the whole vector
    (``all``, as the paper writes them) or ``per_tensor`` (as two widespread implementations do).
    """
    ascent = Ball(rho, **{"tiny": 1e-12 if scope == "all" else 1e-8, **ball})
    share_of = combine.SCOPES.get(scope)
    if share_of is None:
        raise unknown("scope", scope, combine.SCOPES)
    if k < 1:
        raise UserError(f"k is {k!r}; it must be a whole number >= 1 (1 is SAM)")
    non_negative(alpha=alpha)

    def program(step: Step) -> Program:
        g0 = yield HERE
        g1 = yield Probe(ascent(step, g0))
        return Result(g1, [g0, g1])

    def remember(step: Step, kept: Sequence[Vector], combined: Vector) -> None:
        if kept:
            step.store("v", share_of.orthogonal(kept[1], kept[0]))

    def otherwise(step: Step) -> Program:
        g0 = yield HERE
        v = step.recall("v")
        return g0 if v is None else share_of.add_along(g0, v, alpha)

    return Method(program, ascent, lambda step: step.t % k == 0, otherwise, remember, keeps=True)


def friendlysam(rho: Rho = 0.1, sigma: float = 1.0, lam: float = 0.9, **ball: Any) -> Method:
    """FriendlySAM: climb along the batch's own part, D = g0 - sigma EMA(g0) (arXiv 2403.12350, algorithm 1).

    The first step has D = g0 and starts the EMA m there; later m := lam m + (1 - lam) g0, after its use.
    """
    ascent = Ball(rho, **ball)
    share("lam", lam)

    def program(step: Step) -> Program:
        g0 = yield HERE
        m = step.recall("ema")
        g1 = yield Probe(ascent(step, g0 if m is None else vectors.sub(g0, m, sigma)))
        return Result(g1, [g0])

    def remember(step: Step, kept: Sequence[Vector], combined: Vector) -> None:
        if kept:
            m = step.recall("ema")
            g0 = kept[0]
            step.store("ema", vectors.clone(g0) if m is None else vectors.add(vectors.scale(m, lam), g0, 1 - lam))

    return Method(program, ascent, remember=remember, keeps=True)


def bloop(lam: float = 0.1, decay: float = 0.99) -> Method:
    """Bloop: g = g_main + lam (g_aux - proj_m(g_aux)), m an EMA of g_main (arXiv 2402.02998, algorithm 1).

    The second loss acts only where it does not disturb the first: ``step(main_closure, auxiliary_closure)``.
    """
    share("decay", decay)

    def mean(step: Step, g: Vector) -> Vector:
        m = step.recall("ema")
        return vectors.clone(g) if m is None else vectors.add(vectors.scale(m, decay), g, 1 - decay)

    def program(step: Step) -> Program:
        g = yield HERE
        aux = yield Probe(auxiliary=True)
        return Result(vectors.add(g, combine.orthogonal(aux, mean(step, g)), lam), [g])

    def remember(step: Step, kept: Sequence[Vector], combined: Vector) -> None:
        step.store("ema", mean(step, kept[0]))

    return Method(program, remember=remember, keeps=True)


_NOT_NEGATIVE, _SHARE, _COUNT = Bounds(0), Bounds(0, 1), Bounds(1)
_RADIUS = {"rho": _NOT_NEGATIVE}
_METRIC = {"rho": _NOT_NEGATIVE, "eta": _NOT_NEGATIVE}

METHODS: Registry[Facts] = Registry("flat method", Facts)
METHODS.add("none", none, "the base optimizer alone")
METHODS.add(
    "sam", sam, "sharpness-aware minimization: the gradient at the worst point of a ball", "2010.01412", bounds=_RADIUS
)
METHODS.add("asam", asam, "SAM in a ball that scales with the weights", "2102.11600", bounds=_METRIC)
METHODS.add(
    "fisher_sam", fisher_sam, "SAM in the ellipsoid of the diagonal Fisher information", "2206.04920", bounds=_METRIC
)
METHODS.add(
    "gsam", gsam, "surrogate gap: SAM that also lowers perturbed loss minus loss", "2203.08065",
    bounds={**_RADIUS, "alpha": _NOT_NEGATIVE},
)  # fmt: skip
METHODS.add(
    "sagm", sagm, "gradient matching: loss, perturbed loss and their agreement", "2303.10353",
    bounds={**_RADIUS, "alpha": _NOT_NEGATIVE}, mix=(0.5, 0.5),
)  # fmt: skip
METHODS.add(
    "gam", gam, "first-order flatness: lowers the largest gradient norm nearby (4 passes)", "2303.03108",
    bounds={"grad_rho": _NOT_NEGATIVE, "grad_norm_rho": _NOT_NEGATIVE, "gamma": _NOT_NEGATIVE},
)  # fmt: skip
METHODS.add(
    "wsam", wsam, "sharpness as a weighted, decoupled regulariser", "2305.15817",
    bounds={**_RADIUS, "gamma": Bounds(0, 1, open_high=True)}, mix=wsam_mix,
)  # fmt: skip
METHODS.add(
    "looksam", looksam, "SAM every k-th step, its direction reused in between", "2203.02714",
    bounds={**_RADIUS, "k": _COUNT, "alpha": _NOT_NEGATIVE},
)  # fmt: skip
METHODS.add(
    "esam", masked.esam, "efficient SAM: random tensors perturbed, sharpest samples kept", "2110.03141",
    bounds={**_RADIUS, "beta": Bounds(0, 1, open_low=True), "gamma": _SHARE},
)  # fmt: skip
METHODS.add(
    "friendlysam", friendlysam, "SAM along the batch's own part of the gradient", "2403.12350",
    bounds={**_RADIUS, "sigma": _NOT_NEGATIVE, "lam": _SHARE},
)  # fmt: skip
METHODS.add(
    "rsam", noisy.rsam, "random smoothing first, then one ascent", "NeurIPS 2022",
    bounds={**_RADIUS, "sigma": _NOT_NEGATIVE},
)  # fmt: skip
METHODS.add("msam", onepass.msam, "Momentum-SAM: perturb along the momentum, one pass", "2401.12033", bounds=_RADIUS)
METHODS.add("samon", masked.samon, "SAM on the normalisation layers only", "2306.04226", bounds=_METRIC)
METHODS.add(
    "ssam", masked.ssam, "sparse SAM: only the entries of a Fisher or dynamic mask", "2210.05177", bounds=_RADIUS
)
METHODS.add(
    "lpf_sgd", noisy.lpf_sgd, "low-pass filter: the mean gradient under Gaussian noise", "2201.08025",
    bounds={"std": _NOT_NEGATIVE, "growth": _NOT_NEGATIVE, "samples": _COUNT},
)  # fmt: skip
METHODS.add(
    "dpsat", onepass.dpsat, "perturb along the last gradient, one pass, private gradients welcome", "2306.05651",
    bounds=_RADIUS,
)  # fmt: skip
METHODS.add("bsam", noisy.bsam, "Bayes by SAM: a Gaussian posterior with its own update", "2210.01620", bounds=_RADIUS)
METHODS.add(
    "tram", trust.tram, "SAM whose radius is a trust-region distance", "2310.03646",
    bounds={"scale": _NOT_NEGATIVE, "decay": _SHARE}, of_logits=True, elsewhere=True,
)  # fmt: skip
METHODS.add(
    "ggpo", noisy.ggpo, "noise on the frozen weights of LoRA layers, built from their norms", "2502.14538",
    bounds={"sigma": _NOT_NEGATIVE, "beta": _NOT_NEGATIVE},
)  # fmt: skip
METHODS.add(
    "gnp", combined.gnp, "penalised gradient norm: between the plain gradient and SAM's", "2202.03599",
    bounds={**_RADIUS, "alpha": _NOT_NEGATIVE}, mix=lambda hyper: (1 - hyper["alpha"], hyper["alpha"]),
)  # fmt: skip
METHODS.add(
    "stablesam", combined.stablesam, "SAM's direction at the length of the plain gradient", "2401.07250", bounds=_RADIUS
)
METHODS.add(
    "xsam", combined.xsam, "away from the largest loss around, searched for between two directions", "2603.10048",
    bounds={**_RADIUS, "rho_m": _NOT_NEGATIVE, "alpha_max": _NOT_NEGATIVE, "ascents": _COUNT, "every": _COUNT},
)  # fmt: skip
METHODS.add(
    "ksam", cheap.ksam, "SAM on the samples with the largest losses, at the cost of a plain step", "2210.12864",
    bounds={**_RADIUS, "top": Bounds(0, 1, open_low=True)},
)  # fmt: skip
METHODS.add(
    "vsam", cheap.vsam, "SAM's part of the gradient taken as often as it varies, reused in between", "2403.08821",
    bounds={**_RADIUS, "beta": _SHARE, "window": _COUNT, "blocks": _COUNT, "last": _COUNT, "max_share": _SHARE},
)  # fmt: skip
METHODS.add("fmtl", multitask.fmtl, "flat multi-task: SAM per task, aggregated by part", "2211.13723", bounds=_RADIUS)

COMBINATIONS: Registry[Facts] = Registry("combination of two losses", Facts)
COMBINATIONS.add("bloop", bloop, "a second loss that does not disturb the first", "2402.02998")
COMBINATIONS.add(
    "ignite", combined.ignite, "a bound on the gradient norm of the model's mean output", "2503.04242",
    bounds={"rho": _NOT_NEGATIVE, "epsilon": _NOT_NEGATIVE, "eta_lambda": _NOT_NEGATIVE, "lam": _NOT_NEGATIVE},
)  # fmt: skip
COMBINATIONS.add(
    "unlearn", combined.unlearn, "forget one loss's data for good and retain the other's", "2502.05374",
    bounds={"rho": _NOT_NEGATIVE, "lam": _NOT_NEGATIVE},
)  # fmt: skip


def mix_of(name: str, hyper: Mapping[str, Any]) -> tuple[float, float]:
    """The shares of the gradient at w and of the perturbed one in what the method ``name`` returns under ``hyper``.

    UserError where its gradient is not made of these two.
    """
    entry = METHODS[name]
    mix = entry.facts.mix
    found = mix({**entry.defaults, **hyper}) if callable(mix) else mix
    if found is None:
        raise UserError(
            f"{name!r} moves weights by the difference of its two gradients beside the optimizer, where nothing can be "
            "frozen: decouple: false puts both into one gradient."
        )
    return found


def defaults_by_method() -> dict[str, dict[str, Any]]:
    """Every hyper-parameter of the family with its default in each method that takes it."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in METHODS.items():
        for key, default in entry.defaults.items():
            found.setdefault(key, {})[name] = default
    return found
