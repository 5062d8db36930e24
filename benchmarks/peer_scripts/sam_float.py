"""pytorch_optimizer: its SAM in a float network's training; with ``--prune`` after Torch-Pruning's magnitude cut."""

from __future__ import annotations

import argparse

# user code
import copy

import torch
from pytorch_optimizer import SAM
from pytorch_optimizer.optimizer.utils.model import disable_running_stats, enable_running_stats
from torch.nn.functional import cross_entropy

# end
from benchmarks.peer_scripts.given import Given, accuracy, fresh, run
from benchmarks.peer_scripts.tp_magnitude import cut


# user code
def work(given: Given) -> None:
    model = fresh(given) if given.options.scratch else given.model
    if given.options.prune:
        cut(model, given)
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=given.options.rho, lr=given.options.lr, weight_decay=1e-4)
    steps = given.epochs * len(given.train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, given.options.lr, total_steps=steps, cycle_momentum=False)
    best, kept = -1.0, model.state_dict()
    for _ in range(given.epochs):
        model.train()
        for x, y in given.train:
            enable_running_stats(model)
            opt.zero_grad()
            cross_entropy(model(x), y).backward()

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                disable_running_stats(model)
                opt.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                return loss

            opt.step(closure)
            schedule.step()
        enable_running_stats(model)
        found = accuracy(model, given)
        if found >= best:
            best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    axes = {"x": {0: "batch"}}
    torch.onnx.export(model.eval(), (given.example,), given.onnx, dynamo=False, input_names=["x"], dynamic_axes=axes)


# end


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--prune", action="store_true")
    parser.add_argument("--scratch", action="store_true")


if __name__ == "__main__":
    run(work, arguments)
