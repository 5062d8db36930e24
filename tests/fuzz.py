"""Mutated files of every kind that a verb reads: each must end in a result or in one readable message.

`python -m tests.fuzz --count 20000` prints a table by kind of file and exits 1 on any traceback, crash or hang (more
than 5 seconds of one input). Inputs are made from sound files by damage to their bytes and, where a file has a
structure, by hostile values in it; checksums and hashes are made to fit again half of the time, so that what lies
behind them is reached. Inputs run in forked processes that a parent watches; the same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import select
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz_mutate import Rng, damage, mutated_json, mutated_onnx, mutated_safetensors, twist

os.environ.setdefault("OMP_NUM_THREADS", "1")

HANG = 5.0  # seconds of processor time for one input
PATIENCE = 12  # on a busy machine the clock may run this many times faster
MEMORY = 8 << 30
CHUNK = 500
Most = tuple[float, int]  # seconds of the slowest input, and its index


# ---------------------------------------------------------------------------------------------- targets


class Bench:
    """Sound files, a place to put damaged ones, and one method per kind of file that reads it."""

    def __init__(self, folder: Path, sound: Path) -> None:
        self.folder, self.sound = folder, sound
        self.run = folder / "run"
        shutil.copytree(sound, self.run)

    def put(self, name: str, data: bytes) -> Path:
        path = self.run / name
        path.write_bytes(data)
        return path

    def back(self, *names: str) -> None:
        for name in names:
            self.put(name, (self.sound / name).read_bytes())

    def recipe(self, rng: Rng) -> None:
        from flatcompress.starters import STARTERS

        texts = [(self.sound / "recipe.yaml").read_text(), *STARTERS.values()]
        text = rng.choice(texts)
        if rng.random() < 0.6:
            import yaml

            data = json.dumps(twist(yaml.safe_load(text), rng)).encode()  # JSON is YAML
        else:
            data = damage(text.encode(), rng)
        path = self.folder / "recipe.yaml"
        path.write_bytes(data)
        setting = rng.choice(["seed=1", "stages.0.train.epochs=3", "a.b.c=*x", "stages.99=1", "data=[", "=", "seed"])
        words = ["--set", setting] if rng.random() < 0.2 else []
        command("validate", str(path), "--syntax-only", *words)

    def plan(self, rng: Rng) -> None:
        from flatcompress.plan import Plan, apply_plan
        from tests.tiny_net import build

        names = ["0-train", "1-prune"] + ["2-quantize"] * (rng.random() < 0.15)  # tracing takes long
        name = f"checkpoints/{rng.choice(names)}/plan.json"
        path = self.put(name, mutated_json((self.sound / name).read_bytes(), rng))
        try:
            import torch

            apply_plan(build(10), Plan.load(path), torch.zeros(2, 1, 8, 8))
        finally:
            self.back(name)

    def ledger(self, rng: Rng) -> None:
        self._reported("ledger.json", mutated_json, rng)

    def log(self, rng: Rng) -> None:
        def lines(data: bytes, rng: Rng) -> bytes:
            rows = data.splitlines(keepends=True)
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(len(rows))
                rows[at] = mutated_json(rows[at].strip() or b"{}", rng) + b"\n" if rng.random() < 0.8 else rows[at][:9]
                rows[at] = rows[at] if rows[at].strip() else b"{}\n"
            return b"".join(rows)

        def safe(data: bytes, rng: Rng) -> bytes:
            try:
                return lines(data, rng)
            except ValueError:  # a second change met what the first had broken
                return damage(data, rng)

        self._reported("log.jsonl", safe, rng)

    def run_recipe(self, rng: Rng) -> None:
        self._reported("recipe.yaml", damage, rng)

    def report_certificate(self, rng: Rng) -> None:
        self._reported("certificate.json", mutated_json, rng)

    def _reported(self, name: str, mutate: Callable[[bytes, Rng], bytes], rng: Rng) -> None:
        self.put(name, mutate((self.sound / name).read_bytes(), rng))
        try:
            command("report", str(self.run))
        finally:
            self.back(name)

    def checkpoint(self, rng: Rng) -> None:
        from flatcompress.training import checkpoint

        stage = rng.choice(["0-train", "2-quantize", "middle"])
        stage = next(p.name for p in self.sound.glob("checkpoints/*@*")) if stage == "middle" else stage
        folder = self.run / "checkpoints" / stage
        name = rng.choice([p.name for p in (self.sound / "checkpoints" / stage).iterdir()])
        mutate = mutated_safetensors if name.endswith(".safetensors") else mutated_json
        changed = mutate((self.sound / "checkpoints" / stage / name).read_bytes(), rng)
        self.put(f"checkpoints/{stage}/{name}", changed)
        if rng.random() < 0.6 and name != "manifest.json":
            raw = json.loads((self.sound / "checkpoints" / stage / "manifest.json").read_text())
            raw["files"][name] = {"sha256": hashlib.sha256(changed).hexdigest(), "bytes": len(changed)}
            self.put(f"checkpoints/{stage}/manifest.json", json.dumps(raw).encode())
        try:
            found = checkpoint.load(folder)
            from flatcompress.training.rng import restore_rng

            if isinstance(found.state, dict) and isinstance(found.state.get("rng"), dict):
                restore_rng(found.state["rng"])
        finally:
            self.back(*(f"checkpoints/{stage}/{n}" for n in {name, "manifest.json"}))

    def weights(self, rng: Rng) -> None:
        from flatcompress.models.weights import load_weights
        from tests.tiny_net import build

        data = (self.sound / "checkpoints/0-train/model.safetensors").read_bytes()
        if rng.random() < 0.7:
            path = self.put("weights.safetensors", mutated_safetensors(data, rng))
        else:
            import torch

            buffer = io.BytesIO()
            torch.save(build(10).state_dict(), buffer)
            path = self.put("weights.pt", damage(buffer.getvalue(), rng))
        load_weights(build(10), path)

    def certificate(self, rng: Rng) -> None:
        self._verified("certificate.json", mutated_json, rng)

    def evidence(self, rng: Rng) -> None:
        self._verified("evidence.safetensors", mutated_safetensors, rng)

    def onnx_verify(self, rng: Rng) -> None:
        self._verified("model.onnx", mutated_onnx, rng)

    def _verified(self, name: str, mutate: Callable[[bytes, Rng], bytes], rng: Rng) -> None:
        changed = mutate((self.sound / name).read_bytes(), rng)
        self.put(name, changed)
        if name != "certificate.json" and rng.random() < 0.5:
            raw = json.loads((self.sound / "certificate.json").read_text())
            raw["file" if name == "model.onnx" else "evidence"]["sha256"] = hashlib.sha256(changed).hexdigest()
            self.put("certificate.json", json.dumps(raw).encode())
        try:
            command("verify", str(self.run), *(["--json"] if rng.random() < 0.3 else []))
        finally:
            self.back(name, "certificate.json")

    def onnx_bench(self, rng: Rng) -> None:
        path = self.put("bench.onnx", mutated_onnx((self.sound / "model.onnx").read_bytes(), rng))
        command("bench", str(path), "--runs", "3")


# kind of file -> share of the inputs
TARGETS = {
    "recipe": 0.22,
    "plan": 0.10,
    "ledger": 0.07,
    "log": 0.08,
    "run_recipe": 0.03,
    "report_certificate": 0.06,
    "checkpoint": 0.22,
    "weights": 0.10,
    "certificate": 0.04,
    "evidence": 0.03,
    "onnx_verify": 0.02,
    "onnx_bench": 0.03,
}


class Failed(Exception):
    """A verb answered in a way that it must not."""


def command(*words: str) -> None:
    """Run a verb of the command line in this process; only the exit codes 0, 2 and 3 are answers."""
    from flatcompress.cli import _guarded

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = _guarded(list(words))
    if code not in (0, 2, 3) or "Traceback" in err.getvalue():
        raise Failed(f"exit code {code}: {err.getvalue()[-500:]}")
    if code == 2 and not err.getvalue().strip():
        raise Failed("exit code 2 without a message")


def one(bench: Bench, target: str, index: int, seed: int) -> str:
    """The outcome of one input: answered, refused, or the traceback."""
    from flatcompress.errors import RunError, UserError

    try:
        getattr(bench, target)(random.Random(f"{seed} {target} {index}"))
    except (UserError, RunError) as error:
        return "refused" if str(error).strip() else "an error without a message"
    except BaseException:
        return traceback.format_exc()[-3000:]
    return "answered"


# ---------------------------------------------------------------------------------------------- watching


def work(sound: Path, target: str, first: int, last: int, seed: int, pipe: int) -> None:
    """In a process of its own: inputs ``first`` to ``last``, one line of JSON each into ``pipe``."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        bench = Bench(Path(folder), sound)
        for index in range(first, last):
            started = time.process_time()
            outcome = one(bench, target, index, seed)
            line = json.dumps({"outcome": outcome, "seconds": time.process_time() - started})
            os.write(pipe, line.encode() + b"\n")


