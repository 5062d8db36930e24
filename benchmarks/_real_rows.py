"""The runs of `benchmarks.real_domains`: which rows there are, on what, and in which order they are worth having."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

NETWORKS: dict[str, dict[str, Any]] = {
    "Lite0": {"name": "benchmarks._lite0_front:front"},
    "ResNet-18, width 16": {"name": "resnet18", "width": 16},
}
FLOAT_EPOCHS = {"Lite0": 10, "ResNet-18, width 16": 40}
SIZE, BATCH = 32, 32
STYLES = ("cartoon", "render")  # held out in turn; in outline every row lies near chance
SEEDS = (0, 1, 2, 3, 4)
RHO, K = 0.05, 20


@dataclass(frozen=True)
class Row:
    """One row of a table: keys of the quantize stage, of the prune stage, or of a train stage.

    ``bits``: of weights and activations; ``macs``: share of the multiply-accumulates that is kept; with neither it is
    trained from nothing. ``start``: the float row whose weights it begins with; ``epochs``: a share of the usual ones.
    """

    name: str
    bits: int | None = None
    method: str = "none"
    keys: dict[str, Any] = field(default_factory=dict)
    start: str = "float ERM"
    epochs: float = 1.0
    macs: float | None = None

    @property
    def is_start(self) -> bool:
        """Whether it is trained from nothing."""
        return self.bits is None and self.macs is None

    def stage(self, network: str, epochs: int) -> dict[str, Any]:
        """The stage as a recipe has it; ``epochs``: of quantization-aware training."""
        if self.is_start:
            rate = 1e-3 if network == "Lite0" else 3e-3
            usual = FLOAT_EPOCHS[network] if epochs >= EPOCHS else 2  # --quick trains next to nothing
            return {"train": {"method": self.method, "epochs": usual, **_adam(rate), **self.keys}}
        count = max(1, round(epochs * self.epochs))
        if self.macs is not None:
            once = {"schedule_steps": 1, "warmup_share": 0.25, "prune_share": 0.25, "round_to": 1}
            return {
                "prune": {"method": self.method, "macs": self.macs, "epochs": count, **_adam(5e-4), **once, **self.keys}
            }
        widths = {"weight_bits": self.bits, "activation_bits": self.bits}
        off = {"flatness_map": False, "sharpness": False, "bias_rounding_epochs": 0}
        return {"quantize": {"method": self.method, "epochs": count, **_adam(5e-4), **widths, **off, **self.keys}}


EPOCHS = 4


def _adam(lr: float) -> dict[str, Any]:
    return {"optimizer": {"name": "adam", "lr": lr, "weight_decay": 0.0}}


MSE = {"start": "post_training"}
RELATIVE = {"scale_steps": "relative", "scale_lr": 2.0}  # at 5e-4: at most a thousandth of its size a step
TRAVELLING = {"scale_lr": 6.0}  # where a rule for scales is to matter, scales must go somewhere
DISTILLED = {"distill": 1.0}
DEPTHWISE = {"re:.*_depthwise_conv": {"weight": 8}}  # a tenth of the weights
STRONG = {**MSE, **RELATIVE, **DISTILLED}
FLOATS = (
    Row("float ERM"),
    Row("float SAGM", method="sagm", keys={"rho": RHO}),
    Row("float SWAD", keys={"averaging": "swad"}),
)
BARE = "LSQ's own start, absolute steps"


def ladder(bits: int) -> list[Row]:
    """What each piece of a strong baseline is worth: plain LSQ, one piece more in every row."""
    return [
        Row(f"W{bits}A{bits} LSQ: {BARE}", bits, "lsq"),
        Row(f"W{bits}A{bits} LSQ: BatchNorm kept as the float network left it", bits, "lsq", {"freeze_bn": True}),
        Row(f"W{bits}A{bits} LSQ: + post-training start", bits, "lsq", MSE),
        Row(f"W{bits}A{bits} LSQ: + relative steps", bits, "lsq", {**MSE, **RELATIVE}),
        Row(f"W{bits}A{bits} LSQ: + distilled", bits, "lsq", STRONG),
        Row(f"W{bits}A{bits} LSQ: + scales first", bits, "lsq", {**STRONG, "scale_warmup": 0.1}),
        Row(f"W{bits}A{bits} LSQ: + EMA", bits, "lsq", {**STRONG, "averaging": "ema"}),
        Row(f"W{bits}A{bits} LSQ: + three times the epochs", bits, "lsq", STRONG, epochs=3),
        Row(f"W{bits}A{bits} LSQ: + depthwise weights at 8 bits", bits, "lsq", {**STRONG, "bits": DEPTHWISE}),
        Row(f"W{bits}A{bits} LSQ: + scales at three times the rate", bits, "lsq", {**STRONG, **TRAVELLING}),
        Row(f"W{bits}A{bits} post-training alone", bits, "lsq", {"epochs": 0}),
    ]


STRONGEST, LONGEST, UNTRAINED = 4, 7, 10  # positions of rows that are run first


def contest(bits: int) -> list[Row]:
    """Rules for scales, all on the strong baseline, with the controls; the references and the paper's rule first."""
    w = f"W{bits}A{bits}"
    plain = {**STRONG, **TRAVELLING}
    flat = {**plain, "rho": RHO}
    watched = {**flat, "K": K, "tau": 0.3}
    absolute = {**watched, "tau_kind": "absolute"}
    return [
        Row(f"{w} LSQ+SAGM", bits, "lsq_sagm", flat),
        Row(f"{w} GAQAT as published", bits, "gaqat", absolute),
        Row(f"{w} GAQAT, channels judged one by one", bits, "gaqat", {**absolute, "granularity": "channel"}),
        Row(
            f"{w} GAQAT, standing scales alone",
            bits,
            "gaqat",
            {**absolute, "granularity": "channel", "mode": "standing"},
        ),
        Row(f"{w} LSQ, SAGM's passes", bits, "lsq", plain, epochs=2),
        Row(f"{w} LSQ+SAGM, random 30 % frozen", bits, "gaqat", {**watched, "mode": "random"}),
        Row(f"{w} LSQ+SAGM, scales fixed", bits, "lsq_sagm", {**flat, "scale_stop": 0.0}),
        Row(f"{w} GAQAT by the recipe's default", bits, "gaqat", watched),
        Row(f"{w} LSQ+SAGM, scales stop at a quarter", bits, "lsq_sagm", {**flat, "scale_stop": 0.25}),
        Row(f"{w} LSQ+SAGM, turns of {K} steps", bits, "lsq_sagm", {**flat, "scale_turns": K}),
        Row(f"{w} LSQ+SAGM, scales at a tenth", bits, "lsq_sagm", {**flat, "scale_lr": 0.6}),
        Row(f"{w} GAQAT, a layer's scales together", bits, "gaqat", {**absolute, "granularity": "layer"}),
        Row(f"{w} GAQAT, order and opposition", bits, "gaqat", {**absolute, "mode": "gated"}),
        Row(f"{w} LSQ+SAM", bits, "lsq_sam", flat),
        Row(f"{w} SAQ", bits, "saq", flat),
        Row(f"{w} SQuAT", bits, "squat", flat),
        Row(f"W{bits} QT-DoG (activations float)", bits, "qt_dog", {**RELATIVE, "activation_bits": None}),
    ]


