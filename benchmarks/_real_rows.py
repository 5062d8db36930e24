"""The runs of `benchmarks.real_domains`: which rows there are, on what, and in which order they are worth having."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

NETWORKS: dict[str, dict[str, Any]] = {
    "Lite0": {"name": "benchmarks._lite0_front:front"},
    "ResNet-18, width 16": {"name": "resnet18", "width": 16, "stem_stride": 2},
}
FLOAT_EPOCHS = {"Lite0": 10, "ResNet-18, width 16": 40}
SIZE, BATCH = 40, 32
STYLES = ("cartoon", "render")  # held out in turn; in outline every row lies near chance
SEEDS = (0, 1, 2, 3, 4)
RHO, K = 0.05, 20


@dataclass(frozen=True)
class Row:
    """One row of a table: keys of the quantize stage, of the prune stage, or of a train stage.

    ``bits``: of weights and activations; ``macs``: share of the multiply-accumulates that is kept; with neither it is
    trained from nothing. ``start``: the float row whose weights it begins with; ``epochs``: a share of the usual ones.
    ``whole``: every stage up to the file, of a pipeline; ``peer``: whose file it is, where it is not this toolkit's.
    """

    name: str
    bits: int | None = None
    method: str = "none"
    keys: dict[str, Any] = field(default_factory=dict)
    start: str = "float ERM"
    epochs: float = 1.0
    macs: float | None = None
    whole: tuple[dict[str, Any], ...] = ()
    peer: str | None = None

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
                "prune": {"method": self.method, "macs": self.macs, "epochs": count, **_adam(1e-3), **once, **self.keys}
            }
        widths = {"weight_bits": self.bits, "activation_bits": self.bits}
        off = {"flatness_map": False, "sharpness": False, "bias_rounding_epochs": 0}
        return {"quantize": {"method": self.method, "epochs": count, **_adam(1e-3), **widths, **off, **self.keys}}


EPOCHS, QUICK_EPOCHS = 4, 1


def _adam(lr: float) -> dict[str, Any]:
    return {"optimizer": {"name": "adam", "lr": lr, "weight_decay": 0.0}}


MSE = {"start": "post_training"}
RELATIVE = {"scale_steps": "relative", "scale_lr": 2.0}  # at 1e-3: at most 2 thousandths of its size a step
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
        Row(f"W{bits}A{bits} LSQ: + both: three times the epochs, depthwise weights at 8 bits", bits, "lsq",
            {**STRONG, "bits": DEPTHWISE}, epochs=3),
    ]  # fmt: skip


STRONGEST, LONGEST, UNTRAINED, BOTH = 4, 7, 10, 11  # positions of rows that are run first
CENTRAL = 5  # rules for scales that are run first: both references, the paper's rule, standing scales, chance


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
        Row(
            f"{w} GAQAT, standing scales alone",
            bits,
            "gaqat",
            {**absolute, "granularity": "channel", "mode": "standing"},
        ),
        Row(f"{w} LSQ, SAGM's passes", bits, "lsq", plain, epochs=2),
        Row(f"{w} LSQ+SAGM, random 30 % frozen", bits, "gaqat", {**watched, "mode": "random"}),
        Row(f"{w} GAQAT, channels judged one by one", bits, "gaqat", {**absolute, "granularity": "channel"}),
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


SHARES = (0.5, 0.25, 0.125)  # of the multiply-accumulates that are left
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
            epochs=3.0 if method in ("magnitude", "taylor") else 1.5)
        for method, radii in CUTS.items() for keys in radii
    ]  # fmt: skip


WHOLE = 40  # epochs of one pass a step that a pipeline's stages take together
CHOSEN_ON = (0, 1)  # seeds of the pairs on which the pipelines' rows were chosen


def pipelines() -> list[Row]:
    """From the pretrained network to a file in equal passes: a library's quantization, then our own orders."""

    def train(method: str, epochs: int, **keys: Any) -> dict[str, Any]:
        return {"train": {"method": method, "epochs": epochs, **_adam(1e-3), **keys}}

    off = {"flatness_map": False, "sharpness": False, "bias_rounding_epochs": 0}
    low = {"method": "lsq", "activation_bits": 8, "bits": DEPTHWISE, **off}
    four = {"quantize": {**low, "weight_bits": 4, "epochs": 10, **STRONG, **_adam(3e-4), "averaging": "swad"}}
    six = {"quantize": {**low, "weight_bits": 6, "epochs": 0, **MSE}}

    swad = {"averaging": "swad"}
    cut = {"prune": {"method": "taylor", "macs": 0.6, "epochs": 10, "schedule_steps": 5, "round_to": 8, **_adam(1e-3)}}
    return [
        Row("ERM + quantize_static W8A8", whole=(train("none", WHOLE),), peer="onnxruntime"),
        Row("SAM + quantize_static W8A8", whole=(train("sam", WHOLE // 2, rho=RHO),), peer="onnxruntime"),
        Row("flatcompress: SWAD, post-training W6A8", whole=(train("none", WHOLE, **swad), six)),
        Row("flatcompress: SWAD, LSQ W4A8", whole=(train("none", WHOLE - 10, **swad), four)),
        Row("flatcompress: SWAD, Taylor, LSQ W4A8", whole=(train("none", WHOLE - 20, **swad), cut, four)),
    ]


def float_file(row: Row) -> str:
    """The name of a peer's network before it was quantized."""
    return f"{row.name.partition(' + ')[0]}, its float file"


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


def cells(
    seeds: Sequence[int], styles: Sequence[str], networks: Sequence[str], most: int | None = None
) -> Iterator[Cell]:
    """Every run, the ones worth most first: targets at 4 and 3 bits, pairs, their controls, the other rows.

    ``most``: so many pairs of a seed and a held-out style alone.
    """
    turns = range(len(styles))
    pairs = [(seed, styles[(turn + at) % len(styles)]) for turn in turns for at, seed in enumerate(seeds)][:most]
    first, four, three, first_network = pairs[:1], ladder(4), ladder(3), networks[0]

    def each(network: str, where: Sequence[tuple[int, str]], rows: Sequence[Row]) -> Iterator[Cell]:
        for seed, style in where:
            fitting = [row for row in rows if network == "Lite0" or "depthwise" not in row.name]
            yield from (Cell(network, style, seed, row) for row in [FLOATS[0], *fitting])

    aims = [rung for at in (UNTRAINED, BOTH, STRONGEST, LONGEST, 0) for rung in (four[at], three[at])]
    for some in (pairs[: len(seeds)], pairs[len(seeds) :]):
        for network in networks:
            yield from each(network, first, aims)
            yield from each(network, some, contest(3)[:CENTRAL])
            yield from each(network, some, [four[BOTH], three[BOTH]])
            yield from each(network, some, contest(4)[:3])
            for share in reversed(SHARES):
                yield from each(network, some, cuts(share))
            yield from each(network, some, pipelines() if network == first_network else [])
            yield from each(network, first, [*FLOATS, *four, *three, *contest(3), *contest(4)])
    for network in networks:
        yield from each(network, pairs, [*contest(3), *contest(4), *FLOATS, *four, *three])
