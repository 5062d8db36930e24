"""A file, and its reference, beside the model that was trained.

That model computes in floats what the file computes in integers, so a value that lies on a rounding boundary may take
the other code, and a deep network, an untrained one above all, makes many output steps of one such code. Where they
part by more than a step, the trained model is therefore run once more with the reference's codes in place of its own
after every quantizer: each then starts from what the reference had, and may differ by one code on a rounding boundary
alone. Anything else is a difference of meaning: biases that the file rounds and the model does not, for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from flatcompress.graph.interface import call, mapped
from flatcompress.modules import evaluating
from flatcompress.onnx_export.lower.integer import Grid, scale32
from flatcompress.onnx_export.lower.lowering import QUANTIZED
from flatcompress.onnx_export.proof import parity
from flatcompress.onnx_export.proof.judging import LARGEST_STEPS
from flatcompress.onnx_export.proof.samples import Samples, flat
from flatcompress.onnx_export.proof.stepwise import SAMPLES, TIE


def outputs(model: nn.Module, batches: Sequence[Any], output: int) -> NDArray[np.float32]:
    """The trained model's own output, on the batches as its forward takes them."""
    with evaluating(model), torch.no_grad():
        results = [pytree.tree_leaves(call(model, mapped(batch, _plain)))[output] for batch in batches]
    return np.concatenate([result.cpu().numpy() for result in results])


def _plain(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return value.float() if value.is_floating_point() else value


def compared(
    model: nn.Module | None,
    reference: fx.GraphModule,
    batches: Sequence[Any],
    output: int,
    found: dict[str, Any],
    agreement: str,
) -> dict[str, Any] | None:
    """The certificate's part: ``file`` and ``reference`` in output steps of the trained model, and ``stepwise``.

    found: outputs of the trained model, the reference and the file, by these names. None without that model.
    """
    if model is None:
        return None
    step = parity.output_step(found["trained"])
    names = ("file", "reference")
    rows: dict[str, Any] = {n: parity.compare(found["trained"], found[n], step, agreement) for n in names}
    furthest = rows["reference"]["largest_error_steps"]
    if furthest is None or furthest > LARGEST_STEPS:
        apart = torch.from_numpy(np.abs(found["trained"] - found["reference"])).flatten(1).amax(1)
        rows["stepwise"] = _stepwise(model, reference, _furthest(batches[0], apart), output, step)
    return rows


def sentence(rows: dict[str, Any] | None) -> str:
    """What to say where rounding does not explain the distance from the trained model; empty otherwise."""
    found = (rows or {}).get("stepwise")
    if rows is None or found is None or found["holds"]:
        return ""
    far = f"the file is {rows['file']['largest_error_steps']:.3g} output steps from the trained model"
    if not found["wrong"]:
        return f"{far}, and {found['output_steps']:.3g} from the same codes on: what follows the last one differs."
    first = found["wrong"][0]
    many = f"{first['codes']} of {first['of']} codes"
    return (
        f"{far}: at {first['name']} {many} differ by more than a boundary of rounding explains "
        "(quant.set_bias_rounding gives a model the file's biases)."
    )


def _furthest(batch: Any, apart: Tensor) -> Any:
    """The samples of a batch that are furthest off, `SAMPLES` of them; all of a batch of several inputs."""
    return batch[apart[: len(batch)].topk(min(len(batch), SAMPLES)).indices] if isinstance(batch, Tensor) else batch


def _stepwise(
    model: nn.Module, reference: fx.GraphModule, batch: Any, output: int, step: float
) -> dict[str, Any] | None:
    """The trained model on the reference's codes; null where the model has no quantizers that a hook can reach."""
    where: dict[str, tuple[str, Grid]] = reference.meta.get(QUANTIZED, {})
    if not where:
        return None
    followed = _Following(where)
    with torch.no_grad():
        results = _Keeping(reference, followed).run(*Samples(reference, [batch]).batches[0])
        expected = flat(results)[output].double()
        with followed.on(model), evaluating(model):
            result = pytree.tree_leaves(call(model, mapped(batch, _plain)))[output].cpu().double()
    steps = float((result - expected).abs().max() / step)
    return {
        "samples": len(expected),
        "codes": followed.count,
        "moved": followed.moved,
        "wrong": followed.wrong,
        "output_steps": steps if np.isfinite(steps) else None,
        "holds": not followed.wrong and followed.count > 0 and steps <= LARGEST_STEPS,
    }


class _Following:
    """Gives quantizers of the trained model the reference's results, and counts where their own are others."""

    def __init__(self, where: dict[str, tuple[str, Grid]]) -> None:
        self.where, self.codes = where, dict[str, Tensor]()
        self.count, self.moved, self.wrong = 0, 0, list[dict[str, Any]]()

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Inside, every quantizer whose codes are known answers with them."""
        modules = dict(model.named_modules())
        hooks = [modules[t].register_forward_hook(self._hook(t)) for t in self.where if t in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, target: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        name, grid = self.where[target]

        def replace(module: nn.Module, args: tuple[Any, ...], own: Tensor) -> Tensor | None:
            if name not in self.codes:
                return None
            scale = scale32(grid.scale)
            theirs = ((self.codes[name] - grid.zero_point) * scale).reshape(own.shape).to(own)
            # a second argument is the end of the rectifier that the quantizer has taken in
            given = args[0] if len(args) == 1 else args[0].clamp(0.0, args[1])
            steps, value = ((own - theirs) / scale).round().abs(), (given / scale).double()
            allowed = (steps <= 1) & ((value - value.floor() - 0.5).abs() <= TIE)
            count = int(((steps > 0) & ~allowed).sum())
            self.count, self.moved = self.count + own.numel(), self.moved + int((steps > 0).sum())
            if count:
                self.wrong.append({"name": target, "codes": count, "of": own.numel()})
            return theirs

        return replace


class _Keeping(fx.Interpreter):
    """Runs a reference and keeps the codes that ``followed`` asks for."""

    def __init__(self, reference: fx.GraphModule, followed: _Following) -> None:
        super().__init__(reference)
        self.followed, self.names = followed, {name for name, _ in followed.where.values()}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names:
            self.followed.codes[n.name] = result
        return result
