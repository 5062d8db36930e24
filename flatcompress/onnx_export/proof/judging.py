"""The rules that a certificate and its repetition elsewhere judge by: what two sets of outputs prove.

A changed argmax is evidence where the reference's own margin, its largest output minus the one that was found largest,
is more than twice what roundoff may move an output by (`roundoff`): rounding cannot explain that one. The others say
that two outputs are as good as equal. Of few samples a share is judged with its uncertainty: it is too high where a
file whose true share is just what is allowed would show as many with a probability below 5 % (the exact binomial
test, which is the lower limit of Clopper and Pearson, Biometrika 1934).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flatcompress.onnx_export.proof import parity
from flatcompress.tasks import Task, build
from flatcompress.tasks.agreement import AGREEMENTS

LARGEST_STEPS = 1.0
FLIPPED = 0.001
METRIC = 0.001
DOUBT = 0.05
ROUNDOFFS = 4.0


def compare(
    reference: NDArray[np.float32],
    found: NDArray[np.float32],
    step: float,
    roundoff: float,
    agreement: str = "argmax",
) -> dict[str, Any]:
    """`parity.compare`, and what the changed argmaxes are worth. roundoff: in the outputs' unit, as `step` is.

    ``flips``: samples whose argmax changed; ``decisive``: those that rounding cannot explain; ``undecided``: the share
    of samples whose two largest reference outputs lie so near that a flip of them would prove nothing. Outputs that
    are numbers decide nothing: their counts are 0, and they are held to steps and to the metric.
    """
    decide = AGREEMENTS[agreement]
    row = {**parity.compare(reference, found, step, agreement), "roundoff_steps": roundoff / step}
    if decide is None:
        return {**row, "decisions": 0, "flips": 0, "decisive": 0, "undecided": 0.0}
    ours, theirs = decide(reference), decide(found)
    near = _margin(ours) <= 2 * roundoff
    return {
        **row,
        "decisions": near.size,
        "flips": int((ours.argmax(-1) != theirs.argmax(-1)).sum()),
        "decisive": int(decisive(ours, theirs, roundoff).sum()),
        "undecided": float(near.mean()),
    }


def decisive(reference: NDArray[np.float32], found: NDArray[np.float32], roundoff: float) -> NDArray[np.bool_]:
    """[N]: the argmax changed, by more than an error of ``roundoff`` in each of both outputs explains."""
    ours, theirs = reference.argmax(-1)[..., None], found.argmax(-1)[..., None]
    taken = reference.astype(np.float64)
    margin = (np.take_along_axis(taken, ours, -1) - np.take_along_axis(taken, theirs, -1))[..., 0]
    broken = ~np.isfinite(found).all(-1)
    return broken | ((ours != theirs)[..., 0] & ~(margin <= 2 * roundoff))


def _margin(reference: NDArray[np.float32]) -> NDArray[np.float64]:
    if reference.shape[-1] < 2:
        return np.full(reference.shape[:-1], np.inf)
    ordered = np.sort(reference.astype(np.float64), -1)
    return ordered[..., -1] - ordered[..., -2]


def too_many(count: int, samples: int, allowed: float) -> bool:
    """Whether ``count`` of ``samples`` shows that the true share is above ``allowed``, beyond a doubt of 5 %."""
    return count > 0 and _at_least(count, samples, allowed) < DOUBT


def _at_least(count: int, samples: int, share: float) -> float:
    """P(X >= count) of X binomial(samples, share)."""
    below = 0.0
    for k in range(count):
        ways = math.lgamma(samples + 1) - math.lgamma(k + 1) - math.lgamma(samples - k + 1)
        below += math.exp(ways + k * math.log(share) + (samples - k) * math.log1p(-share))
    return max(0.0, 1.0 - below)


def within(optimized: dict[str, Any]) -> bool:
    """Whether the outputs by themselves show that the file is its reference."""
    steps = optimized["largest_error_steps"]
    return steps is not None and steps <= LARGEST_STEPS


def failures(
    optimized: dict[str, Any],
    unoptimized: dict[str, Any],
    steps: dict[str, Any] | None = None,
    *,
    fused: bool = True,
) -> list[str]:
    """What the rows of `compare` prove against a file, one sentence each. steps: of `stepwise`, where it was needed.
    fused: with optimizations on, onnxruntime convolved on integers; where it did not, floats round there as without.
    """
    proved = not fused or (isinstance(steps, dict) and steps.get("holds") is True)
    most = LARGEST_STEPS + (ROUNDOFFS * optimized["roundoff_steps"] if proved else 0.0)
    found = _too_far("an output is", optimized, most, ", which is more than rounding makes" if proved else "")
    found += _wrong_steps(steps)
    most = LARGEST_STEPS + ROUNDOFFS * unoptimized["roundoff_steps"]
    found += _too_far("without optimizations an output is", unoptimized, most, ", which is more than rounding makes")
    for words, row in (("", optimized), ("without optimizations ", unoptimized)):
        count, samples = row["decisive"], row["decisions"]
        if too_many(count, samples, FLIPPED):
            found.append(
                f"{words}argmax differs from the reference's on {count} of {samples} samples by more than rounding "
                f"explains ({row['roundoff_steps']:.3g} steps an output); {FLIPPED:.1%} is allowed."
            )
    return found


def _wrong_steps(steps: dict[str, Any] | None) -> list[str]:
    """The steps of a file that are not the reference's."""
    if steps is None or not steps.get("wrong"):
        return []
    first = steps["wrong"][0]
    return [f"{first['name']}: {first['codes']} codes are not what its own inputs give, beyond rounding."]


