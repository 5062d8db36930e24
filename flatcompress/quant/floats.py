"""What stays float, said when it is decided: which layers, and what share of the weights and of the work they are."""

from __future__ import annotations

import warnings
from typing import Any

from torch import fx, nn

from flatcompress.errors import UserError
from flatcompress.graph.cost import node_macs
from flatcompress.graph.remodularize import PRODUCTS
from flatcompress.graph.rewrite import traced_shape
from flatcompress.quant.operators import RECURRENT

ASKED = "named in ignore"
MAX_FLOAT_MACS = 0.5
_SHOWN = 5


def record(gm: fx.GraphModule, quantized: set[str], reasons: dict[str, str]) -> dict[str, Any]:
    """The convolutions, linear and recurrent layers of ``gm`` that stay float.

    ``layers``: a row each, ``name``, ``why``, ``weights`` and ``macs``. ``count`` of ``total`` layers stay float;
    ``weights`` and ``macs`` are their shares of all such layers'; ``unasked_macs`` is the share of convolutions and
    linear layers that nobody named in ``ignore``.
    """
    rows: dict[str, dict[str, Any]] = {}
    everything: dict[str, tuple[int, int]] = {}
    for node in gm.graph.nodes:
        name = _name(gm, node)
        if name is None:
            continue
        weights, macs = _weights(gm, node), (node_macs(gm, node) or ("", 0))[1]
        known = everything.get(name, (weights, 0))
        everything[name] = (weights, known[1] + macs)
        if name not in quantized:
            recurrent = node.target in RECURRENT
            why = reasons.get(name, "a recurrent layer is kept float" if recurrent else "it is no quantized layer")
            rows[name] = {"name": name, "why": why, "weights": weights, "macs": everything[name][1],
                          "recurrent": recurrent}  # fmt: skip
    all_weights, all_macs = (max(1, sum(v[i] for v in everything.values())) for i in (0, 1))
    unasked = [r for r in rows.values() if r["why"] != ASKED and not r["recurrent"]]
    return {
        "layers": list(rows.values()),
        "count": len(rows),
        "total": len(everything),
        "weights": sum(r["weights"] for r in rows.values()) / all_weights,
        "macs": sum(r["macs"] for r in rows.values()) / all_macs,
        "unasked_macs": sum(r["macs"] for r in unasked) / all_macs,
    }


def say(found: dict[str, Any], max_float_macs: float) -> None:
    """Warn of what stays float without having been named; UserError when that is more work than is allowed."""
    rows = [r for r in found["layers"] if r["why"] != ASKED]
    if not rows:
        return
    names = ", ".join(f"{r['name']!r} ({r['why']})" for r in rows[:_SHOWN])
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    text = (
        f"{found['count']} of {found['total']} layers stay float, {found['weights']:.1%} of the weights and "
        f"{found['macs']:.1%} of the multiply-accumulates: {names}{more}"
    )
    if found["unasked_macs"] > max_float_macs:
        raise UserError(
            f"{text}. That is more than max_float_macs = {max_float_macs:g} allows: name them in ignore, or raise it."
        )
    warnings.warn(f"{text}.", stacklevel=4)


def _name(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
        return str(node.target) if isinstance(module, kinds) else None
    path = str(node.meta.get("path", ""))
    if node.target in PRODUCTS:
        return f"{path}:{node.name}"
    return (path or node.name) if node.target in RECURRENT else None


def _weights(gm: fx.GraphModule, node: fx.Node) -> int:
    if node.op == "call_module":
        return gm.get_submodule(str(node.target)).get_parameter("weight").numel()
    sources = node.args[2] if node.target in RECURRENT else [node.args[1]]
    total = 0
    for source in sources:  # type: ignore[union-attr]
        shape = [s for s in traced_shape(source) if isinstance(s, int)]
        size = 1
        for length in shape:
            size *= length
        total += size
    return total
