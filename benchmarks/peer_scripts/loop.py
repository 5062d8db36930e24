"""The plain training loop that a user of a library without one writes: AdamW or SGD, one cycle, best epoch kept."""

from __future__ import annotations

# user code
import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

# end
from benchmarks.peer_scripts.given import Given, accuracy


# user code
def fit(model: nn.Module, given: Given, lr: float, optimizer: str = "adamw") -> None:
    if optimizer == "sgd":
        opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    else:
        opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    steps = given.epochs * len(given.train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, cycle_momentum=False)
    best, kept = -1.0, model.state_dict()
    for _ in range(given.epochs):
        model.train()
        for x, y in given.train:
            opt.zero_grad()
            cross_entropy(model(x), y).backward()
            opt.step()
            schedule.step()
        found = accuracy(model, given)
        if found >= best:
            best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    model.eval()


# end
