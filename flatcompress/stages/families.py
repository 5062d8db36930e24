"""Training a family of nested widths, with or without quantizers: which width a step takes, how an epoch is judged."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from flatcompress import quant
from flatcompress.errors import UserError
from flatcompress.plan import Plan
from flatcompress.prune import elastic
from flatcompress.stages import members, shipped
from flatcompress.stages.callbacks import BiasRounding, FrozenBatchNorm
from flatcompress.stages.context import RunContext
from flatcompress.stages.job import make_job, train
from flatcompress.stages.keys import TrainingKeys
from flatcompress.tasks import Loss
from flatcompress.training.callback import Callback, Training

SAMPLING = ("one", "narrow", "sandwich", "all")


class Widths(Callback):
    """Chooses the widths of every step; all passes of a step take the same.

    ``sampling``: one, drawn evenly (arXiv 2310.07707, section 3.2); narrow, one, drawn with a probability of
    1 / width ** ``power``, since a wide network learns from the steps of the narrow ones inside it and not the other
    way round; sandwich, the full and the narrowest one and one between (arXiv 1903.05134, section 3.1); or all, each
    with the same share of the loss (arXiv 2310.07707, section 3.2). ``extra`` counts the passes beyond the one that the
    optimizer counts.
    """

    name = "widths"

    def __init__(self, family: elastic.Family, sampling: str, seed: int, loss: Loss, power: float = 1.0) -> None:
        self.family, self.sampling, self.seed, self.loss, self.power = family, sampling, seed, loss, power
        self.step = self.extra = 0
        self.others: list[int] = []
        self._input: Any = None
        self._handle: Any = None

    def open(self, job: Training) -> None:
        """Follow the model's inputs, and choose the first step's widths."""
        self._handle = self.family.register_forward_pre_hook(self._remember)
        self._choose()

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._input = inputs

    def _choose(self) -> None:
        last = len(self.family.widths) - 1
        drawn = random.Random(f"{self.seed}/{self.step}")
        if self.sampling == "one":
            chosen = [drawn.randint(0, last)]
        elif self.sampling == "narrow":
            chosen = drawn.choices(range(last + 1), [width**-self.power for width in self.family.widths])
        elif self.sampling == "sandwich" and last > 1:
            chosen = [last, 0, drawn.randint(1, last - 1)]
        else:
            chosen = [last, *range(last)]
        self.family.active, self.others = chosen[0], chosen[1:]

    def loss_term(self, output: Tensor, y: Tensor) -> Tensor | None:
        """What makes the loss of the first width the mean over all chosen ones."""
        if not self.others:
            return None
        inputs, first = self._input, self.loss(output, y)
        total = first
        for index in self.others:
            with self.family.at(index):
                total = total + self.loss(self.family(*inputs), y)
        self.extra += len(self.others)
        return total / (1 + len(self.others)) - first

    def after_step(self, step: int) -> None:
        """Choose the next step's widths."""
        self.step = step
        self._choose()

    def close(self) -> None:
        """Let the model go; it is the full network again."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._input = None
        self.family.active = len(self.family.narrower)

    def state_dict(self) -> dict[str, Any]:
        """The step, which the widths are drawn from, and the passes counted."""
        return {"step": self.step, "extra": self.extra}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.step, self.extra = int(state["step"]), int(state["extra"])
        self._choose()


def fit(
    run: RunContext, config: TrainingKeys, sampling: str, callbacks: Sequence[Callback], power: float = 1.0,
    **options: Any,
) -> None:  # fmt: skip
    """Train the family ``run.model``; an epoch is judged by its mean over the widths. ``options`` go to `make_job`.

    UserError: several processes, or mixed samples where a step takes several widths.
    """
    family = members.family_of(run)
    assert family is not None
    if run.accelerator.num_processes > 1:
        raise UserError("a family of widths is trained in one process: a step uses the weights of some widths alone.")
    if sampling not in ("one", "narrow") and run.mixing is not None:
        raise UserError(f"sampling {sampling!r} cannot take mixup or cutmix (data.augment); take sampling: one.")
    widths = Widths(family, sampling, run.seed, run.task.training_loss(config.label_smoothing), power)
    job = make_job(run, config, [widths, *callbacks], **options)
    train(run, replace(job, validate=partial(_mean, family, job.validate)))
    run.passes += widths.extra


def _mean(family: elastic.Family, score: Callable[[], float]) -> float:
    values = []
    for index in range(len(family.widths)):
        with family.at(index):
            values.append(score())
    return statistics.fmean(values)


def estimate_statistics(run: RunContext, trained: int | None = None) -> None:
    """BatchNorm's running statistics of every width, estimated on training data; trained: as `shipped` takes it."""
    family = members.family_of(run)
    assert family is not None
    with run.doing("BatchNorm statistics"):
        batches = shipped.statistics_batches(run, trained)
        for index in range(len(family.widths)):
            network = family.network(index)
            quant.reestimate_batchnorm(network, batches)
            mine = family.full if index == len(family.narrower) else family.narrower[index]
            found = network.state_dict()
            mine.load_state_dict({name: found[name] for name in mine.state_dict()})


