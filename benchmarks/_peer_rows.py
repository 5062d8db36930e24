"""The rows of `benchmarks.peers`: which script, in which environment, with which flags, after which other row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.domain_generalization import QAT_RHO, RHO, K, quantize, train
from benchmarks.robust_pruning import prune

SCRIPTS = Path(__file__).parent / "peer_scripts"
OURS = "flatcompress"
START_EPOCHS = 12
HEADLINE = "flatcompress: AdaSAP, GAQAT W4A4"


@dataclass(frozen=True)
class Peer:
    """One row. ``tool``: whose figures it counts towards; ``environment``: of `_peer_envs`, None for this interpreter.

    ``grid``: flags to try on the first seed, chosen by validation; ``tuned_as``: takes the choice of that row.
    ``after``: the row whose file this one quantizes. ``times``: of the epoch budget. ``passes``: of a step, None where
    the tool says it itself. ``counted``: scripts whose user code counts; ``extra_lines``: of a recipe. ``scratch``:
    starts from no network, and has the epochs of the start as well.
    """

    name: str
    tool: str
    script: str
    environment: str | None
    flags: tuple[str, ...] = ()
    grid: tuple[tuple[str, ...], ...] = ()
    tuned_as: str = ""
    after: str = ""
    times: float = 1.0
    passes: int | None = 1
    counted: tuple[str, ...] = ()
    extra_lines: int = 0
    scratch: bool = False


START = Peer("float ERM", "float", "float_erm", "onnxruntime", times=0, counted=("float_erm", "loop"), scratch=True)
FITS = (("--optimizer", "adamw", "--lr", "1.5e-3"), ("--optimizer", "sgd", "--lr", "0.02"))


def static(of: Peer, tool: str = "") -> Peer:
    """onnxruntime's quantize_static on the file of another row, counted towards that row's tool unless told."""
    return Peer(
        f"{of.name} + quantize_static", tool or of.tool, "ort_static", "onnxruntime", after=of.name, times=0,
        counted=("ort_static",), scratch=of.scratch,
    )  # fmt: skip


def peers(quick: bool) -> list[Peer]:
    """Every row but flatcompress's own, in the order of the table."""
    half = Peer("Torch-Pruning", "Torch-Pruning", "tp_magnitude", "torch-pruning", grid=FITS,
                counted=("tp_magnitude", "loop"))  # fmt: skip
    four = Peer("Brevitas QAT W4A4, QCDQ", "Brevitas", "brevitas_qat", "brevitas", ("--bits", "4"),
                counted=("brevitas_qat", "loop"))  # fmt: skip
    sam = Peer("pytorch_optimizer SAM", "pytorch_optimizer", "sam_float", "pytorch-optimizer", ("--rho", str(RHO)),
               passes=2, counted=("sam_float",))  # fmt: skip
    glued = replace(sam, name="Torch-Pruning, pytorch_optimizer SAM", tool="three peers glued",
                    flags=("--prune", *sam.flags), counted=("sam_float", "tp_magnitude"))  # fmt: skip
    rows = [
        START,
        static(START, "onnxruntime"),
        half,
        static(half),
        replace(four, name="Brevitas QAT W8A8, QCDQ", flags=("--bits", "8")),
        four,
        Peer("NNCF QAT W8A8", "NNCF", "nncf_qat", "nncf", counted=("nncf_qat", "loop")),
        Peer("torchao PT2E QAT W8A8", "torchao", "pt2e_qat", "torchao", counted=("pt2e_qat", "loop")),
        sam,
        static(sam),
        glued,
        static(glued),
    ]
    if quick:
        return rows
    alone = replace(sam, name=f"{sam.name} from scratch", flags=("--scratch", *sam.flags, "--lr", "3e-3"), scratch=True)
    twice = replace(half, name=f"{half.name}, twice the epochs", grid=(), tuned_as=half.name, times=2)
    long = replace(four, name="Brevitas QAT W4A4, twice the epochs", times=2)
    return [*rows, alone, static(alone), twice, static(twice), long]


def own(epochs: int, quick: bool) -> list[Peer]:
    """flatcompress's rows: two thirds of the budget for pruning, one for QAT."""
    last = max(1, epochs // 3)
    first = epochs - last

    def row(label: str, *stages: dict[str, Any], profile: str = "packed") -> Peer:
        recipe = [*stages, {"export": {"profile": profile, "latency": False}}]
        return Peer(
            f"{OURS}: {label}", OURS, "flat_pipeline", None, ("--stages", json.dumps(recipe)), passes=None,
            counted=("flat_pipeline",), extra_lines=len(recipe), scratch="train" in stages[0],
        )  # fmt: skip

    steps = {"round_to": 8}  # latency is graded here, and awkward widths are slow
    cut = prune("adasap", 0.5, first, **steps)
    rows = [
        row("AdaSAP, GAQAT W4A4", cut, quantize("gaqat", 4, last, K=K, rho=QAT_RHO)),
        row("magnitude, LSQ W4A4 (one pass)", prune("magnitude", 0.5, first, **steps), quantize("lsq", 4, last)),
    ]
    if quick:
        return rows
    return [
        *rows,
        row("ASAM, LSQ+SAM W4A4", prune("asam", 0.5, first, rho=2.0, **steps),
            quantize("lsq_sam", 4, last, rho=QAT_RHO)),
        row("AdaSAP, LSQ+SAGM W4A8", cut, quantize("lsq_sagm", 4, last, activation_bits=8, rho=QAT_RHO)),
        row("AdaSAP, LSQ+SAGM W8A8", cut, quantize("lsq_sagm", 8, last, rho=QAT_RHO)),
        row("from scratch: SAGM, AdaSAP, GAQAT W4A4", train("sagm", START_EPOCHS, rho=RHO), cut,
            quantize("gaqat", 4, last, K=K, rho=QAT_RHO)),
    ]  # fmt: skip


def lines(peer: Peer, rows: Sequence[Peer]) -> int:
    """Lines of user code of a row, with those of the row whose file it takes."""
    before = next((lines(r, rows) for r in rows if r.name == peer.after), 0)
    return before + sum(user_lines((SCRIPTS / f"{s}.py").read_text()) for s in peer.counted) + peer.extra_lines


def user_lines(text: str) -> int:
    """Lines between ``# user code`` and ``# end`` that are neither blank nor comments.

    >>> user_lines("import os\\n# user code\\nx = 1\\n\\n# why\\ny = 2  # because\\n# end\\nz = 3")
    2
    """
    inside, count = False, 0
    for line in (line.strip() for line in text.splitlines()):
        if line in ("# user code", "# end"):
            inside = line == "# user code"
        elif inside and line and not line.startswith("#"):
            count += 1
    return count
