"""Kill a run at random moments, resume it each time, and compare what comes out with an undisturbed run.

`python -m tests.faults --kills 200` prints a table and exits 1 when a stage was lost or a bit differs. The recipe has
all four stages on a tiny model; every attempt is a process of its own, killed by SIGKILL. The processes are forked
from one that has done the imports, so that the kills strike the run and not Python's start.

`python -m tests.faults --every-call` puts a fault at every single system call instead: see tests/faults_calls.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

RECIPE = """
name: tiny
seed: 3
device: cpu
threads: 1
checkpoint_every: 1
data:
  {name: rotated-digits, held_out: "75", domains: ["0"], size: 8, batch_size: 128, test_fraction: 0.5,
   corruptions: [contrast/3], corrupted_count: 64}
model: {name: "tests.tiny_net:build"}
stages:
  - train:    {method: sam, rho: 0.05, epochs: 1}
  - prune:    {method: adasap, ratio: 0.4, epochs: 2, schedule_steps: 2}
  - quantize: {method: gaqat, weight_bits: 4, activation_bits: 4, epochs: 2, K: 3}
  - export:   {profile: packed, latency: false}
"""
PRELOADED = (
    *("flatcompress.pipeline", "flatcompress.cli.commands", "flatcompress.session", "flatcompress.report"),
    *("sklearn.datasets", "onnxruntime", "brevitas.nn", "torch_pruning", "torch.export", "torch._dynamo"),
)
# What a clock says differs from run to run; the hash of a file that holds such figures differs with them.
VOLATILE = {"seconds", "latency_ms", "latency", "time", "faster", "load_ms"}


def attempt(recipe: Path, folder: Path, kill_after: float | None, output: Path) -> int | None:
    """Run the recipe in a process of its own; None when it was killed, else its exit code."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            with open(output, "ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            from flatcompress.cli.app import _guarded

            code = _guarded(["run", str(recipe), "-o", str(folder), "--quiet"])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)  # it may have ended by itself a moment before
            code = os.waitstatus_to_exitcode(status)
            return None if code < 0 else code
        time.sleep(0.002)


