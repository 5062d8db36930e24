"""Numbers that stop being finite: seen in the pass where it happens, and traced to a layer.

The check costs one norm per gradient and one look at the result; only when that fails is the layer searched for, with
the weights still where the pass had them (a perturbed point, often).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import RunError
from flatcompress.sharded import any_process, is_divided, local, whole
from flatcompress.training.compiling import eager

ADVICE = "Lower optimizer.lr or rho, raise the bits, or set on_divergence: skip or rollback."


class Diverged(RunError):
    """A pass met a number that is not finite. ``finding`` says what, where and at how many bits, as plain data."""

    def __init__(self, finding: dict[str, Any]) -> None:
        super().__init__(describe(finding))
        self.finding = finding


def describe(finding: dict[str, Any]) -> str:
    """The finding as a sentence without its end.

    >>> describe({"step": 7, "loss": "nan", "what": "activation", "layer": "conv1", "bits": 2})
    "step 7: the loss became nan; the first value that is not finite is the activation of 'conv1' (2 bit)"
    """
    loss = f"the loss became {finding['loss']}" if finding["loss"] in ("nan", "inf", "-inf") else "the loss is finite"
    bits = f" ({finding['bits']} bit)" if finding.get("bits") is not None else ""
    layer = f" of {finding['layer']!r}{bits}" if finding.get("layer") else ""
    return f"step {finding['step']}: {loss}; the first value that is not finite is the {finding['what']}{layer}"


def gradients_of(groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The gradients that are there."""
    return [p.grad for group in groups for p in group["params"] if p.grad is not None]


def finite(loss: Tensor, gradients: list[Tensor]) -> bool:
    """Are the loss and every gradient finite? All processes get the same answer."""
    parts = [loss.detach().float().reshape(())]
    own = [local(gradient) for gradient in gradients]
    for n in torch._foreach_norm(own) if own else ():
        like = n.dtype == torch.float32 and n.device == loss.device  # asked, since conversions take longer than norms
        parts.append(n if like else n.float().to(loss.device))
    total = torch.stack(parts).sum()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return not any_process(~torch.isfinite(total))
    return math.isfinite(float(total))


def parameters_finite(model: nn.Module) -> bool:
    """Is every floating-point parameter finite? All processes get the same answer, also where they hold parts."""
    good = not any(True for _ in _bad_tensors((name, local(p)) for name, p in model.named_parameters()))
    return not any_process(not good) if is_divided(model) else good


def find(model: nn.Module, x: Tensor, loss: float, step: int) -> dict[str, Any]:
    """Where the first value that is not finite arises, for batch ``x`` at the weights as they are.

    Looked for in this order: parameters (a quantizer's scale is named as such), the input, the layers' outputs in the
    order of a forward, the loss, gradients from the loss backwards. Of a network whose weights are divided over the
    processes the parameters alone are looked at.
    """
    finding: dict[str, Any] = {"step": step, "loss": str(loss), "what": "loss", "layer": None, "bits": None}
    named = ((name, whole(p.detach())) for name, p in model.named_parameters())
    bad = next(_bad_tensors(named), None)
    if bad is not None:
        return finding | {"what": _kind(bad), "layer": bad, "bits": bits_of(model, bad)}
    if is_divided(model):  # what follows is each process's own, and a forward needs them all
        return finding
    if not bool(torch.isfinite(x).all()):
        return finding | {"what": "input batch"}
    name = _first_bad_output(model, x)
    if name is not None:
        return finding | {"what": "activation", "layer": name, "bits": bits_of(model, name)}
    if not math.isfinite(loss):  # of finite logits: it comes from the loss function itself
        return finding
    gradients = [
        n for n, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())
    ]
    if gradients:
        last = gradients[-1]  # a backward pass goes from the last layer to the first
        return finding | {"what": "gradient", "layer": last, "bits": bits_of(model, last)}
    return finding


def bits_of(model: nn.Module, name: str) -> int | None:
    """Bits of the quantized layer or quantizer that ``name`` is or belongs to; None for a float one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module: Any = model
        for part in parts[:end]:
            module = getattr(module, part, None)
        for path in (("bits",), ("tensor_quant", "bits"), ("weight_quant", "tensor_quant", "bits")):
            found = module
            for attribute in path:
                found = getattr(found, attribute, None)
            if isinstance(found, int):
                return found
    return None


def _kind(name: str) -> str:
    return "scale" if name.rpartition(".")[2] == "scale" else "parameter"


def _bad_tensors(named: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    return (n for n, t in named if t.is_floating_point() and not bool(torch.isfinite(t.detach()).all()))


def _first_bad_output(model: nn.Module, x: Tensor) -> str | None:
    found: list[str] = []
    handles = []

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return module.register_forward_hook(hook)

    for name, module in model.named_modules():
        if name:
            handles.append(watch(name, module))
    try:
        with torch.no_grad(), torch.random.fork_rng(), eager(model):
            model(x)
    except RunError:  # a quantizer that refuses its own scale names itself
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