SHARES = (0.25, 0.125)  # of the multiply-accumulates that are left
# Radii that are tried; the best by validation stands for the method.
CUTS: dict[str, list[dict[str, Any]]] = {
    "magnitude": [{}],
    "taylor": [{}],
    "sam": [{"rho": rho} for rho in (0.05, 0.1)],
    "asam": [{"rho": rho} for rho in (0.5, 1.0, 2.0)],
    "adasap": [{"rho_max": rho} for rho in (0.5, 1.0, 2.0)],
}


def cuts(share: float) -> list[Row]:
    """Channels removed at one event from the trained network, then trained on: as many passes in every row."""
    return [
        Row(f"{share:.1%} {method}{''.join(f', {v:g}' for v in keys.values())}", None, method, keys, macs=share,
            epochs=4.0 if method in ("magnitude", "taylor") else 2.0)
        for method, radii in CUTS.items() for keys in radii
    ]  # fmt: skip


REFERENCE = "LSQ+SAGM"


@dataclass(frozen=True)
class Cell:
    """One run."""

    network: str
    held_out: str
    seed: int
    row: Row

    @property
    def key(self) -> str:
        """What its result is kept under."""
        return f"{self.network} / {self.held_out} / {self.seed} / {self.row.name}"


def cells(seeds: Sequence[int], styles: Sequence[str], networks: Sequence[str]) -> Iterator[Cell]:
    """Every run, the ones worth most first: targets at 4 and 3 bits, pairs, their controls, the other rows."""
    first, every = networks[0], [(seed, style) for seed in seeds for style in styles]

    def each(network: str, where: Sequence[tuple[int, str]], rows: Sequence[Row]) -> Iterator[Cell]:
        for seed, style in where:
            yield from (Cell(network, style, seed, row) for row in [FLOATS[0], *rows])

    four, three, rows = ladder(4), ladder(3), contest(3)
    yield from each(
        first, every[:1], [rung for at in (UNTRAINED, STRONGEST, LONGEST, 0) for rung in (four[at], three[at])]
    )
    yield from each(first, every, rows[:3])
    yield from each(first, every[:1], [*four, *three])
    for part in (rows[3:7], rows[7:], [*FLOATS, *four, *three]):
        yield from each(first, every, part)
    for network in networks:
        yield from each(network, every, [row for share in SHARES for row in cuts(share)])
        yield from each(network, every, [*contest(4), *rows])