def fingerprint(folder: Path) -> dict[str, str]:
    """A digest per thing that must be the same in every run: file name -> SHA-256, clocks left out."""
    found = {name: _sha256((folder / name).read_bytes()) for name in ("model.onnx", "evidence.safetensors")}
    for name in ("ledger.json", "certificate.json"):
        found[name] = _digest(json.loads((folder / name).read_text()))
    for path in sorted((folder / "checkpoints").rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in ("manifest.json", ".lock") or path.is_dir():
            found.setdefault(name, "")
        elif path.suffix == ".json":
            found[name] = _digest(json.loads(path.read_text()))
        else:
            found[name] = _sha256(path.read_bytes())
    return found


def finished_stages(folder: Path) -> int:
    """How many stages the folder says are done: those that the pointer to the newest checkpoint has reached.

    A stage's folder that nothing points to yet was killed before it was finished, and is made again.
    """
    try:
        latest = (folder / "checkpoints" / "latest").read_text().strip()
    except OSError:
        return 0
    stage, _, step = latest.partition("@")
    return (int(stage.partition("-")[0]) + (not step)) if stage else 0


def where(folder: Path) -> str:
    """What the run was doing, as its log says."""
    try:
        lines = (folder / "log.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return "start"
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["event"] == "run":
            return "start"
        if event["event"] == "row":
            return f"end of {event['stage']}"
        return str(event.get("stage") or "report")
    return "start"


def plain(value: Any) -> Any:
    """Nested data without what a clock says."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in VOLATILE}
    return [plain(v) for v in value] if isinstance(value, list) else value


def _digest(value: Any) -> str:
    return _sha256(json.dumps(plain(value), sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Campaign:
    """Runs killed until ``kills`` are done; counts what was lost and what differs."""

    def __init__(self, folder: Path, recipe: str = RECIPE, seed: int = 0) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(recipe)
        self.random = random.Random(seed)
        self.kills = self.lost = self.runs = self.failed = 0
        self.places: Counter[str] = Counter()
        self.different: list[str] = []
        self.reference: dict[str, str] = {}
        self.duration = 0.0

    def undisturbed(self) -> None:
        """The run that all others must equal."""
        started = time.monotonic()
        code = attempt(self.recipe, self.folder / "reference", None, self.folder / "reference.out")
        if code != 0:
            raise SystemExit(f"the undisturbed run failed ({code}):\n{(self.folder / 'reference.out').read_text()}")
        self.duration = time.monotonic() - started
        self.reference = fingerprint(self.folder / "reference")

    def run(self, kills: int, show: Callable[[str], None] = print) -> None:
        """Kill and resume until ``kills`` kills are done and the last run has finished."""
        while self.kills < kills:
            self.runs += 1
            path = self.folder / f"run{self.runs}"
            before = self.kills
            code = self._one(path, kills)
            self.failed += code != 0
            changed = self._differences(path) if code == 0 else [f"exit code {code}"]
            self.different += [f"run {self.runs}: {what}" for what in changed]
            verdict = "identical" if not changed else ", ".join(changed[:4])
            show(f"run {self.runs:>3}  kills {self.kills - before:>3}  total {self.kills:>4}  {verdict}")
            if not changed:
                shutil.rmtree(path)

    def _one(self, path: Path, kills: int) -> int:
        output = self.folder / f"{path.name}.out"
        tries = 0
        while True:
            done, said = finished_stages(path), len(_firsts(path))
            share = self.random.random() * (0.8 + 0.2 * tries)  # so that every run comes to its end
            tries += 1
            code = attempt(self.recipe, path, share * self.duration if self.kills < kills else None, output)
            firsts = _firsts(path)[said:]  # empty when it was killed before it said where it begins
            self.lost += sum(max(0, done - first) for first in firsts)
            if code is not None:
                return code
            self.kills += 1
            self.places[where(path)] += 1

    def _differences(self, path: Path) -> list[str]:
        found = fingerprint(path)
        return [
            name for name in sorted(found.keys() | self.reference.keys()) if found.get(name) != self.reference.get(name)
        ]

    def table(self) -> str:
        """Where the kills struck, and the verdict."""
        rows = [f"{place:<20} {count:>5}" for place, count in sorted(self.places.items())]
        return "\n".join(
            [
                f"{'killed during':<20} {'kills':>5}",
                *rows,
                f"{'all':<20} {self.kills:>5}",
                f"runs {self.runs}, failed {self.failed}, lost stages {self.lost}, differences {len(self.different)}",
                f"undisturbed run: {self.duration:.1f} s, {len(self.reference)} files compared",
            ]
        )

    @property
    def sound(self) -> bool:
        """No stage lost, no run failed, no bit different."""
        return not (self.lost or self.failed or self.different)


def _firsts(path: Path) -> list[int]:
    """The stage at which each attempt so far began, as its log says."""
    try:
        lines = (path / "log.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [json.loads(line)["first"] for line in lines if line.startswith('{"event": "run"') and line.endswith("}")]


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 when nothing was lost and nothing differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="FOLDER", help="work here and leave the runs that differ")
    parser.add_argument("--every-call", action="store_true", help="a fault at every system call instead of kills")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="with --every-call: only N faults")
    options = parser.parse_args(arguments)
    if options.every_call:
        from tests import faults_calls

        words = sys.argv[1:] if arguments is None else arguments
        return faults_calls.main(words, options.sample, options.seed)
    preload()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or temporary
        campaign = Campaign(Path(folder), seed=options.seed)
        campaign.undisturbed()
        campaign.run(options.kills, lambda line: print(line, flush=True))
        print(campaign.table())
        print("\n".join(campaign.different[:50]))
        if not campaign.sound:
            for path in sorted(Path(folder).glob("*.out")):
                if text := path.read_text(errors="replace").strip():
                    print(f"--- {path.name}\n{text[-2000:]}")
    return 0 if campaign.sound else 1


def preload() -> None:
    """Import what a run imports, once, before the processes are forked."""
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())
