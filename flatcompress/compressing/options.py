"""What the options of `compress` stand for: the stages of a recipe."""

from __future__ import annotations

import re
from typing import Any

from flatcompress.errors import UserError, unknown
from flatcompress.onnx_export import TARGETS

BITS = {"8": (8, 8), "w8a8": (8, 8), "6": (6, 8), "w6a8": (6, 8), "w4a8": (4, 8), "4": (4, 4), "w4a4": (4, 4)}
_UNITS = {"b": 1, "kb": 1_000, "mb": 1_000_000}
_START = {"quantizer": "lsq+", "calibration_samples": 128}
_MEAN_BITS = 4.0  # of bits auto without a budget


def stages(
    bits: str,
    keep: float | None = None,
    max_drop: float | None = None,
    epochs: int = 0,
    budget: str | None = None,
    target: str | None = None,
) -> list[dict[str, Any]]:
    """The stages that the options stand for. UserError for options that do not go together."""
    kind = bits.lower()
    if kind not in (*BITS, "auto"):
        raise unknown("bits", bits, [*BITS, "auto"])
    size, milliseconds = (None, None) if budget is None else _budget(budget)
    _check(keep, max_drop, epochs, milliseconds)
    if size is not None and kind != "auto":
        raise UserError("a budget of bytes goes with bits auto.")
    # without training signed activations gain from a zero point, which lsq+ has
    quantize: dict[str, Any] = {"epochs": epochs, **({"method": "lsq_sam"} if epochs else _START)}
    if kind == "auto":
        quantize |= {"bits": "auto", "weight_bits": 8, "activation_bits": 8}
        quantize |= {"bytes": size} if size is not None else {"effective_bits": _MEAN_BITS}
        quantize |= {} if epochs else steps_for(4)
    else:
        weight, activation = narrowed(BITS[kind], target)
        quantize |= {"weight_bits": weight, "activation_bits": activation, **({} if epochs else steps_for(weight))}
    if max_drop is not None:
        quantize["max_drop"] = max_drop
    quantize |= scheme_of(target)
    cut = {"latency_ms": milliseconds} if keep is None else {"ratio": round(1 - keep, 6)}
    # a trained network that is cut and trained on briefly: docs/results/real_domains.md
    prune = [] if keep is None and milliseconds is None else [{"prune": {"method": "taylor", **cut, "epochs": epochs}}]
    return [*prune, {"quantize": quantize}, {"export": {"profile": "packed"} if target is None else {"target": target}}]


def scheme_of(target: str | None) -> dict[str, Any]:
    """The keys of the quantize stage that ``target`` needs. UserError for a target that there is none of.

    >>> scheme_of("openvino"), scheme_of("tensorrt")
    ({'quantizer': 'lsq', 'first_last_bits': 7}, {'symmetric': True, 'quantizer': 'lsq'})
    """
    wanted = TARGETS[target]() if target is not None else None
    if wanted is not None and wanted.instead:
        raise UserError(f"target {target!r}: {wanted.instead}")
    if wanted is None:
        return {}
    keys = dict(wanted.quantize)
    if keys.get("symmetric") or not wanted.offsets:
        keys["quantizer"] = "lsq"
    if wanted.weight_bits < 8:
        keys["first_last_bits"] = wanted.weight_bits
    return keys


def narrowed(bits: tuple[int, int], target: str | None) -> tuple[int, int]:
    """The bits of weights and activations, the weights as wide at most as ``target`` runs them on integers."""
    return (bits[0] if target is None else min(bits[0], TARGETS[target]().weight_bits)), bits[1]


def _check(keep: float | None, max_drop: float | None, epochs: int, milliseconds: float | None) -> None:
    if keep is not None and not 0 < keep < 1:
        raise UserError(f"keep is a share of the channels between 0 and 1, found {keep:g}.")
    if keep is not None and not epochs:
        raise UserError("keep cuts channels, which needs training: give epochs too.")
    if milliseconds is not None and not epochs:
        raise UserError("a budget of milliseconds is met by cutting channels, which needs training: give epochs too.")
    if milliseconds is not None and keep is not None:
        raise UserError("keep and a budget of milliseconds both say how many channels stay: give one of them.")
    if max_drop is not None and epochs:
        raise UserError("max_drop gives layers their bits back after quantizing without training: leave epochs out.")


def steps_for(weight_bits: int) -> dict[str, str]:
    """The steps of post-training quantization that pay at this width (docs/results/post-training.md)."""
    return {"rounding": "gptq", "correction": "batchnorm"} if weight_bits <= 4 else {}


def _budget(text: str) -> tuple[float | None, float | None]:
    """(bytes of the weights, None) of 500kB, (None, milliseconds) of 3ms.

    >>> _budget("500kB"), _budget("3 ms")
    ((500000.0, None), (None, 3.0))
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(b|kb|mb|ms)", text.strip().lower())
    if found is None or not float(found[1]):
        raise UserError(f"budget {text!r}: a size in B, kB or MB, or a time in ms, for example 500kB or 3ms.")
    value = float(found[1])
    return (None, value) if found[2] == "ms" else (value * _UNITS[found[2]], None)
