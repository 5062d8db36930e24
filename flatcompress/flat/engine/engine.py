"""The engine: runs one step of any method exactly, whatever surrounds it.

It owns what stand-alone implementations leave to their user: the weights come back by copy, also after an
exception; buffers move in the first pass only; dropout noise repeats; loss scaling, clipping, accumulation and
distributed reduction happen once, on the combined gradient; the state is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatcompress import sharded
from flatcompress.errors import UserError
from flatcompress.flat.engine import vectors
from flatcompress.flat.engine.closures import ZEROED, Closure, as_closures
from flatcompress.flat.engine.context import Memory, Program, Step
from flatcompress.flat.engine.distributed import Replicas, update_scaler
from flatcompress.flat.engine.passes import Passes, Points, Run
from flatcompress.flat.engine.settings import Settings
from flatcompress.flat.engine.snapshot import Buffers
from flatcompress.flat.engine.vectors import Vector
from flatcompress.flat.methods.method import Method

FORMAT = 1


class FlatOptimizer(Optimizer):
    """A ``torch.optim.Optimizer`` around another one; made by `flatcompress.flat.factory`.

    After a step: ``passes`` (forward + backward passes so far), ``last_gap`` (loss at the perturbed point minus
    loss; None for a step without such a pair), ``last_radius`` (l2 norm of the last perturbation, None without),
    ``skipped`` (steps dropped because a pass overflowed under a scaler). The combined gradient stays in ``p.grad``
    until the next step begins.
    """

    def __init__(self, name: str, model: nn.Module, base: Optimizer, method: Method, settings: Settings) -> None:
        self.name, self.model, self.base, self.method, self.settings = name, model, base, method, settings
        self.memory = Memory()
        self.t = self.passes = self.skipped = 0
        self._pair: tuple[Tensor, Tensor] | None = None
        self._stepping = False
        self._points = Points()
        self._names: dict[int, str] = {}
        self._buffers = Buffers(model)
        self._replicas = Replicas(model, settings.process_group)
        if self._replicas.sharded:
            self.settings = together(settings)
        mine = {id(p) for group in base.param_groups for p in group["params"]}
        self._left_out = [p for p in _parameters(self._buffers.walk()) if id(p) not in mine]
        self._building = True
        super().__init__(base.param_groups, base.defaults)
        self._building = False

    # Schedulers, checkpoints and loggers read the base optimizer's own groups and state, never a copy: torch replaces
    # the list of groups when a state is loaded, and a reference taken earlier would be left behind.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's groups: schedulers set learning rates here."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if not self._building:
            self.base.param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state per parameter."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        if not self._building:
            self.base.state = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not self._building:
            self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._stepping:
            raise UserError(ZEROED)
        self.base.zero_grad(set_to_none=set_to_none)

    @property
    def last_gap(self) -> float | None:
        """Loss at the perturbed point minus the loss at the weights, last step; None for a method of one probe."""
        return None if self._pair is None else float(self._pair[1]) - float(self._pair[0])

    @property
    def last_radius(self) -> float | None:
        """Norm of the last perturbation, or None where none was taken."""
        sizes = self._points.sizes
        return float(vectors.total_norm(sizes)) if sizes else None

    def __getstate__(self) -> dict[str, Any]:
        """Everything, so that a deep copy (with its model) goes on by itself."""
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"FlatOptimizer({self.name!r}, base={type(self.base).__name__}, groups={len(self.param_groups)})"

    @torch.no_grad()
    def step(self, closure: Any = None, auxiliary: Any = None) -> Tensor:  # type: ignore[override]
        """One step. ``closure``: forward + backward, returns the loss, does not zero gradients; or a list of them.

        A list holds the micro-batches of one batch, each with its own mean loss; their gradients are averaged.
        ``auxiliary``: the closure of a second loss, for methods that combine two (``bloop``).
        Returns the loss of the first pass (mean over micro-batches), detached.
        """
        closures = as_closures(closure)
        second = () if auxiliary is None else as_closures(auxiliary)
        before = self.memory.copy()
        self.base.zero_grad()  # what is frozen since the last step must not move by its old gradient
        self._stepping = True
        try:
            step = self.context()
            with sharded.mixing() if self._replicas.sharded else nullcontext():
                run = self._taken(step, closures, second)
            if not run.finite:
                self.memory = before
                self.skipped += 1
        except BaseException:
            self.memory = before
            raise
        finally:
            self._stepping = False
        update_scaler(self.settings.scaler, run.finite, step.params[0].device)
        self.t += 1
        self.passes += run.backwards
        self._pair = run.pair
        return run.losses[0]

    def join_chunks(self) -> None:
        """From now on the closures of a step are parts of one batch: one perturbation from all of them."""
        self.settings = replace(self.settings, chunks="joint")

    def names(self) -> dict[int, str]:
        """The name of every parameter by its id."""
        return names_of(self.model, [p for group in self.param_groups for p in group["params"]])

    def context(self) -> Step:
        """The trainable parameters as they are now: freezing, unfreezing and new groups need no notice."""
        everything = [(p, g) for g in self.param_groups for p in g["params"]]
        mine = {id(p) for p, _ in everything}
        live = [(j, p, g) for j, (p, g) in enumerate(everything) if p.requires_grad]
        if not live:
            raise UserError("none of the optimizer's parameters requires a gradient; unfreeze some or leave out step()")
        if any(id(p) not in self._names for _, p, _ in live):
            self._names = self.names()
        names = [self._names[id(p)] for _, p, _ in live]
        chosen = self.settings.perturbed
        others = [p for p in _parameters(self._buffers.walk()) if p.requires_grad and id(p) not in mine]
        self._check_current(others)
        return Step(
            t=self.t,
            model=unwrapped(self.model),
            base=self.base,
            params=[p for _, p, _ in live],
            indices=[j for j, _, _ in live],
            names=names,
            group_of=[g for _, _, g in live],
            selected=[i for i, (_, p, _) in enumerate(live) if chosen is None or chosen(names[i], p)],
            memory=self.memory,
            seed=self.settings.seed,
            noise_source=self.settings.noise,
            radius=self.settings.radius,
            clip=self._clip,
            others=others,
        )

    def _check_current(self, others: Sequence[nn.Parameter]) -> None:
        """UserError where the model has gained trainable parameters that would silently not be trained."""
        known = {id(p) for p in self._left_out} if others else set()
        new = [p for p in others if id(p) not in known]
        if new:
            names = {id(p): name for name, p in unwrapped(self.model).named_parameters()}
            raise UserError(
                f"the model has {len(new)} trainable parameters that it did not have when this optimizer was made "
                f"(first: {names.get(id(new[0]), 'unnamed')}), and the optimizer does not hold them. Make it after "
                "prune(), quantize() and other changes of the model, or add_param_group them, or freeze them."
            )

    def _taken(self, step: Step, closures: Sequence[Closure], second: Sequence[Closure]) -> Run:
        """The passes, and the update unless one of them overflowed."""
        with self._buffers.kept_on_error():
            run = self._run(step, closures, second)
        if run.finite:
            self._apply(step, run)
        return run

    def _run(self, step: Step, closures: Sequence[Closure], second: Sequence[Closure]) -> Run:
        """All passes of the step: once over all closures together, or once for each, averaged."""
        self._points.begin()
        chosen = self.method.program if self.method.when(step) else self.method.otherwise
        self._replicas.share_buffers()
        if self.settings.chunks == "joint" or self.method.joint or len(closures) == 1:
            run = self._passes(step).run(chosen(step), closures, second)
        else:
            run = self._independent(step, chosen, closures, second)
        if self.settings.perturb == "per_replica" and self._replicas.size > 1:
            self._reduce(run)
        return run

    def _independent(
        self, step: Step, chosen: Callable[[Step], Program], closures: Sequence[Closure], second: Sequence[Closure]
    ) -> Run:
        """m-SAM: every micro-batch is perturbed along its own gradient, the combined gradients are averaged."""
        if second and len(second) not in (1, len(closures)):
            raise UserError(f"{len(closures)} closures need as many auxiliary ones, or one; found {len(second)}")
        total: Run | None = None
        for k, closure in enumerate(closures):
            extra = second[k : k + 1] if len(second) == len(closures) else second
            run = self._passes(step).run(chosen(step), [closure], extra)
            if not run.finite and self._replicas.size == 1:
                return run
            total = run if total is None else total.plus(run)
        assert total is not None
        return total.over(len(closures))

    def _passes(self, step: Step) -> Passes:
        return Passes(step, self._points, self._buffers, self._replicas, self.settings, keep=self.method.keeps)

    def _reduce(self, run: Run) -> None:
        """One reduction of the combined gradient, and of what COMPOSE, REMEMBER and UPDATE decide by where they are."""
        done = {id(g) for g in run.combined}
        run.absent, run.finite = self._replicas.mean_(run.combined, run.absent, run.finite)
        for vector in (*run.probes, *run.kept):
            rest = [g for g in vector if id(g) not in done]
            done.update(id(g) for g in rest)
            self._replicas.mean_(rest, [False] * len(rest))

    def _apply(self, step: Step, run: Run) -> None:
        """COMPOSE, filters, clipping, REMEMBER, UPDATE. The weights are unperturbed here."""
        combined = run.combined
        if self.settings.compose is not None:
            combined, run.absent = self._composed(step, run)
        for kept in self.settings.filters:
            combined = kept(step, combined)
        combined = self._clip(combined)
        for p, g, gone in zip(step.params, combined, run.absent):
            p.grad = None if gone else g
        if self.method.remember is not None:
            self.method.remember(step, run.kept, combined)
        with nullcontext() if self.settings.safety is None else self.settings.safety(step, combined):
            self.method.update(step, run.kept, combined, self._base_step)

    def _base_step(self) -> None:
        with torch.enable_grad():
            self.base.step()

    def _composed(self, step: Step, run: Run) -> tuple[Vector, list[bool]]:
        offered: list[Tensor | None] = [None if gone else g for g, gone in zip(run.combined, run.absent)]
        assert self.settings.compose is not None
        self.settings.compose(step.params, [list(probe) for probe in run.probes], offered)
        absent = [g is None for g in offered]
        return [torch.zeros_like(p) if g is None else g for g, p in zip(offered, step.params)], absent

    def _clip(self, vector: Vector) -> Vector:
        """Scale to ``max_grad_norm`` when longer, as ``torch.nn.utils.clip_grad_norm_`` does."""
        limit = self.settings.max_grad_norm
        if limit is None:
            return vector
        return vectors.scale(vector, torch.clamp(limit / (vectors.norm(vector) + 1e-6), max=1.0))

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's whole state in its own layout, and the method's under ``flat``."""
        if self._stepping:
            raise UserError("state_dict() was called inside a closure, between two passes; save between steps")
        slots = {key: dict(slot) for key, slot in self.memory.slots.items()}
        own = {"format": FORMAT, "method": self.name, "t": self.t, "passes": self.passes, "skipped": self.skipped}
        return {**self.base.state_dict(), "flat": {**own, "slots": slots, "values": dict(self.memory.values)}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`. One without ``flat`` (the base optimizer's own) starts the method afresh."""
        own = state_dict.get("flat")
        if own is not None and own["method"] != self.name:
            raise UserError(
                f"this state was saved by {own['method']!r} and cannot continue as {self.name!r}; "
                f"create {own['method']!r}, or load without its 'flat' entry to start the new method afresh"
            )
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "flat"})
        for p, values in self.base.state.items():
            self.base.state[p] = {key: sharded.divided(v, p) if torch.is_tensor(v) else v for key, v in values.items()}
        self.memory = Memory()
        self.t = self.passes = self.skipped = 0
        if own is None:
            return
        self.t, self.passes, self.skipped = int(own["t"]), int(own["passes"]), int(own["skipped"])
        params = [p for group in self.param_groups for p in group["params"]]
        self.memory.values = dict(own["values"])
        for key, slot in own["slots"].items():
            like = {int(j): params[int(j)] for j in slot}
            self.memory.slots[key] = {
                int(j): sharded.divided(t.to(like[int(j)].device, copy=True), like[int(j)]) for j, t in slot.items()
            }


def together(settings: Settings) -> Settings:
    """``settings`` for parameters that are divided: processes climb together. UserError with loss scaling."""
    if settings.scaler is not None and settings.scaler.is_enabled():
        raise UserError(
            "loss scaling (fp16) does not go with parameters divided over processes; train in bf16 or fp32."
        )
    return replace(settings, perturb="synced")


def _parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [p for module in modules for p in module._parameters.values() if p is not None]


def names_of(model: nn.Module, params: Sequence[nn.Parameter]) -> dict[int, str]:
    """Qualified names by id, as the model inside any wrapper says them; a parameter it lacks is ``param_<i>``."""
    found = {id(p): name for name, p in unwrapped(model).named_parameters()}
    return {id(p): found.get(id(p), f"param_{i}") for i, p in enumerate(params)}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model
