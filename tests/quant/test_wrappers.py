"""A quantized model under what people put around models: autocast, accelerate, DDP."""

from __future__ import annotations

import pytest
import torch
from nets import Net
from torch import nn

from flatcompress import quant
from flatcompress.errors import UserError

torch.set_num_threads(1)
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    quant.quantize(model, 4, 4)
    quant.calibrate(model, [X])
    return model


def test_autocast_trains_the_same_grid() -> None:
    model = net()
    plain = model.eval()(X)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(X).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(X).float()
    assert (mixed - plain).abs().max().item() < 0.2 * plain.abs().max().item()


def test_accelerate_wraps_the_graph_and_switches_still_work() -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, PartialState

    model = net()
    AcceleratorState._reset_state(True)  # another test of this process may have chosen another precision
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))
        prepared.train()
        loss = prepared(X).square().mean()
        accelerator.backward(loss)
        assert model.block1.conv1.weight.grad is not None
        prepared.eval()
        before = prepared(X)
        quant.set_bias_rounding(accelerator.unwrap_model(prepared), True)
        assert not torch.equal(prepared(X), before)  # the switch reaches a forward that is wrapped already
        with pytest.raises(UserError, match="already"):
            quant.quantize(accelerator.unwrap_model(prepared))
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()


def test_distributed_data_parallel_with_one_process(tmp_path) -> None:
    if torch.distributed.is_initialized():
        pytest.skip("another test holds the process group")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(X).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())  # no parameter is left out of the reduction
    finally:
        torch.distributed.destroy_process_group()