def watched(sound: Path, target: str, count: int, seed: int) -> tuple[dict[str, int], list[str], Most]:
    """Run ``count`` inputs of a kind; returns outcomes, what failed, and the longest processor time of one."""
    counts: dict[str, int] = {"answered": 0, "refused": 0, "failed": 0, "hung": 0}
    failures: list[str] = []
    longest, index = (0.0, 0), 0
    while index < count:
        last = min(count, index + CHUNK)
        index, longest = _chunk(sound, target, (index, last), seed, counts, failures, longest)
    return counts, failures, longest


def _chunk(
    sound: Path, target: str, span: tuple[int, int], seed: int, counts: dict[str, int], failures: list[str], most: Most
) -> tuple[int, Most]:
    index, last = span
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            work(sound, target, index, last, seed, writer)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as lines:
        while index < last:
            ready, _, _ = select.select([lines], [], [], HANG * PATIENCE)
            line = lines.readline() if ready else b""
            if not line:
                break
            row = json.loads(line)
            most = max(most, (row["seconds"], index))
            _count(row, f"{target} {index}", counts, failures)
            index += 1
        hung = not ready
        if hung:
            os.kill(child, 9)
        _, status = os.waitpid(child, 0)
    if index < last:
        counts["hung" if hung else "failed"] += 1
        failures.append(f"{target} {index}: {'hung' if hung else f'the process died (status {status})'}")
        index += 1
    return index, most


