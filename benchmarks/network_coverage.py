"""Which networks go through, from module to certified file, and why the rest do not.

    python -m benchmarks.network_coverage [--quick] [--check] [--only NAME ...] [--limit SECONDS] [--latency] [--page]

Every built-in model, MLPerf Tiny's four, timm's small and mobile families and one of each big family, torchvision's
and transformers' image, audio and text classifiers where those packages can be imported. Each network, untrained, is
traced, quantized at W8A8 and at W4A4, calibrated on two batches, exported (packed) and certified on four samples beside
the model that was given; and, by itself, pruned at 0.5. A row says how far each got, what stays float and how many
seconds of processor time it took. ``--quick``: the built-in models and six of timm's. A row that takes more than
``--limit`` seconds of processor time ends there and says so.

benchmarks/results/network_coverage.json has a line per row as soon as it is done; rows that are there are not run
again (``--only`` runs them again, ``--again`` all). Without ``--quick`` the page docs/results/network-coverage.md is
written from them; ``--page`` does only that. ``--latency`` times mobilenetv3_small, efficientnet_lite0 and ghostnet
against onnxruntime's quantize_static and our float file instead (`_coverage_latency`).

Targets (``--check`` exits 1 where one is missed): 95 % of the rows certified at both widths, and every other row ends
in a UserError.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from benchmarks import _coverage_latency
from benchmarks._coverage_networks import built, everything, networks
from flatcompress import graph, prune, quant
from flatcompress.errors import UserError
from flatcompress.graph.interface import call
from flatcompress.onnx_export import certify, export
from flatcompress.onnx_export.proof import parity
from flatcompress.onnx_export.proof.samples import Samples, judged

RESULTS = Path(__file__).parent / "results" / "network_coverage.json"
PAGE = Path(__file__).parent.parent / "docs" / "results" / "network-coverage.md"
LIMIT = 400
STEPS = ("traced", "w8a8", "w4a4", "pruned")


@dataclass
class Row:
    """How far one network got: "ok", or the message of what stopped it, per step."""

    name: str
    traced: str = "-"
    w8a8: str = "-"
    w4a4: str = "-"
    pruned: str = "-"
    float_layers: str = "-"
    float_macs: float | None = None
    integer_macs: float | None = None
    steps: float | None = None
    trained: dict[str, float] = field(default_factory=dict)
    parted: dict[str, str] = field(default_factory=dict)  # what `trained.stepwise` says of each width
    floats: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    raw: list[str] = field(default_factory=list)

    @property
    def certified(self) -> bool:
        """Whether the certificates of both files hold."""
        return self.w8a8 == "ok" and self.w4a4 == "ok"

    @property
    def told(self) -> str:
        """What stopped it first; nothing where nothing did."""
        return next((m for m in (getattr(self, s) for s in STEPS) if m not in ("ok", "-")), "")


def attempt(row: Row, step: str, run: Callable[[], Any]) -> Any:
    """Run one step; what stops it is kept, and said to be raw where it is no UserError."""
    try:
        result = run()
        setattr(row, step, "ok")
        return result
    except UserError as error:
        setattr(row, step, f"UserError: {str(error)[:400]}")
    except TimeoutError:
        setattr(row, step, "the time limit of this benchmark")
    except Exception as error:
        setattr(row, step, f"{type(error).__name__}: {str(error)[:350]}")
        row.raw.append(step)
    return None


def traced(name: str) -> tuple[nn.Module, nn.Module, Any]:
    """The network as it was given, a copy that runs its traced graph, and the example."""
    model, example = built(name)
    plain = copy.deepcopy(model)
    return plain, graph.install(model, graph.trace(model, example)), example


def through(model: nn.Module, plain: nn.Module, example: Any, bits: int, row: Row) -> None:
    """Quantize, calibrate, export, certify: UserError where the certificate does not hold."""
    others = [redrawn(example, seed) for seed in (1, 2)]
    data = quant.quantize(model, bits, bits, example_input=example).of_kind("quantizers")[0]["float_layers"]
    row.float_layers, row.float_macs = f"{data['count']} of {data['total']}", round(data["macs"], 4)
    quant.calibrate(model, [example, others[0]])
    quant.set_bias_rounding(model)  # the model that is trained has the file's biases
    with tempfile.TemporaryDirectory() as folder:
        exported = export(model.eval(), example, Path(folder) / "model.onnx")
        batches = [example, others[1]]
        found = certify(exported, batches, model=model, latency_runs=0, write=False, evaluations=4)
    key = f"w{bits}a{bits}"
    row.steps = max(row.steps or 0.0, _steps(found["parity"]["optimized"]))
    row.trained[key], row.parted[key] = _steps(found["trained"]["file"]), _parted(found["trained"])
    row.floats[key] = _from_float(exported.reference, plain, batches)
    row.bytes[key] = exported.bytes
    if bits == 8:
        row.integer_macs = found["integer"]["share_of_macs"]
    if not found["holds"]:
        raise UserError(f"the certificate does not hold: {' '.join(found['failures'])}")


def _steps(compared: dict[str, Any]) -> float:
    """Output steps, infinite where an output is no number."""
    steps = compared["largest_error_steps"]
    return float("inf") if steps is None else round(steps, 2)


WITHIN, BOUNDARY = "a step at most", "codes on a boundary"


def _parted(rows: dict[str, Any]) -> str:
    """What makes the file part from the quantized torch network: nothing, ties of rounding alone, or a layer."""
    if "stepwise" not in rows:
        return WITHIN
    found = rows["stepwise"]
    if found is None:
        return "not known"
    if found["holds"]:
        return f"{found['moved']} of {found['codes']} {BOUNDARY}"
    return f"at {found['wrong'][0]['name']}" if found["wrong"] else "behind the last quantizer"


def _from_float(reference: fx.GraphModule, plain: nn.Module, batches: list[Any]) -> float:
    """How far the file's reference is from the float network, in output steps of that: what quantizing does."""
    inputs, (index, _) = Samples(reference, batches), judged(reference)
    found = parity.reference_outputs(reference, inputs.batches, index)
    with torch.no_grad():
        results = [pytree.tree_leaves(call(plain.eval(), batch))[index].numpy() for batch in batches]
    expected = np.concatenate(results)
    return _steps(parity.compare(expected, found, parity.output_step(expected)))


