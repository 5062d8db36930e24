"""Which models can be pruned, and why the rest cannot.

    python -m benchmarks.prune_coverage [--quick] [--check] [--only NAME ...]

Every built-in model, every image classifier of transformers (built offline from its default config, transformer
stacks shortened to two layers), and where they can be imported a model per family of timm and torchvision's
classifiers. Each is surveyed, cut to half of its channels, and the cut is compared with the masked model on random
images. ``--quick``: the built-in models and transformers' resnet, mobilenet_v2 and vit. Prints a table and writes
benchmarks/results/prune_coverage.json.

Targets (``--check`` exits 1 where one is missed): the models of ``--quick`` are prunable, lose half of their
prunable channels (within 2 %), and the cut model equals the masked one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flatcompress import models, prune
from flatcompress.errors import RunError, UserError

RESULTS = Path(__file__).parent / "results" / "prune_coverage.json"
MUST = ["transformers:resnet", "transformers:mobilenet_v2", "transformers:vit"]
TIMM = [
    "convnext_tiny",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla34",
    "efficientnet_b0",
    "ghostnet_100",
    "mixer_s32_224",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "regnety_002",
    "repvgg_a0",
    "res2net50_26w_4s",
    "resnet18",
    "resnext50_32x4d",
    "seresnet18",
    "swin_tiny_patch4_window7_224",
    "vgg11_bn",
    "vit_tiny_patch16_224",
]


@dataclass
class Row:
    """One model: what of it can be cut, and what is left at half of the channels."""

    model: str
    prunable: bool
    groups: int = 0
    channels: int = 0
    heads: int = 0
    removed: float | None = None
    macs_left: float | None = None
    seconds: float | None = None
    reason: str = ""


def names(quick: bool) -> Iterator[str]:
    """The models to look at."""
    yield from models.MODELS
    yield from MUST
    if quick:
        return
    yield from (f"transformers:{kind}" for kind in _transformers_types() if f"transformers:{kind}" not in MUST)
    if _importable("timm"):
        yield from (f"timm:{name}" for name in TIMM)
    if _importable("torchvision"):
        torchvision = importlib.import_module("torchvision.models")
        yield from (f"torchvision:{name}" for name in torchvision.list_models(module=torchvision))


def _importable(library: str) -> bool:
    try:
        importlib.import_module(library)
    except Exception as error:
        print(f"{library}: left out ({type(error).__name__}: {str(error).splitlines()[0][:90]})", file=sys.stderr)
        return False
    return True


def _transformers_types() -> list[str]:
    if not _importable("transformers"):
        return []
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    return sorted(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


def build(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model for small images where it takes them, else for 224 pixels; transformer stacks with two layers."""
    small = name in models.MODELS or name in MUST
    shape = (3, 32, 32) if small else (3, 224, 224)
    configs: list[dict[str, int] | None] = [None]
    if name.startswith("transformers:") and name != "transformers:resnet":
        configs = [{"num_hidden_layers": 2}, None]
    last: Exception | None = None
    for config in configs:
        try:
            model = models.build(name, num_classes=10, input_shape=shape, seed=0, config=config)
            return model.eval(), torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        except (UserError, MemoryError) as error:
            last = error
    raise last or UserError(f"{name} cannot be built")


def look_at(name: str) -> Row:
    """Survey, cut, compare."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            model, x = build(name)
    except Exception as error:
        return Row(name, False, reason=f"not built: {_short(error)}")
    try:
        start = time.perf_counter()
        found = prune.survey(model, x)
        row = Row(name, bool(found.groups), len(found.groups), sum(g.channels for g in found.groups))
        row.heads = sum(g.units for g in found.groups if g.kind == "heads")
        row.reason = _reasons(found)
        if found.groups:
            before = prune.CostModel(model, x)
            plan = prune.prune(model, x, 0.5, floor=0.05)
            after = prune.CostModel(model, x)
            data = plan.of_kind("channels")[0]
            row.removed = 1 - data["kept_channels"] / data["total_channels"]
            row.macs_left = after.macs(after.dense) / before.macs(before.dense)
        row.seconds = time.perf_counter() - start
    except (UserError, RunError) as error:
        return Row(name, False, reason=_short(error))
    return row


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _reasons(found: prune.Survey) -> str:
    """The reasons without the layers' names, most frequent first, output layers left out."""
    kinds: Counter[str] = Counter()
    for group in found.protected:
        reason = group.reason or ""
        if "output layer" in reason:
            continue
        short = next((k for k in _KINDS if k in reason), reason)
        kinds[_KINDS.get(short, short)] += 1
    return "; ".join(f"{count}x {kind}" for kind, count in kinds.most_common(3))


_KINDS = {
    "free parameter": "a free parameter has the channels",
    "normalises over": "a norm over the channels",
    "does not give the masked": "the cut does not equal the mask",
    "needs these channels whole": "a layer needs the channels whole",
    "shares its weights": "shared weights",
    "in one forward": "a layer runs more than once",
    "a single unit": "a single unit",
}


def table(rows: list[Row]) -> str:
    """One line per model."""
    names = f"{'model':38} {'groups':>6} {'channels':>8} {'heads':>5}"
    head = f"{names} {'removed':>8} {'MACs left':>9} {'s':>6}  left alone"
    lines = [head, "-" * len(head)]
    for row in rows:
        removed = "-" if row.removed is None else f"{row.removed:.1%}"
        left = "-" if row.macs_left is None else f"{row.macs_left:.1%}"
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        sizes = f"{row.model:38} {row.groups:6} {row.channels:8} {row.heads:5}"
        lines.append(f"{sizes} {removed:>8} {left:>9} {seconds:>6}  {row.reason}")
    prunable = sum(row.prunable for row in rows)
    return "\n".join([*lines, f"prunable: {prunable} of {len(rows)}"])


def missed(rows: list[Row]) -> list[str]:
    """The targets that do not hold."""
    found = {row.model: row for row in rows}
    lines = []
    for name in [*models.MODELS, *MUST]:
        row = found.get(name)
        if row is None:
            continue
        if not row.prunable or row.removed is None:
            lines.append(f"{name}: not prunable ({row.reason})")
        elif abs(row.removed - 0.5) > 0.02:
            lines.append(f"{name}: asked to remove 50 % of the channels, removed {row.removed:.1%}")
    return lines


def main() -> int:
    """Run, print, write, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="built-in models and three of transformers")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="these models")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in arguments.only or names(arguments.quick):
        rows.append(look_at(name))
        print(f"{name}: {'prunable' if rows[-1].prunable else rows[-1].reason}", file=sys.stderr)
        gc.collect()
    print(table(rows))
    if arguments.only is None:
        RESULTS.parent.mkdir(exist_ok=True)
        payload = {"quick": arguments.quick, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        path = RESULTS.with_stem(f"{RESULTS.stem}-quick") if arguments.quick else RESULTS
        path.write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
    failures = missed(rows)
    for line in failures:
        print(f"MISSED {line}", file=sys.stderr)
    return 1 if arguments.check and failures else 0


if __name__ == "__main__":
    sys.exit(main())
