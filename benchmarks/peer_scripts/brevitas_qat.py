"""Brevitas: its own layers and stock quantizers, learned activation scales, QCDQ export."""

from __future__ import annotations

import argparse

# user code
import brevitas.nn as qnn
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.graph.calibrate import calibration_mode
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
from torch import nn

# end
from benchmarks.peer_scripts.given import Given, run
from benchmarks.peer_scripts.loop import fit


# user code
def quantized(module: nn.Module, bits: int, first: list[bool]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            is_first = not first
            first.append(True)
            made = qnn.QuantConv2d(
                child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding,
                bias=False, weight_quant=Int8WeightPerChannelFloat, weight_bit_width=8 if is_first else bits,
                input_quant=Int8ActPerTensorFloat if is_first else None,
            )  # fmt: skip
        elif isinstance(child, nn.Linear):
            made = qnn.QuantLinear(
                child.in_features, child.out_features, bias=True, weight_quant=Int8WeightPerChannelFloat,
                weight_bit_width=8, input_quant=Uint8ActPerTensorFloat,
            )  # fmt: skip
        elif isinstance(child, nn.ReLU):
            made = qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=bits)
        else:
            quantized(child, bits, first)
            continue
        made.load_state_dict(child.state_dict(), strict=False)
        setattr(module, name, made)


def work(given: Given) -> None:
    model = given.model
    quantized(model, given.options.bits, [])
    model.eval()
    with torch.no_grad(), calibration_mode(model):
        for x, _ in given.train:
            model(x)
    fit(model, given, lr=1e-3)
    export_onnx_qcdq(
        model, args=given.example, export_path=given.onnx, dynamo=False, opset_version=17,
        input_names=["x"], dynamic_axes={"x": {0: "batch"}},
    )  # fmt: skip


# end


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=int, default=8)


if __name__ == "__main__":
    run(work, arguments)
