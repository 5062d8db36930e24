"""Which networks go through, from module to proved file, and why the rest do not.

    python -m benchmarks.network_coverage [--quick] [--check] [--only NAME ...]

Every built-in model, timm's small and mobile families and one of each big family where timm can be imported, and
transformers' classifiers from shortened default configs. Each network, untrained, is traced, pruned at 0.5, quantized
at W8A8 and at W4A4, calibrated, exported (packed) and run through onnxruntime beside the reference at batches of 1
and 3. A row says how far each got, how many layers stay float and how long it took. ``--quick``: the built-in models
and six of timm's. Prints a table and writes benchmarks/results/network_coverage.json (after every row) and, without
``--quick`` or ``--only``, docs/results/network_coverage.md.

Targets (``--check`` exits 1 where one is missed): 95 % of the rows reach a file that runs as its reference, and every
other row ends in a UserError.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from flatcompress import models, prune, quant
from flatcompress.errors import UserError
from flatcompress.onnx_export import export

RESULTS = Path(__file__).parent / "results" / "network_coverage.json"
PAGE = Path(__file__).parent.parent / "docs" / "results" / "network_coverage.md"
QUICK = ["mobilenetv3_small_050", "efficientnet_lite0", "ghostnet_100", "repvgg_a0", "lcnet_050", "tinynet_e"]
TIMM = [
    *QUICK, "mobilenetv3_small_100", "mobilenetv3_large_100", "mobilenetv2_100", "mobilenetv4_conv_small",
    "mobilenetv1_100", "efficientnet_b0", "tf_efficientnet_lite0", "efficientnet_es", "tf_mobilenetv3_small_100",
    "mnasnet_small", "mnasnet_100", "semnasnet_075", "fbnetc_100", "spnasnet_100", "hardcorenas_a", "mixnet_s",
    "tinynet_a", "lcnet_100", "ghostnetv2_100", "repghostnet_050", "rexnet_100", "mobileone_s0", "fastvit_t8",
    "mobilevit_xxs", "mobilevitv2_050", "edgenext_xx_small", "efficientformerv2_s0", "efficientvit_b0",
    "efficientvit_m0", "repvit_m0_9", "starnet_s1", "ese_vovnet19b_dw", "shvit_s1", "regnetx_002", "regnety_002",
    "regnetz_005", "resnet10t", "resnet18", "resnet26d", "resnext50_32x4d", "seresnet18", "ecaresnet26t",
    "skresnet18", "res2net50_14w_8s", "resnest14d", "densenet121", "dla34", "dpn48b", "vgg11_bn", "hrnet_w18_small",
    "cspresnet50", "darknet17", "selecsls42", "vovnet39a", "inception_v3", "xception41", "nf_resnet26",
    "dm_nfnet_f0", "resnetv2_50", "botnet26t_256", "halonet26t", "lambda_resnet26t", "gcresnet33ts", "bat_resnext26ts",
    "convnext_atto", "convnextv2_atto", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "mixer_s32_224",
    "gmlp_ti16_224", "resmlp_12_224", "poolformer_s12", "pvt_v2_b0", "swin_tiny_patch4_window7_224", "levit_128s",
    "coat_lite_tiny", "convit_tiny", "cait_xxs24_224", "twins_pcpvt_small", "xcit_nano_12_p16_224", "visformer_tiny",
    "crossvit_tiny_240", "maxvit_rmlp_pico_rw_256", "coatnet_pico_rw_224", "focalnet_tiny_srf", "davit_tiny",
]  # fmt: skip
TRANSFORMERS = ["resnet", "mobilenet_v1", "mobilenet_v2", "vit", "deit", "convnext", "regnet"]


@dataclass
class Row:
    """How far one network got: "ok", or the message of what stopped it, per step."""

    name: str
    pruned: str = "-"
    w8a8: str = "-"
    w4a4: str = "-"
    float_layers: str = "-"
    float_macs: float | None = None
    steps: float | None = None
    seconds: float = 0.0
    raw: list[str] = field(default_factory=list)

    @property
    def certified(self) -> bool:
        """Whether both files run as their references."""
        return self.w8a8 == "ok" and self.w4a4 == "ok"


def networks(quick: bool) -> list[str]:
    """The names of the networks, those of packages that cannot be imported left out with a word."""
    names = list(models.MODELS)
    for package, listed in (("timm", QUICK if quick else TIMM), ("transformers", [] if quick else TRANSFORMERS)):
        try:
            importlib.import_module(package)
        except Exception as error:  # timm asks for torchvision, which has its own ways to fail
            print(f"{package} cannot be imported here ({type(error).__name__}: {error}): its networks are left out.")
            continue
        names += [f"{package}:{name}" for name in listed]
    return names


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The network and an example batch of two, as small as it takes."""
    torch.manual_seed(0)
    if name.startswith("timm:"):
        timm: Any = importlib.import_module("timm")
        model = timm.create_model(name[5:], num_classes=10)
        config = model.pretrained_cfg
        size = config["input_size"][-1] if config.get("fixed_input_size") else 64
        return model, torch.randn(2, 3, size, size)
    shape = (3, 64, 64) if name.startswith("transformers:") else (3, 32, 32)
    return models.build(name, num_classes=10, input_shape=shape, seed=0), torch.randn(2, *shape)