def saturation(layers: object, optimized: dict[str, Any]) -> list[str]:
    """What to say of layers that can saturate, where the outputs are not the reference's bit for bit."""
    names = [str(name)[:80] for name in layers[:8]] if isinstance(layers, list) else []
    if not names or optimized["bit_equal"] == 1.0:
        return []
    return [
        f"{', '.join(names)}: weights beyond 64 as int8 saturate in 16 bits on x86 processors without VNNI; export "
        "with profile packed, or train these layers with 7 bits (weight_bits, first_last_bits: 7)."
    ]


def _too_far(what: str, row: dict[str, Any], most: float, why: str) -> list[str]:
    steps = row["largest_error_steps"]
    if steps is not None and steps <= most:
        return []
    return [f"{what} {steps} steps from the reference; at most {most:.4g} is allowed{why}."]


def metric_failure(
    reference: NDArray[np.float32],
    found: NDArray[np.float32],
    truth: NDArray[Any],
    roundoff: float,
    task: Task | None = None,
) -> list[str]:
    """Whether a metric differs by more than is allowed on samples that rounding does not explain.

    Allowed are 0.1 points of a share. Of any other metric it is a thousandth of its value, or of what the reference's
    mean output would score, whichever is larger: an error that is nearly zero has no thousandth worth speaking of.
    """
    task = build(task)
    changed = torch.from_numpy(_unexplained(reference, found, roundoff, task.agreement))
    before, after = (parity.statistics(task, outputs, truth) for outputs in (reference, found))
    constant = np.broadcast_to(reference.mean(0, keepdims=True), reference.shape).copy()
    failed = []
    for name, metric in task.reported.items():
        if metric.higher is None:  # nobody said what is better: it is only reported
            continue
        mixed = torch.where(changed[:, None], after[name], before[name])
        value, difference = metric.finish(before[name]), metric.finish(mixed) - metric.finish(before[name])
        allowed = METRIC
        if not metric.share:
            guess = metric.finish(parity.statistics(task, constant, truth)[name])
            allowed = METRIC * max(abs(value), abs(guess) if math.isfinite(guess) else 0.0)
        if abs(difference) > allowed:
            failed.append(f"{name} differs by {difference:+.4g} from the reference's; {allowed:.4g} is allowed.")
    return failed


def _unexplained(
    reference: NDArray[np.float32], found: NDArray[np.float32], roundoff: float, agreement: str
) -> NDArray[np.bool_]:
    """[N]: the sample's decisions, or its numbers, changed by more than rounding explains."""
    decide = AGREEMENTS[agreement]
    if decide is not None:
        changed = decisive(decide(reference), decide(found), roundoff)
    else:
        changed = ~(np.abs(found.astype(np.float64) - reference.astype(np.float64)) <= 2 * roundoff)
    return np.asarray(changed.reshape(len(reference), -1).any(axis=1))