def redrawn(example: Any, seed: int) -> Any:
    """Another example of the same kind: fresh real numbers; token ids and masks in another order of the samples."""
    torch.manual_seed(seed)
    return pytree.tree_map(lambda x: torch.randn_like(x) if x.is_floating_point() else x.roll(seed, 0), example)


def survey(name: str) -> Row:
    """One network's row."""
    row, start = Row(name), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = attempt(row, "traced", lambda: traced(name))
        if found is not None:
            plain, model, example = found
            for bits in (8, 4):
                attempt(row, f"w{bits}a{bits}", lambda b=bits: through(copy.deepcopy(model), plain, example, b, row))
        attempt(row, "pruned", lambda: prune.prune(*built(name), ratio=0.5))
    row.seconds = round(time.process_time() - start, 1)
    return row


def _in_child(name: str, limit: int, answer: Any) -> None:
    def late(*_: Any) -> None:
        raise TimeoutError

    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, limit, 5)
    answer.send(survey(name))


def in_its_own_process(name: str, limit: int) -> Row:
    """`survey` in a child process, so that a crash or the time limit costs one row."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(name, limit, there))
    child.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        child.join()
        return Row(name, traced=f"the process ended with {child.exitcode}", raw=["traced"])
    finally:
        child.join()


def missed(rows: list[Row]) -> list[str]:
    """The targets that these rows miss."""
    problems = [f"{row.name}: raw exception in {', '.join(row.raw)}" for row in rows if row.raw]
    share = sum(row.certified for row in rows) / max(1, len(rows))
    return problems + ([f"{share:.1%} of the networks reach a certified file, not 95 %"] if share < 0.95 else [])


def page(rows: list[Row], timed: list[dict[str, Any]]) -> str:
    """The page: totals, a line per network, and the latencies."""
    left = [name for name in everything() if name not in {row.name for row in rows}]
    done, cut = sum(row.certified for row in rows), sum(row.pruned == "ok" for row in rows)
    lines = [
        "# Which networks go through",
        "",
        f"`python -m benchmarks.network_coverage`: {done} of {len(rows)} networks, untrained and calibrated on two "
        f"batches, reach a packed file with a certificate that holds at W8A8 and at W4A4, and {cut} are pruned at 0.5; "
        "each certificate is judged on four samples. "
        "Images are 64 pixels wide where the network allows it, inputs are drawn.",
        *(["", f"Not run yet ({len(left)}), the same command goes on with them: {', '.join(left)}."] if left else []),
        "",
        "*float*: layers that stay float, of all convolutions, linear and recurrent layers. *on integers*: the share "
        "of the multiply-accumulates that onnxruntime computes on integers in the W8A8 file. *steps*: the largest "
        "distance of a file from its reference, in output steps (a 255th of the outputs' range; more than 1 is allowed "
        "only where every step of the file is proved by itself). *from quantized*: of the W8A8 and the W4A4 file from "
        "the quantized torch network, `trained` in the certificate; where it is more than a step that network is run "
        "once more on the file's codes (`trained.stepwise`): *by ties* if every quantizer then gives the file's codes "
        "but for values that lie on a boundary of rounding, else the layer where they differ; rows with a + are of "
        "before that run. "
        "*from float*: of what they compute from the float network, untrained weights and all: what quantizing does. "
        "*s*: seconds of processor time for the whole row. The last column says what stopped a network.",
        "",
        "| network | W8A8 | W4A4 | pruned | float | on integers | steps | from quantized | from float | kB | s | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
    ]
    return "\n".join([*lines, "", *_coverage_latency.section(timed)])


def _line(row: Row) -> str:
    marks = ["yes" if m == "ok" else "no" for m in (row.w8a8, row.w4a4, row.pruned)]
    integer = "" if row.integer_macs is None else f"{row.integer_macs:.1%}"
    far = [", ".join(f"{v[key]:.3g}" for key in ("w8a8", "w4a4") if key in v) for v in (row.trained, row.floats)]
    size = ", ".join(f"{row.bytes[key] / 1000:.0f}" for key in ("w8a8", "w4a4") if key in row.bytes)
    far[0] += _why(row)
    steps = "" if row.steps is None else f"{row.steps:g}"
    told = row.told.replace("|", "/")[:200]
    cells = [row.name, *marks, row.float_layers, integer, steps, *far, size, f"{row.seconds:g}", told]
    return "| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |"


def _why(row: Row) -> str:
    if not row.parted:
        return " +" if max(row.trained.values(), default=0.0) > 1 else ""
    said = sorted(set(row.parted.values()) - {WITHIN})
    layers = [one for one in said if not one.endswith(BOUNDARY)]
    ties = len(layers) < len(said)
    return "".join(f" ({one})" for one in [*layers, *(["by ties"] if ties else [])])


def stored() -> dict[str, Any]:
    """What earlier runs left: rows by name, and latencies."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known = Row.__dataclass_fields__
    rows = {name: {k: v for k, v in row.items() if k in known} for name, row in found.get("rows", {}).items()}
    return {"rows": rows, "latency": found.get("latency", [])}


