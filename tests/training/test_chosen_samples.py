"""Flat methods that choose samples get their losses from the training loop, and the gradients of the chosen alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from flatcompress import flat
from flatcompress.training.callback import Callback
from flatcompress.training.job import Job
from flatcompress.training.loop import fit, make_accelerator


class Rows(torch.utils.data.Dataset):
    """24 points in two classes."""

    def __init__(self):
        g = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(24, 4, generator=g), torch.arange(24) % 2

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Sizes(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(4, 2)
        self.seen = []

    def forward(self, x):
        self.seen.append((len(x), torch.is_grad_enabled()))
        return self.layer(x)


class OfTheBatch(Callback):
    """A term that belongs to the batch as a whole."""

    name = "of_the_batch"

    def loss_term(self, output, y):
        return output.std()


def trained(method, callbacks=(), **hyper):
    model = Sizes()
    optimizer = flat.create(method, model, torch.optim.SGD(model.parameters(), lr=0.1), **hyper)
    job = Job(
        model=model, optimizer=optimizer, selects=optimizer.method.selects, train=Rows(),
        accelerator=make_accelerator("cpu"), loss=nn.functional.cross_entropy, epochs=1, batch_size=12, seed=0,
        schedule="constant", select="last", validate=lambda: 0.0, callbacks=callbacks,
    )  # fmt: skip
    fit(job)
    return model, optimizer


def test_ksam_trains_on_a_third_of_each_batch():
    model, optimizer = trained("ksam")
    assert model.seen == [(12, False), (4, True), (4, True)] * 2 and optimizer.passes == 4


def test_esam_keeps_fewer_samples_for_its_second_gradient():
    model, _ = trained("esam", beta=1.0, gamma=0.5)
    assert model.seen == [(12, True), (12, False), (5, True)] * 2


def test_choosing_all_samples_ends_where_sam_does():
    chosen, _ = trained("ksam", top=1.0)
    plain, _ = trained("sam")
    for a, b in zip(chosen.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b)


def test_a_term_of_the_whole_batch_keeps_the_batch_whole_and_a_warning_says_so():
    with pytest.warns(UserWarning, match="all samples are used"):
        model, _ = trained("ksam", callbacks=[OfTheBatch()])
    assert {n for n, _ in model.seen} == {12}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained("sam", callbacks=[OfTheBatch()])
