"""Keys of the loop: accumulated batches, a number of steps, any optimizer and schedule; all resume in the same bits."""

from __future__ import annotations

import pytest
import torch
from stage_pieces import StopAt, config, context
from torch import nn
from torch.optim import lr_scheduler

from flatcompress import Pipeline
from flatcompress.errors import Interrupted, UserError
from flatcompress.recipe import identity, parse_recipe
from flatcompress.stages import run_stage
from flatcompress.stages.dry_run import dry_run
from flatcompress.training import optimizers
from flatcompress.training.schedules import rates


class Rootprop(torch.optim.SGD):
    """An optimizer of the user's own."""


def nothing(params, **keys):
    """A function that makes no optimizer."""


def plain():
    """A network without BatchNorm: what a pass does to one sample does not depend on the others."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4))


def trained(build=plain, batch_size=16, resume=None, progress=None, **keys):
    work = context(build, batch_size=batch_size, progress=progress, resume=resume)
    events = []
    work.emit = lambda event, **fields: events.append({"event": event, **fields})
    run_stage("train", work, config("train", **{"method": "none", "select": "last", **keys}))
    return work.model.state_dict(), [e for e in events if e["event"] == "epoch"]


@pytest.mark.parametrize("method", ["none", "sam", "asam"])
def test_accumulating_k_batches_is_a_batch_k_times_the_size(method):
    keys = {"method": method, "optimizer": {"name": "sgd", "lr": 0.05}}
    whole, _ = trained(batch_size=32, **keys)
    parts, events = trained(batch_size=8, accumulate=4, **keys)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(value, plain().state_dict()[name]) for name, value in whole.items())
    assert events[-1]["passes"] > 0


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=40, cycle_momentum=False)


LOOPS = {
    "accumulate": ({"method": "sam", "accumulate": 2}, 3),
    "max_steps": ({"max_steps": 6, "epochs": 4}, 4),
    "max_steps at their end": ({"max_steps": 6, "epochs": 4}, 5),
    "rmsprop": ({"optimizer": {"name": "rmsprop", "momentum": 0.5, "lr": 1e-3}}, 5),
    "nadam": ({"optimizer": {"name": "NAdam", "momentum_decay": 0.01, "lr": 1e-3}}, 5),
    "own class": ({"optimizer": {"name": "test_loop_keys:Rootprop", "momentum": 0.9, "lr": 1e-2}}, 5),
    "function": ({"schedule": lambda step, total: 1 - step / total}, 5),
    "scheduler": ({"schedule": one_cycle}, 5),
    "clip": ({"max_grad_norm": 0.1}, 5),
    "ema": ({"averaging": "ema", "max_steps": 7}, 5),
}


@pytest.mark.parametrize("case", LOOPS)
def test_a_resumed_run_ends_in_the_same_bits(case):
    keys, step = LOOPS[case]
    whole, _ = trained(**keys)
    progress = StopAt(step)
    with pytest.raises(Interrupted):
        trained(progress=progress, **keys)
    resumed, _ = trained(resume=progress.state, **keys)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize(("kind", "keys"), [("train", {}), ("quantize", {"method": "lsq", "quant_start": 0.5})])
def test_max_steps_end_the_stage_and_its_schedule(kind, keys):
    work = context()
    events, steps = [], []
    work.emit = lambda event, **fields: events.append({"event": event, **fields})

    class Count:
        name = ""

        def __getattr__(self, name):
            return (lambda *args: steps.append(args[0])) if name == "after_step" else (lambda *args: None)

    work.callbacks = [Count()]
    run_stage(kind, work, config(kind, epochs=9, max_steps=6, schedule="linear", **keys))  # four steps an epoch
    assert steps == [1, 2, 3, 4, 5, 6]
    epochs = [e for e in events if e["event"] == "epoch"]
    assert [e["epochs"] for e in epochs] == [2, 2]
    assert epochs[-1]["lr"] == pytest.approx(1e-3 / 6)  # the last of six linear steps


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, 3, 0.5),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
        ),
        lambda o: lr_scheduler.LambdaLR(o, [lambda t: 1 / (t + 1), lambda t: 0.5**t]),
    ],
)  # fmt: skip
def test_a_torch_scheduler_gives_the_rates_that_it_gives_in_a_loop_of_torch(make):
    base = [0.1, 0.02]
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in base], lr=1.0)
    scheduler, ours = make(optimizer), rates(make, base, 20)
    for step in range(12):
        assert ours(step) == [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step()
    assert rates(make, base, 20)(11) == ours(11)  # from the middle, as a resumed run asks


def test_what_is_not_at_its_default_is_another_recipe_and_reads_back_the_same():
    def recipe(**optimizer):
        return parse_recipe({"stages": [{"train": {"optimizer": optimizer}}]})

    given = [{"name": "rmsprop"}, {"name": "rmsprop", "momentum": 0.9}, {"name": "rmsprop", "alpha": 0.9}, {}]
    found = [recipe(**one) for one in given]
    assert len({identity.digest(one) for one in found}) == 4
    assert all(identity.digest(parse_recipe(one.to_dict())) == identity.digest(one) for one in found)
    assert found[0].stages[0].config.optimizer.keys == {}  # its own defaults, not those of sgd
    assert identity.digest(recipe(name="RMSprop", alpha="9e-1")) == identity.digest(found[2])


@pytest.mark.filterwarnings("ignore")
def test_a_schedule_of_python_stands_in_the_recipe_by_name_and_resumes_there_alone(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(60, 4)
    data = {"train": (x[:40], (x[:40, 0] > 0).long()), "test": (x[40:], (x[40:, 0] > 0).long())}
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    stages = [{"train": {"method": "none", "epochs": 1, "schedule": one_cycle}}]
    options = {"device": "cpu", "threads": 1, "batch_size": 8}
    Pipeline(net, data, stages, **options).run(tmp_path)
    assert Pipeline(net, data, stages, **options).run(tmp_path).ledger
    written = parse_recipe({**Pipeline(net, data, stages, **options).recipe.to_dict()})
    assert written.stages[0].config.schedule == "python:one_cycle"
    with pytest.raises(UserError, match="stands for an object given in Python"):
        Pipeline(net, data, [entry.to_dict() for entry in written.stages], **options).prepare()


WRONG_KEYS = [
    ({"optimizer": {"name": "lbfgs"}}, "LBFGS evaluates the loss itself"),
    ({"optimizer": {"name": "rmsporp"}}, "Did you mean 'rmsprop'"),
    ({"optimizer": {"name": "nadam", "momentum_decy": 0.1}}, "Did you mean 'momentum_decay'"),
    ({"optimizer": {"name": "rprop"}}, "has none: write weight_decay: 0"),
    ({"optimizer": {"name": "no_such.module:Thing"}}, "cannot be imported"),
    ({"optimizer": {"name": "torch.optim:Nothing"}}, "cannot be imported"),
    ({"optimizer": {"name": "math:pi"}}, "is no torch.optim.Optimizer"),
    ({"schedule": "cosin"}, "Did you mean 'cosine'"),
    ({"schedule": 3}, "unknown schedule"),
    ({"max_steps": 0}, "max_steps"),
    ({"accumulate": 0}, "accumulate"),
]


@pytest.mark.parametrize(("keys", "reason"), WRONG_KEYS, ids=str)
def test_a_key_that_makes_no_sense_is_refused_in_one_sentence(keys, reason):
    with pytest.raises(UserError, match=reason):
        parse_recipe({"stages": [{"train": keys}]})


@pytest.mark.parametrize("stage", [{"prune": {}}, {"sparsify": {}}, {"quantize": {"epochs": 0}}], ids=str)
def test_stages_that_count_in_epochs_refuse_a_number_of_steps(stage):
    (kind, keys), *_ = stage.items()
    with pytest.raises(UserError, match=r"max_steps: (what is removed|epochs: 0)"):
        parse_recipe({"model": {"name": "resnet8", "weights": "w"}, "stages": [{kind: {**keys, "max_steps": 9}}]})


MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
WRONG_LOOPS = [
    pytest.param({"optimizer": {"name": "muon"}}, "optimizer 'muon' cannot be made", marks=MUON),
    ({"optimizer": {"name": "sparseadam", "weight_decay": 0}}, "cannot step on gradients"),
    ({"optimizer": {"name": "test_loop_keys:nothing"}}, "makes a NoneType"),
    ({"schedule": lambda step, total: -1}, "must be 0 or more"),
    ({"schedule": lambda step, total: {}[step]}, "it raises KeyError"),
    ({"schedule": lr_scheduler.ReduceLROnPlateau}, "needs a metric"),
    ({"schedule": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20)}, "changes the momentum"),
    ({"schedule": lambda o: 3}, "a torch scheduler is wanted"),
    ({"accumulate": 5}, "a step would take 80 samples, and there are 64"),
]


@pytest.mark.parametrize(("keys", "reason"), WRONG_LOOPS)
def test_a_loop_that_cannot_run_is_refused_before_anything_runs(keys, reason):
    with pytest.raises(UserError, match=reason):
        dry_run(context(plain), [("train", config("train", method="none", **keys))])


@pytest.mark.parametrize("name", sorted(set(optimizers._torchs()) - {"muon", "sparseadam"}))
def test_every_optimizer_of_torch_can_be_named(name):
    keys = {"weight_decay": 0} if name == "rprop" else {}
    before, after = plain().state_dict(), trained(optimizer={"name": name, "lr": 1e-2, **keys}, max_steps=2)[0]
    assert any(not torch.equal(before[key], value) for key, value in after.items())