def _count(row: dict[str, Any], name: str, counts: dict[str, int], failures: list[str]) -> None:
    if row["seconds"] > HANG:
        counts["hung"] += 1
        failures.append(f"{name}: took {row['seconds']:.1f} s")
    elif row["outcome"] in ("answered", "refused"):
        counts[row["outcome"]] += 1
    else:
        counts["failed"] += 1
        failures.append(f"{name}: {row['outcome']}")


def sound_run(folder: Path) -> Path:
    """A finished run folder with a checkpoint in the middle of a stage beside the finished ones."""
    import torch

    from flatcompress.cli import _guarded
    from flatcompress.training import checkpoint
    from flatcompress.training.rng import capture_rng
    from tests.faults import RECIPE
    from tests.tiny_net import build

    (folder / "recipe.yaml").write_text(RECIPE)
    with contextlib.redirect_stdout(io.StringIO()):
        if _guarded(["run", str(folder / "recipe.yaml"), "-o", str(folder / "run"), "--quiet"]) != 0:
            raise SystemExit("the sound run failed")
    found = checkpoint.load(folder / "run/checkpoints/0-train")
    model = build(10)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "rng": capture_rng(), "best": (0.5, model.state_dict()), "epoch": 1}
    checkpoint.save_progress(folder / "run/checkpoints", "4-train", 7, found.plan, found.state_dict, state=state)
    return folder / "run"


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 when every input was answered or refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(TARGETS))
    parser.add_argument("--index", type=int, help="run this one input of --only in this process, for a debugger")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        sound = _made(Path(folder))
        if options.index is not None:
            print(one(Bench(Path(folder) / "one", sound), options.only, options.index, options.seed))
            return 0
        return _table(sound, options)


def _made(folder: Path) -> Path:
    """`sound_run` in a process of its own: this one must not have trained when it forks."""
    from tests.faults import preload

    preload()
    child = os.fork()
    if child == 0:
        try:
            sound_run(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("the sound run could not be made")
    (folder / "one").mkdir()
    return folder / "run"


def _table(sound: Path, options: argparse.Namespace) -> int:
    chosen = {options.only: 1.0} if options.only else TARGETS
    total, failed = 0, []
    print(
        f"{'file':<20}{'inputs':>8}{'answered':>10}{'refused':>9}{'failed':>8}{'hung':>6}{'slowest':>10}{'input':>7}{'seconds':>9}"
    )
    for target, share in chosen.items():
        count, started = max(1, round(share * options.count)), time.monotonic()
        counts, failures, longest = watched(sound, target, count, options.seed)
        total, failed = total + count, failed + failures
        row = "".join(f"{counts[k]:>{w}}" for k, w in (("answered", 10), ("refused", 9), ("failed", 8), ("hung", 6)))
        print(
            f"{target:<20}{count:>8}{row}{longest[0]:>9.2f}s{longest[1]:>7}{time.monotonic() - started:>8.0f}s",
            flush=True,
        )
    print(f"{total} mutated inputs, {len(failed)} tracebacks, crashes or hangs over {HANG:g} s")
    for text in failed[:20]:
        print(f"\n--- {text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