def quantize(run: RunContext, config: Any, insert: Callable[[nn.Module], Plan], images: Sequence[Tensor]) -> None:
    """Quantize the family ``run.model`` and train it; every width has quantizers, and so scales, of its own.

    ``insert(network)``: quantizers into one network. ``images``: what activation scales start from.
    """
    _put_in(run, insert, images)
    family = members.family_of(run)
    assert family is not None
    networks = [*family.narrower, family.full]
    scales = [p for network in networks for p in quant.scale_parameters(network).values()]
    own = {id(p) for p in scales}
    first, trained = config.epochs - config.bias_rounding_epochs, config.epochs * len(run.data.train)
    callbacks: list[Callback] = [BiasRounding(network, first) for network in networks]
    if config.freeze_bn == "estimated" and run.resume is None:
        estimate_statistics(run, trained)
    if config.freeze_bn:
        callbacks.append(FrozenBatchNorm(family))
    fit(
        run, config, "one", callbacks, scales=scales, scale_lr=config.optimizer.lr * config.scale_lr,
        as_shipped=partial(shipped.as_shipped, run, bool(config.freeze_bn), trained),
        perturbed=lambda name, parameter: config.perturb_scales or id(parameter) not in own,
    )  # fmt: skip
    if not config.freeze_bn:
        estimate_statistics(run, trained)
    shipped.settle(run, config.tie_free, *networks)


def _put_in(run: RunContext, insert: Callable[[nn.Module], Plan], images: Sequence[Tensor]) -> None:
    """A family with quantizers in the place of ``run.model``, and in the plan."""
    family = members.family_of(run)
    assert family is not None
    before, data = members.split(run.plan)
    plans = [plan for _, plan in elastic.member_plans(data)]
    networks = [family.network(index) for index in range(len(family.widths))]
    for index, network in enumerate(networks):
        plans[index] = plans[index] + insert(network)
        quant.calibrate(network, images)
    *narrower, whole = networks
    run.model = elastic.Family(whole, narrower, family.cuts, family.widths[:-1], family.orders).to(run.device)
    run.plan = before + elastic.family_plan(family.orders, family.widths, plans, data["ignore"])


def quantize_problem(config: Any, earlier: Sequence[tuple[str, Any]]) -> str | None:
    """Why a quantize stage's ``config`` cannot be had after the ``earlier`` stages made a family, or None."""
    if not any(kind == "elastic" for kind, _ in earlier):
        return None
    row = config.row
    wrong = {
        "epochs": (config.epochs == 0, "0 is post-training quantization, which is made for one network"),
        "start": (config.start == "post_training", "post_training is made for one network"),
        "method": (
            row.conflict or row.alternate or row.bloop or row.cage or row.float_share or row.point != "latent",
            f"{config.method!r} follows the quantizers of one network: take lsq, lsq_sam, lsq_asam or lsq_sagm",
        ),
        "bits": (config.bits == "auto", "auto chooses for one network: name the layers"),
        "bloop": (bool(config.bloop), "follows the scales of one network"),
        "scale_steps": (config.scale_steps != "absolute", "follows the scales of one network"),
        "scale_warmup": (bool(config.scale_warmup), "follows the scales of one network"),
        "scale_stop": (config.scale_stop < 1, "follows the scales of one network"),
        "scale_turns": (bool(config.scale_turns), "follows the scales of one network"),
        "cage": (bool(config.cage), "follows the weights of one network"),
        "perturb_point": (config.perturb_point == "quantized", "follows the quantizers of one network"),
        "dampen": (config.dampen > 0, "follows the weights of one network"),
        "oscillation_threshold": (config.oscillation_threshold is not None, "follows the weights of one network"),
        "distill": (config.distill > 0, "has one teacher, and every width would need its own"),
        "averaging": (config.averaging != "none", "averages one network"),
    }
    return next((f"after 'elastic', {key}: {why}." for key, (is_so, why) in wrong.items() if is_so), None)


def exported(
    run: RunContext, widths: Sequence[float] | None, mix: Mapping[str, float] | None
) -> Iterator[tuple[str, RunContext]]:
    """(folder, run) of every network that is to be written; the folder is empty for the full one, which comes last.

    ``widths``: shares (None: those that were trained). ``mix``: a width per group, written as well.
    """
    family = members.family_of(run)
    if family is None:
        yield "", run
        return
    for width in family.widths[:-1] if widths is None else widths:
        if width in family.widths[:-1]:
            yield f"width-{width:g}", members.trained(run, family.widths.index(width))
        elif width != 1.0:
            yield f"width-{width:g}", _with_statistics(run, members.mixed(run, width))
    if mix is not None:
        yield "mix", _with_statistics(run, members.mixed(run, mix))
    yield "", members.full(run)


def _with_statistics(run: RunContext, part: RunContext) -> RunContext:
    quant.reestimate_batchnorm(part.model, shipped.statistics_batches(run))
    if quant.is_quantized(part.model):
        shipped.settle(part, True)
    return part
