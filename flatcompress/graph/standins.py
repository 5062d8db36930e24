"""Stock layers that stand for others: same parameters, same name, the class that the graph says they are.

A BatchNorm with an activation inside, a convolution that pads like TensorFlow: their forwards do more than one
operator, but that one operator is a stock layer on their own parameters. A *stand-in* is that layer. It shares the
parameter, buffer and child stores of the module it stands for, so it is the same state; in a traced graph it lies
under the same name, and `adopt` gives the module itself the stand-in's class once its model runs the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONVS: dict[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d, "linear": nn.Linear,
    "conv_transpose1d": nn.ConvTranspose1d, "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}  # fmt: skip
_NORMS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d,
}  # fmt: skip


def layer_kind(operator: Any) -> type[nn.Module] | None:
    """The layer that computes an operator of the convolution or linear family, else None."""
    return _CONVS.get(str(operator).split(".")[1]) if str(operator).startswith("aten.") else None


def norm_kind(rank: int) -> type[nn.Module] | None:
    """The BatchNorm for an input of ``rank`` dimensions."""
    return _NORMS.get(rank)


def layer_attributes(operator: Any, args: list[Any], weight: Any, has_bias: bool) -> dict[str, Any]:
    """A layer's attributes from its operator's arguments (input, weight, bias, stride, padding, ...).

    ``weight``: anything with its shape. A string padding stays one.
    """
    name, shape = str(operator).split(".")[1], [int(s) for s in weight.shape]
    if name == "linear":
        return {"in_features": shape[1], "out_features": shape[0]}
    rank, rest = len(shape) - 2, list(args[3:])
    turned = name.startswith("conv_transpose")
    keys = ["stride", "padding", "output_padding", "groups", "dilation"] if turned else \
        ["stride", "padding", "dilation", "groups"]  # fmt: skip
    default = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    given = {**default, **dict(zip(keys, rest))}
    made: dict[str, Any] = {k: v if isinstance(v, str) else _tuple(v, rank) for k, v in given.items() if k != "groups"}
    groups = int(given["groups"])
    ins, outs = (shape[0], shape[1] * groups) if turned else (shape[1] * groups, shape[0])
    same = made["padding"] if isinstance(made["padding"], str) else None
    pads = [0] * (2 * rank)
    if same is None:
        pads = [p for p in reversed(made["padding"]) for _ in (0, 1)]
    elif same == "same":
        for index, (d, k) in enumerate(zip(made["dilation"], shape[2:])):
            total = d * (k - 1)
            pads[2 * (rank - 1 - index)], pads[2 * (rank - 1 - index) + 1] = total // 2, total - total // 2
    return {
        **made, "groups": groups, "in_channels": ins, "out_channels": outs, "kernel_size": tuple(shape[2:]),
        "transposed": turned, "padding_mode": "zeros", "_reversed_padding_repeated_twice": pads,
    }  # fmt: skip


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value),)
    return values * rank if len(values) == 1 else values


def stand_in(module: nn.Module, kind: type[nn.Module], attributes: dict[str, Any]) -> nn.Module:
    """A ``kind`` on ``module``'s own state, with ``attributes`` where they differ from the module's."""
    made = kind.__new__(kind)
    made.__dict__.update(module.__dict__)
    made.__dict__.update(attributes)
    made.__dict__.pop("forward", None)
    return made


def adopt(module: nn.Module, standin: nn.Module) -> None:
    """Give ``module`` the class and the attributes of the stand-in that shares its state."""
    module.__dict__.pop("forward", None)
    module.__class__ = type(standin)
    shared = ("_parameters", "_buffers", "_modules", "training")
    module.__dict__.update({k: v for k, v in standin.__dict__.items() if k not in shared})


def shares_state(module: nn.Module, other: nn.Module) -> bool:
    """Whether one of the two stands for the other."""
    return module is not other and module.__dict__["_parameters"] is other.__dict__["_parameters"]


def synchronised(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind`` of BatchNorm with the forward of SyncBatchNorm, so that it keeps averaging over processes."""
    sync = nn.SyncBatchNorm
    names = ("forward", "_check_input_dim", "_check_non_zero_input_channels")
    return type(f"Sync{kind.__name__}", (kind,), {n: vars(sync)[n] for n in names if n in vars(sync)})


class BorrowedBatchNorm(nn.BatchNorm2d):
    """Batch normalization on tensors that some other module owns (``F.batch_norm`` written out in a forward).

    ``names``: the owner and attribute of weight, bias, running_mean and running_var; None for one that is not there.
    """

    def __init__(self, parts: dict[str, tuple[nn.Module, str] | None], features: int, momentum: float, eps: float):
        nn.Module.__init__(self)
        self.num_features, self.momentum, self.eps = features, momentum, eps
        self.affine = parts["weight"] is not None
        self.track_running_stats = parts["running_mean"] is not None
        self._parts = (parts,)  # in a tuple: they are the owner's children, not this module's

    def _part(self, name: str) -> Any:
        found = self._parts[0][name]
        return None if found is None else getattr(*found)

    weight = property(lambda self: self._part("weight"))  # type: ignore[assignment]
    bias = property(lambda self: self._part("bias"))  # type: ignore[assignment]
    running_mean = property(lambda self: self._part("running_mean"))  # type: ignore[assignment]
    running_var = property(lambda self: self._part("running_var"))  # type: ignore[assignment]
    num_batches_tracked = property(lambda self: None)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, ...] by its batch in training mode (or without statistics), else by the running statistics."""
        batch = self.training or self.running_mean is None
        momentum = 0.0 if self.momentum is None else self.momentum
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, batch, momentum, self.eps)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        nn.Module._load_from_state_dict(self, *args, **kwargs)  # a BatchNorm would look for its counter

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class TrainingNoise(nn.Identity):
    """What only training does to a tensor: stochastic depth, added noise. The identity in eval mode.

    ``noise``: a module of (x, *others); in training the output is its result.
    """

    def __init__(self, noise: nn.Module) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor, *others: Any) -> Tensor:  # type: ignore[override]
        """x, or noise(x, *others) in training."""
        return self.noise(x, *others) if self.training else x

    def extra_repr(self) -> str:
        return "training only"


class Operator(nn.Module):
    """One aten operator with fixed further arguments, as a module."""

    def __init__(self, target: Any, *args: Any) -> None:
        super().__init__()
        self.target, self.args = target, args

    def forward(self, x: Tensor) -> Tensor:
        """target(x, *args)."""
        return self.target(x, *self.args)

    def __deepcopy__(self, memo: Any) -> Operator:
        return Operator(self.target, *self.args)


def is_parameter(tensor: Any) -> bool:
    """Whether a tensor is trained."""
    return isinstance(tensor, nn.Parameter) or (isinstance(tensor, torch.Tensor) and tensor.requires_grad)
