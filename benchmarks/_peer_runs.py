"""Runs the peers' scripts and measures what they leave: nobody grades their own work.

A peer's folder holds ``model.onnx`` and ``made.json`` (its seconds) and, when graded, ``graded.json``. What is there
for the same flags is not made again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks import _peer_envs
from benchmarks._peer_rows import START, START_EPOCHS, Peer
from benchmarks.robust_pruning import DATA
from flatcompress import data
from flatcompress.data import DataBundle
from flatcompress.onnx_export.runtime import latency

ROOT = Path(__file__).parent.parent
GRADED = ("val", "test", "held_out", "corrupted")
BATCH = 64


@dataclass
class Arena:
    """One seed's data, start and results under ``folder``. ``choices``: tuned flags by row, shared by all seeds."""

    folder: Path
    seed: int
    epochs: int
    start_epochs: int
    choices: dict[str, tuple[str, ...]]

    @cached_property
    def bundle(self) -> DataBundle:
        """The images; what is graded never reaches a peer."""
        options = {k: v for k, v in DATA.items() if k not in ("name", "batch_size")}
        return data.load(str(DATA["name"]), seed=self.seed, held_out="sketch", **options)

    @cached_property
    def graded(self) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
        """{part: sets of images and labels}; ``corrupted`` has one set per kind and severity."""
        b = self.bundle
        parts: dict[str, list[Any]] = {"val": [b.val], "test": [b.test], "held_out": [b.held_out]}
        parts["corrupted"] = list(b.corrupted.values())
        return {name: [_arrays(s) for s in sets] for name, sets in parts.items()}

    def prepare(self) -> None:
        """Training and validation images, and the float network that all start from."""
        given = self.folder / "given"
        given.mkdir(parents=True, exist_ok=True)
        for name in ("train", "val"):
            if not (given / f"{name}.npz").exists():
                x, y = _arrays(getattr(self.bundle, name))
                np.savez(given / f"{name}.npz", x=x, y=y)
        if not (given / "start.safetensors").exists():
            found = self.row(START)
            if "problem" in found:
                raise SystemExit(f"the float start could not be trained: {found['problem']}")
            shutil.copy(self.of(START.name) / "start.safetensors", given)

    def with_start(self, peer: Peer, figures: dict[str, Any]) -> dict[str, Any]:
        """Seconds and passes with those of the float network, for rows that began with it."""
        if "problem" in figures or peer.scratch:
            return figures
        start = json.loads((self.of(START.name) / "graded.json").read_text())
        return {**figures, **{k: figures[k] + start[k] for k in ("seconds", "passes")}}

    def of(self, name: str) -> Path:
        """Folder of a row."""
        return self.folder / "".join(c if c.isalnum() or c in ".-" else "_" for c in name)

    def row(self, peer: Peer) -> dict[str, Any]:
        """Run (or look up) and grade ``peer``: its figures, or {"problem": ...}."""
        if peer.grid and peer.name not in self.choices:
            self.choices[peer.name] = self._choose(peer)
        flags = (*peer.flags, *self.choices.get(peer.tuned_as or peer.name, ()))
        return self._made(peer, self.of(peer.name), flags)

    def _choose(self, peer: Peer) -> tuple[str, ...]:
        """The flags of the grid whose file is best on the validation images."""
        folders = {flags: self.of(f"{peer.name} {' '.join(flags)}") for flags in peer.grid}
        found = {f: self._made(peer, out, (*peer.flags, *f)).get("val", 0.0) for f, out in folders.items()}
        best = max(found, key=lambda flags: found[flags])
        shutil.rmtree(self.of(peer.name), ignore_errors=True)
        shutil.copytree(folders[best], self.of(peer.name))
        return best

    def _made(self, peer: Peer, out: Path, flags: tuple[str, ...]) -> dict[str, Any]:
        before: dict[str, Any] = {}
        if peer.after:
            before = json.loads((self.of(peer.after) / "graded.json").read_text())
            if "problem" in before:
                return _write(out, {"problem": f"no file of {peer.after} to quantize"})
            flags = ("--model", str(self.of(peer.after) / "model.onnx"), *flags)
        made = self.script(peer, out, flags, self._epochs(peer))
        if "problem" in made:
            return _write(out, made)
        if (out / "graded.json").exists() and "problem" not in json.loads((out / "graded.json").read_text()):
            return json.loads((out / "graded.json").read_text())
        figures = {"seconds": made["seconds"] + before.get("seconds", 0.0), **self.grade(out / "model.onnx")}
        passes = self._passes(peer, out) + before.get("passes", 0)
        told = [flag.removeprefix(f"{self.folder}/") for flag in flags]  # the figures are published
        return _write(out, {**figures, "passes": passes, "flags": told})

    def _passes(self, peer: Peer, out: Path) -> int:
        if peer.passes is None:
            rows = json.loads((out / "ledger.json").read_text())["rows"]
            return sum(row["passes"] or 0 for row in rows if row["stage"] != "export")
        steps = len(self.bundle.train) // BATCH
        return steps * self._epochs(peer) * peer.passes

    def _epochs(self, peer: Peer) -> int:
        begin = self.start_epochs if peer.scratch and not peer.after else 0
        return begin + round(peer.times * self.epochs)

    def script(self, peer: Peer, out: Path, flags: Sequence[str], epochs: int) -> dict[str, Any]:
        """Run a peer's script in its environment; what it says of itself, or the problem in one line."""
        signature = {"script": peer.script, "flags": list(flags), "epochs": epochs, "seed": self.seed}
        said, asked = out / "made.json", out / "asked.json"
        if said.exists() and asked.exists() and json.loads(asked.read_text()) == signature:
            return json.loads(said.read_text())
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        python = Path(sys.executable)
        if peer.environment is not None:
            environment = _peer_envs.ensure(peer.environment)
            if environment.python is None:
                return {"problem": f"could not be installed: {environment.problem}"}
            python = environment.python
        arguments = ["--data", self.folder / "given", "--out", out, "--epochs", epochs, "--seed", self.seed, *flags]
        command = [python, "-W", "ignore", "-m", f"benchmarks.peer_scripts.{peer.script}", *arguments]
        print(f"seed {self.seed}: {peer.name} {' '.join(flags)[:60]}", file=sys.stderr, flush=True)
        started = time.monotonic()
        with (out / "log.txt").open("w") as log:
            code = subprocess.run(
                [str(c) for c in command], cwd=ROOT, env=_peer_envs.surroundings(), stdout=log, stderr=subprocess.STDOUT
            ).returncode
        if code or not said.exists():
            return {"problem": _last_words(out / "log.txt")}
        asked.write_text(json.dumps(signature) + "\n")
        print(f"  {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return json.loads(said.read_text())

    def grade(self, path: Path) -> dict[str, Any]:
        """Accuracy of every part through onnxruntime, and the file's bytes."""
        session = open_session(path)
        scores = {name: np.mean([score(session, *s) for s in sets]) for name, sets in self.graded.items()}
        return {**{k: float(v) for k, v in scores.items()}, "bytes": path.stat().st_size}

    def latencies(self, names: Sequence[str], rounds: int) -> dict[str, float]:
        """{row: median ms at batch 1}, one thread, CPU time, every file timed against every other; kept on disk."""
        kept = self.folder / "latency.json"
        files = {name: self.of(name) / "model.onnx" for name in names}
        stamps = {name: path.stat().st_mtime_ns for name, path in files.items()}
        held = json.loads(kept.read_text()) if kept.exists() else {}
        if held.get("files") != stamps:
            timed = latency.measure(files, threads=1, runs=rounds, clock=time.process_time)
            held = {"files": stamps, "ms": {name: row["median_ms"] for name, row in timed.items()}}
            kept.write_text(json.dumps(held, indent=1) + "\n")
        return held["ms"]


def open_session(path: Path) -> ort.InferenceSession:
    """onnxruntime on one thread, as it comes."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def score(session: ort.InferenceSession, x: np.ndarray, y: np.ndarray) -> float:
    """Share of ``x`` that the file gets right, whatever batch size it takes."""
    entry = session.get_inputs()[0]
    size = entry.shape[0] if isinstance(entry.shape[0], int) else BATCH
    correct = 0
    for i in range(0, len(x), size):
        part = x[i : i + size]
        full = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)]) if len(part) < size else part
        logits = np.asarray(session.run(None, {entry.name: full})[0])[: len(part)]
        correct += int((logits.argmax(1) == y[i : i + size]).sum())
    return correct / len(x)


def start_epochs(quick: bool) -> int:
    """Epochs of the float network that everybody starts from."""
    return 2 if quick else START_EPOCHS


def _arrays(images: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = images.__getitems__(list(range(len(images))))
    return x.numpy(), y.numpy()


def _write(out: Path, figures: dict[str, Any]) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    (out / "graded.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _last_words(log: Path) -> str:
    """The last line of a log, or that there was none."""
    words = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return words[-1].replace(str(ROOT), ".")[:200] if words else "it ended without a word"