def attempt(row: Row, step: str, run: Any) -> Any:
    """Run one step; what stops it is kept, and said to be raw where it is no UserError."""
    try:
        result = run()
        setattr(row, step, "ok")
        return result
    except UserError as error:
        setattr(row, step, str(error)[:300])
    except Exception as error:
        setattr(row, step, f"{type(error).__name__}: {str(error)[:250]}")
        row.raw.append(step)
    return None


def through(name: str, bits: int, row: Row) -> None:
    """Quantize, calibrate, export, run: UserError where the file is not its reference."""
    model, x = built(name)
    data = quant.quantize(model, bits, bits, example_input=x).of_kind("quantizers")[0]["float_layers"]
    row.float_layers, row.float_macs = f"{data['count']} of {data['total']}", round(data["macs"], 4)
    quant.calibrate(model, [x, torch.randn_like(x)])
    with tempfile.TemporaryDirectory() as folder:
        exported = export(model.eval(), x, Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    reference, batch = exported.reference, torch.randn(3, *x.shape[1:])
    with torch.no_grad():
        expected = reference(batch).numpy()
    span = float(np.ptp(expected)) / 255 or 1.0
    given = session.get_inputs()[0].name
    worst = [np.abs(session.run(None, {given: batch[:n].numpy()})[0] - expected[:n]).max() / span for n in (1, 3)]
    row.steps = max(row.steps or 0.0, round(float(max(worst)), 2))
    if row.steps > 1.0:
        raise UserError(f"the file is {row.steps} steps from its reference at W{bits}A{bits}")


def survey(name: str) -> Row:
    """One network's row."""
    row, start = Row(name), time.time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt(row, "w8a8", lambda: through(name, 8, row))
        attempt(row, "w4a4", lambda: through(name, 4, row))
        attempt(row, "pruned", lambda: prune.prune(*built(name), ratio=0.5))
    row.seconds = round(time.time() - start, 1)
    gc.collect()
    return row


def missed(rows: list[Row]) -> list[str]:
    """The targets that these rows miss."""
    problems = [f"{row.name}: raw exception in {', '.join(row.raw)}" for row in rows if row.raw]
    share = sum(row.certified for row in rows) / max(1, len(rows))
    return problems + ([f"{share:.1%} of the networks reach a proved file, not 95 %"] if share < 0.95 else [])


def page(rows: list[Row]) -> str:
    """The page: totals, then a line per network."""
    done = sum(row.certified for row in rows)
    lines = [
        "# Which networks go through",
        "",
        f"`python -m benchmarks.network_coverage`: {done} of {len(rows)} networks (untrained, calibrated on two "
        "batches) reach a packed file at W8A8 and at W4A4 that is at most one output step from its reference. What "
        "stops the others is the last column.",
        "",
        "| network | W8A8 | W4A4 | pruned at 0.5 | float layers | their MACs | steps | s | what stopped it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        told = next((m for m in (row.w8a8, row.w4a4, row.pruned) if m not in ("ok", "-")), "").replace("|", "/")
        marks = ["yes" if m == "ok" else "no" for m in (row.w8a8, row.w4a4, row.pruned)]
        share = "" if row.float_macs is None else f"{row.float_macs:.1%}"
        steps = "" if row.steps is None else f"{row.steps:g}"
        cells = [row.name, *marks, row.float_layers, share, steps, f"{row.seconds:g}", told[:160]]
        lines.append("| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Run the rows, print and write them; 1 when ``--check`` finds a target missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in given.only or networks(given.quick):
        row = survey(name)
        rows.append(row)
        told = next((m for m in (row.w8a8, row.w4a4, row.pruned) if m != "ok"), "")
        print(f"{name}: {'ok' if row.certified else 'NO'} {row.float_layers} float, {row.steps} steps, "
              f"{row.seconds} s {told[:200]}", flush=True)  # fmt: skip
        if not given.only:
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps([asdict(r) | {"certified": r.certified} for r in rows], indent=1))
            if not given.quick:
                PAGE.write_text(page(rows))
    print(f"{sum(r.certified for r in rows)} of {len(rows)} networks reach a proved file")
    problems = missed(rows) if given.check else []
    for problem in problems:
        print("missed:", problem)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
