"""torchao: PT2E quantization-aware training with the x86 quantizer, converted and exported to ONNX."""

from __future__ import annotations

# user code
import torch
from torchao.quantization.pt2e import allow_exported_model_train_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

# end
from benchmarks.peer_scripts.given import Given, run
from benchmarks.peer_scripts.loop import fit


# user code
def work(given: Given) -> None:
    batch = {0: torch.export.Dim("batch")}
    captured = torch.export.export(given.model.train(), (given.train_set[0][:4],), dynamic_shapes=(batch,)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    model = allow_exported_model_train_eval(prepare_qat_pt2e(captured, quantizer))
    fit(model, given, lr=1e-3)
    converted = convert_pt2e(model)
    torch.onnx.export(
        converted, (given.val[0][:2],), given.onnx, dynamo=True, external_data=False, dynamic_shapes=(batch,)
    )


# end


if __name__ == "__main__":
    run(work)
