"""Learned step size quantization, LSQ (arXiv 1902.08153), as one module; its autograd functions are in `function`.

    Q(v; s) = s * clip(round(v / s), -Qn, Qp)                                                       (eq. 1, 2)
    dQ/ds   = round(v/s) - v/s inside the range, -Qn below it, Qp above it                           (eq. 3)
    dQ/dv   = 1 inside the range, else 0                                                             (eq. 5)
    the gradient of s is multiplied by 1 / sqrt(N * Qp); s starts at 2 * mean|v| / sqrt(Qp)          (sections 2.1, 2.2)

Signed grids have Qn = 2^(b-1), Qp = 2^(b-1) - 1, unsigned ones Qn = 0, Qp = 2^b - 1; zero is always exact. N is the
number of elements that share one scale: weights per channel, or features per sample for an activation.

The integers an exporter writes are `StepQuantizer.integers`: the very division and rounding the forward does.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from flatcompress.errors import RunError, UserError
from flatcompress.graph import ActivationSpec
from flatcompress.quant.quantizers.function import Quantize, QuantizeTraced, QuantizeWhole, flat, rectified

MIN_BITS, MAX_BITS = 2, 8
FLOOR = 1e-6  # a scale never acts below this share of where it started (positive-scale guard)
_SAMPLE, _PART = 2048, 1 << 18
_GUARD_INTERVAL = 100  # on an accelerator the guard's answer costs a synchronisation, so it is asked for rarely


def grid(bits: int, signed: bool) -> tuple[int, int]:
    """(Qn, Qp), the numbers of negative and positive levels. UserError for bits outside 2..8.

    >>> grid(3, signed=True), grid(3, signed=False)
    ((4, 3), (0, 7))
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise UserError(f"bits must be an integer in {MIN_BITS}..{MAX_BITS}; found {bits!r}.")
    return (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def initial_scale(mean_abs: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    """LSQ's start 2 * mean|v| / sqrt(Qp).

    At 8 bits this step is wide (0.14 sigma of Gaussian weights, where 0.03 sigma would reach the largest of them). It
    is kept on purpose: a start at max|v| / Qp is so small a number that ordinary learning rates push it below zero.

    >>> initial_scale(torch.tensor(0.9875), bits=3, signed=True)
    tensor(1.1403)
    """
    return 2.0 * mean_abs / math.sqrt(grid(bits, signed)[1])


class StepQuantizer(nn.Module):
    """A tensor quantizer with a learned scale: what Brevitas calls a ``tensor_quant``, with LSQ inside.

    ``shape``: the scale's shape, broadcastable to what is quantized; () for one scale per tensor. ``per_sample``:
    an activation (dimension 0 is the batch, which does not count in N). State: the parameter ``scale`` and the
    buffer ``initial`` (the scale's start; 0 while there is none), so a state dict is complete.
    """

    initial: torch.Tensor
    _zero_point: torch.Tensor
    _bit_width: torch.Tensor

    def __init__(self, bits: int, signed: bool, shape: tuple[int, ...] = (), per_sample: bool = False) -> None:
        super().__init__()
        self.bits, self.signed, self.per_sample = bits, signed, per_sample
        self.qn, self.qp = grid(bits, signed)
        self.name = "?"  # set by whoever places the quantizer, for messages
        self.scale = nn.Parameter(torch.ones(shape))
        self.register_buffer("initial", torch.zeros(shape))
        self.register_buffer("_zero_point", torch.zeros(()), persistent=False)
        self.register_buffer("_bit_width", torch.tensor(float(bits)), persistent=False)
        self._ready, self._calls, self._warned = False, 0, False
        self.observer: Observer | None = None

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the scale has been set from data or loaded."""
        if not self._ready:
            self._ready = bool((self.initial > 0).all())
        return self._ready

    def start_from(self, mean_abs: torch.Tensor) -> None:
        """Set the scale by `initial_scale` of mean|v| (one value per scale)."""
        self.set_scale(initial_scale(mean_abs, self.bits, self.signed))

    def start_from_observer(self, observer: Observer) -> None:
        """Set the scale from what an `Observer` collected."""
        self.start_from(torch.tensor(observer.mean_abs))

    @torch.no_grad()
    def set_scale(self, start: torch.Tensor) -> None:
        """Set the scale and remember it as the start. A dead tensor (all zero) gets 1 / Qp and a named warning."""
        start = start.to(self.scale).reshape(self.scale.shape)
        if not bool(torch.isfinite(start).all()):
            raise UserError(f"quantizer {self.name!r}: the data it is set from contains NaN or infinity.")
        dead = start <= 0
        if bool(dead.any()):
            if self.scale.dim() == 0 or bool(dead.all()):
                warnings.warn(f"quantizer {self.name!r}: everything it saw is zero (a dead tensor).", stacklevel=3)
            start = torch.where(dead, torch.full_like(start, 1.0 / self.qp), start)
        self.scale.copy_(start)
        self.initial.copy_(start)
        self._ready = True

    @torch.no_grad()
    def move_scale(self, factor: torch.Tensor) -> None:
        """Multiply the scale by ``factor``, positive: one number, or one for each scale. Its start moves with it."""
        for tensor in (self.scale, self.initial):
            shape = tensor.shape if factor.numel() > 1 else ()
            tensor.copy_(tensor.double() * factor.to(tensor.device).double().reshape(shape))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ready = False
        super()._load_from_state_dict(*args, **kwargs)

    # -- the quantizer -------------------------------------------------------------------------------------------

    def step(self) -> torch.Tensor:
        """The scale that acts: the learned one, kept positive. RunError when it is not finite; names the quantizer."""
        scale = self.scale.detach()
        if torch.compiler.is_compiling():  # no look at numbers: it would break the graph at every quantizer
            return torch.maximum(scale, self._floor())
        if scale.is_cuda:
            self._calls += 1
            if self._calls % _GUARD_INTERVAL:
                return torch.maximum(scale, self._floor())
        if scale.numel() == 1 and scale.device.type == "cpu":  # two reads are a fifth of four operators' time
            if scale.item() > self.initial.item() * FLOOR:
                return scale
        elif bool((scale > self.initial * FLOOR).all()):
            return scale
        if not bool(torch.isfinite(scale).all()):
            raise RunError(f"quantizer {self.name!r}: its scale is not finite any more. Lower the learning rate.")
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"quantizer {self.name!r}: its scale fell to {float(scale.min()):.3g} and is held at {FLOOR:g} of its "
                "start. Lower the learning rate of the scales.",
                stacklevel=3,
            )
        return torch.maximum(scale, self._floor())

    def _floor(self) -> torch.Tensor:
        """The least scale that acts; also of a start so small that its millionth is no number any more."""
        return (self.initial * FLOOR).clamp_min(torch.finfo(self.initial.dtype).tiny)

    def gradient_scale(self, v: torch.Tensor) -> float:
        """1 / sqrt(N * Qp), N = elements per scale."""
        n = v.numel() // max(v.shape[0], 1) if self.per_sample else v.numel() // self.scale.numel()
        return 1.0 / math.sqrt(max(n, 1) * self.qp)

    def quantize(self, v: torch.Tensor, most: float | None = None) -> torch.Tensor:
        """Q(v), same shape; with ``most`` Q(min(max(v, 0), most)), which may be infinite.

        The first tensor an activation quantizer ever sees sets its scale.
        """
        if self.observer is not None:
            return self.observer.see(rectified(v, most))
        if v.dtype in (torch.float16, torch.bfloat16):  # 8-bit integers times a scale do not fit in half precision
            v = v.float()
        if not self._ready and not self.ready:
            self.start_from(rectified(v.detach(), most).abs().mean())
        return self._apply_grid(v, most)

    def _apply_grid(self, v: torch.Tensor, most: float | None = None) -> torch.Tensor:
        traced = torch.compiler.is_compiling()
        whole = self.scale.numel() == 1 and not v.is_cuda and not traced  # it reads a rectifier's end on the grid
        v = v if whole else rectified(v, most)
        given = v, self.scale, self.step(), self.qn, self.qp, self.gradient_scale(v)
        if traced:
            return QuantizeTraced.apply(*given)
        return QuantizeWhole.apply(*given, most) if whole else Quantize.apply(*given)

    def forward(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Brevitas's interface: value, scale, zero point, bit width."""
        return self.quantize(v), self.scale, self._zero_point, self._bit_width

    @torch.no_grad()
    def integers(self, v: torch.Tensor) -> torch.Tensor:
        """The integers of Q(v), float dtype: computed as the forward computes them."""
        return (v / self.step()).round_().clamp_(-self.qn, self.qp)

    def activation_spec(self) -> ActivationSpec:
        """The grid as plain numbers. UserError while no data has set the scale."""
        self._require_ready()
        return ActivationSpec(float(self.step()), self.bits, self.signed)

    def _require_ready(self) -> None:
        if not self.ready:
            raise UserError(f"quantizer {self.name!r} has seen no data: call calibrate(model, batches) first.")

    def extra_repr(self) -> str:
        return f"{self.bits} bit, {'signed' if self.signed else 'unsigned'}, scales={self.scale.numel()}"


def _sum_of_magnitudes(v: torch.Tensor) -> float:
    """sum|v| in double precision, in parts that fit a cache: a fifth of the time of a sum that converts as it goes."""
    values = flat(v)
    values = v.reshape(-1) if values is None else values
    if values.dtype != torch.float32:
        return float(values.abs().sum(dtype=torch.float64))
    scratch = values.new_empty(min(_PART, len(values)), dtype=torch.float64)
    sums = [scratch[: len(part)].copy_(part).abs_().sum() for part in values.split(_PART)]
    return float(torch.stack(sums).sum()) if sums else 0.0


def _every(v: torch.Tensor, step: int, most: int) -> torch.Tensor:
    """``v.flatten()[::step][:most]``, a new tensor; of one that lies otherwise nothing else is copied."""
    if v.is_contiguous() or v.dim() == 0:
        return v.flatten()[::step][:most].clone()
    chosen = torch.arange(0, v.numel(), step, device=v.device)[:most]
    return v[torch.unravel_index(chosen, v.shape)]


class Observer:
    """Collects what an activation quantizer needs to set its scale, letting the tensor pass unquantized."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.total, self.count = 0.0, 0
        self.low, self.high = math.inf, -math.inf
        self._samples: list[torch.Tensor] = []

    @torch.no_grad()
    def see(self, v: torch.Tensor) -> torch.Tensor:
        low, high, total = float(v.amin()), float(v.amax()), _sum_of_magnitudes(v)
        if not math.isfinite(total):
            raise UserError(f"calibration data gives NaN or infinity at quantizer {self.name!r}.")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.total, self.count = self.total + total, self.count + v.numel()
        self._samples.append(_every(v, max(1, v.numel() // _SAMPLE), _SAMPLE))
        return v

    def sample(self) -> torch.Tensor:
        """An even pick of the values seen, up to 2048 of each batch."""
        return torch.cat(self._samples)

    @property
    def mean_abs(self) -> float:
        """Mean of |v| over everything seen."""
        return self.total / max(self.count, 1)
