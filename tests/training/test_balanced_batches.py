"""Batches with as many samples of each domain."""

from __future__ import annotations

import pytest
import torch

from flatcompress import Pipeline
from flatcompress.errors import UserError
from flatcompress.training.batches import epoch_batches


@pytest.mark.parametrize("sizes", [(40, 40, 40), (90, 25, 5)])
@pytest.mark.parametrize(("batch_size", "world"), [(12, 1), (10, 1), (6, 3)])
def test_domains_take_turns_in_every_batch_of_every_process(sizes, batch_size, world):
    domains = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    domains = domains[torch.randperm(len(domains), generator=torch.Generator().manual_seed(1))]
    for rank in range(world):
        batches = epoch_batches(len(domains), batch_size, 3, 1, rank, world, domains)
        assert len(batches) == len(epoch_batches(len(domains), batch_size, 3, 1, rank, world))
        for batch in batches:
            counts = torch.bincount(domains[batch], minlength=len(sizes))
            assert int(counts.max() - counts.min()) <= 1


def order(domains: torch.Tensor, batch_size: int, epoch: int) -> list[int]:
    return [i for batch in epoch_batches(len(domains), batch_size, 0, epoch, domain_ids=domains) for i in batch]


def test_equal_domains_are_seen_whole_and_in_another_order_each_epoch():
    domains = torch.arange(3).repeat(20)
    first, second = (order(domains, 6, epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(60)) and first != second
    assert first == order(domains, 6, 0)


def test_a_small_domain_comes_round_again_only_when_all_of_it_was_seen():
    domains = torch.tensor([0] * 18 + [1] * 6)
    seen = [i for i in order(domains, 4, 0) if i >= 18]
    assert len(seen) == 12 and sorted(seen[:6]) == sorted(seen[6:]) == list(range(18, 24))


def test_one_domain_cannot_be_balanced():
    data = {"name": "styled-shapes", "held_out": "sketch", "domains": ["photo"], "balance_domains": True}
    with pytest.raises(UserError, match="one domain alone"):
        Pipeline("resnet8", data, [{"train": {"epochs": 1}}]).prepare(tried=False)


def test_a_run_trains_on_balanced_batches():
    data = {"name": "styled-shapes", "held_out": "sketch", "balance_domains": True}
    run = Pipeline("resnet8", data, [{"train": {"epochs": 1}}]).prepare(tried=False)
    assert run.balanced