def _store(kept: dict[str, Any], quick: bool) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    if not quick:
        PAGE.write_text(page([Row(**row) for row in kept["rows"].values()], kept["latency"]))


def main() -> int:
    """Run the rows, print and write them; 1 when ``--check`` finds a target missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--quick", "--check", "--again", "--latency", "--page"):
        parser.add_argument(option, action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--limit", type=int, default=LIMIT, metavar="SECONDS")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = stored()
    if given.latency:
        kept["latency"] = _coverage_latency.measured()
    names = [] if given.latency or given.page else given.only or networks(given.quick)
    for name in names:
        if name in kept["rows"] and not (given.again or given.only):
            continue
        row = in_its_own_process(name, given.limit)
        kept["rows"] = {**stored()["rows"], name: asdict(row)}  # another run may have added to it
        print(f"{name}: {'ok' if row.certified else 'NO'} {row.float_layers} float, {row.steps} steps, "
              f"{row.trained} from quantized, {row.seconds} s {row.told[:300]}", flush=True)  # fmt: skip
        _store(kept, given.quick)
    _store(kept, given.quick)
    rows = [Row(**kept["rows"][name]) for name in names or kept["rows"]]
    print(f"{sum(r.certified for r in rows)} of {len(rows)} networks reach a certified file")
    problems = missed(rows) if given.check else []
    unseen = [name for name in everything() if name not in kept["rows"]]
    if given.check and unseen and not (given.quick or given.only):
        problems.append(f"{len(unseen)} of {len(everything())} networks were not run, so nothing is known of them")
    for problem in problems:
        print("missed:", problem)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
