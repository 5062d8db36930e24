"""Every target's file of every built-in network: rules, and what the target's tool makes of it.

    python -m benchmarks.targets [--quick] [--check] [--only NETWORK ...] [--kept]

Networks: the built-in ones (`_ptq_networks.OPTIONS` makes three of them narrower), trained for an epoch on rotated
digits (ResNet-8, ResNet-20 and DS-CNN on all 6,295, the others on 2,000 images; vit_tiny for eight on all: a network
that has learned little is torn between classes that a last bit decides), quantized without training as
`flatcompress compress --target` does: the target's own weight bits (8; OpenVINO's 7), scales without ties, and for
onnxruntime, OpenVINO and LiteRT W4A4 too. ``lint``: breaches of the tool's published rules. ``run``: the package that
loaded the file here; a dash where there is none. None of the targets was run on a device. ``integer``: the layers that
it computes on integers. ``equal``: share of 1,000 real test inputs with the reference's class, ``steps``: the largest
difference in output steps, ``further``: the share that is more than 1.5 of them away.

``--quick``: ResNet-8 and DS-CNN, 200 inputs. What is measured is kept in ``benchmarks/results/targets.partial``:
a run that was stopped goes on, and ``--kept`` measures nothing and writes the page docs/results/targets.md from it.

Targets: no breach of a rule; onnxruntime, OpenVINO and LiteRT give the reference's class on at least 99.9 % of the
inputs and are at most 1.5 output steps away. A transformer at W4A4 is reported and not held to that: every runtime
computes its norms and softmax in floats of its own, and where such a value lies on a rounding boundary (the blank
corner of a digit gives the same value in most images) one code of 4 bits is many output steps.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import arguments, finish, kept, markdown, resumable
from benchmarks._ptq_networks import Case, trained
from flatcompress import onnx_export, quant
from flatcompress.compressing import steps_for
from flatcompress.compressing.options import narrowed, scheme_of

NETWORKS = ("resnet8", "ds_cnn", "resnet20", "vit_tiny", "mobilenet_v1_025", "mobilenet_v2", "resnet18", "resnet50")
QUICK = NETWORKS[:2]
FEWER = dict.fromkeys(NETWORKS[4:], 2000)  # images to train on: the others take all 6,295
EPOCHS = {"vit_tiny": 8}  # the others take one
BITS = ((8, 8), (4, 4))
INPUTS = {False: 1000, True: 200}
EQUAL, STEPS = 0.999, 1.5
HELD = ("onnxruntime-cpu", "openvino", "litert")
REPORTED = ("vit_tiny W4A4",)  # not held to `EQUAL` and `STEPS`
PAGE = Path(__file__).parent.parent / "docs" / "results" / "targets.md"


def measured(name: str, target: str, bits: tuple[int, int], inputs: int) -> dict[str, Any]:
    """The row of one file."""
    one: Case = trained(name, epochs=EPOCHS.get(name, 1), images=FEWER.get(name))
    weight, activation = narrowed(bits, target)
    scheme = {"method" if key == "quantizer" else key: value for key, value in scheme_of(target).items()}
    model = copy.deepcopy(one.model)
    quant.post_training(model, [one.draw(0)], weight, activation, **{**steps_for(weight), **scheme})
    onnx_export.untie(model, one.pool[:2])
    quant.set_bias_rounding(model, True)
    chosen = torch.linspace(0, len(one.test[0]) - 1, inputs).long()
    with tempfile.TemporaryDirectory() as folder:
        profile = onnx_export.TARGETS[target]().profile
        exported = onnx_export.export(model, one.pool[:2], Path(folder) / "model.onnx", profile)
        row = onnx_export.check_target(exported, one.test[0][chosen].split(250), target)
    ran = row["run"] or {}
    integer = f"{ran['integer_layers']} of {ran['layers']}" if "layers" in ran else None
    return {
        "network": name, "target": target, "bits": f"W{weight}A{activation}", "lint": len(row["lint"]),
        "run": f"{ran['package']} {ran['version']}" if ran else None, "integer": integer,
        "inputs": ran.get("samples"), "equal": ran.get("equal_argmax"), "steps": ran.get("largest_error_steps"),
        "further": ran["further"] / ran["samples"] if "further" in ran else None,
        "breaches": row["lint"], "why_not": row["why_not"],
    }  # fmt: skip


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Targets that are missed."""
    found = [f"{_name(row)}: {'; '.join(row['breaches'])}" for row in rows if row["breaches"]]
    for row in (row for row in rows if row["target"] in HELD):
        if row["run"] is None:
            found.append(f"{_name(row)}: not run ({row['why_not']})")
        elif row["equal"] is None:
            found.append(f"{_name(row)}: the tool did not run the file")
        elif not _name(row).startswith(REPORTED) and (row["equal"] < EQUAL or row["steps"] > STEPS):
            found.append(f"{_name(row)}: equal class on {row['equal']:.2%}, at most {row['steps']:.3g} steps away, "
                         f"{row['further']:.2%} of the inputs by more than {STEPS}")  # fmt: skip
    return found


def _name(row: dict[str, Any]) -> str:
    return f"{row['network']} {row['bits']} {row['target']}"


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns of the table."""
    return [{key: row[key] for key in row if key not in ("breaches", "why_not")} for row in rows]


def page(rows: Sequence[dict[str, Any]], absent: Sequence[str]) -> str:
    """The page of results."""
    parts = ["# Targets", "Written by `python -m benchmarks.targets`; its docstring says what the columns are. Nothing "
             "here was run on a device.", markdown(shown(rows))]  # fmt: skip
    parts += [f"Not measured: {line}." for line in absent]
    return "\n\n".join([*parts, *(f"Missed: {failure}." for failure in missed(rows))]) + "\n"


def _own(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=NETWORKS, help="networks (default: all)")
    resumable(parser)


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit code."""
    options = arguments(__doc__, argv, _own)
    store = kept("targets", options)
    names = options.only or (QUICK if options.quick else NETWORKS)
    written = [name for name in onnx_export.TARGETS if not onnx_export.TARGETS[name]().instead]
    order = sorted(written, key=lambda target: target not in HELD)
    rows: list[dict[str, Any]] = []
    absent: dict[str, dict[str, None]] = {}
    inputs = INPUTS[options.quick]
    every = [(n, t, bits) for n in names for t in order for bits in (BITS if t in HELD else BITS[:1])]
    for name, target, bits in sorted(every, key=lambda one: one[1] not in HELD):  # what is held to figures comes first
        label = f"{name} W{bits[0]}A{bits[1]} {target}"
        row = store.get(label, lambda n=name, t=target, b=bits: measured(n, t, b, inputs))
        if row is None:
            absent.setdefault(target, {})[name] = None
        else:
            rows.append(row)
    rows.sort(key=lambda row: names.index(row["network"]))
    lines = [f"{target} with {', '.join(found)}" for target, found in absent.items()]
    if not (options.quick or options.only):
        PAGE.write_text(page(rows, lines))
    failures = missed(rows) + [f"not measured: {line}" for line in lines]
    return finish("targets", shown(rows), failures, options, details=rows)


if __name__ == "__main__":
    raise SystemExit(main())
