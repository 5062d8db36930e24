"""A fault at every single system call that changes a run's folder, and the run gone on with after each.

`python -m tests.faults --every-call` makes an undisturbed run of three stages (train, prune, export) and lists the
calls by which it changes its folder: open, write, fsync, rename, unlink, mkdir, rmdir, ftruncate, whoever makes them
(the checkpoints, the log, the lock, the ONNX writer, the report). Then it puts every fault at every call and goes on
from what is left: "no space left" and "input/output error" in a run of their own each (a failing write leaves half of
its bytes), "killed" and "killed in a write" from a copy of the folder as it stood at that call, which is what a killed
process leaves, and one run in which every write is a short one. The faults are put in below Python, by a shim that a
C compiler builds on the spot.

A folder that equals one that was gone on from already is not gone on from again: what comes next depends on it alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from tests.faults import fingerprint, plain, preload

HERE = Path(__file__).parent
MARK = "FLATCOMPRESS_FAULTY_CALLS"
NAMES = {"o": "open", "w": "write", "f": "fsync", "r": "rename", "u": "unlink", "m": "mkdir", "d": "rmdir", "t": "cut"}
FAILING = {"no space left": 1, "input/output error": 2}  # and their numbers in the shim
SHORT, PAUSES = 3, 4
KILLED, TORN, SHORTS = "killed before the call", "killed in the write", "all writes short"
SAID = {"no space left": "No space left on device", "input/output error": "Input/output error"}
UNTOLD = {".lock", ".lock-owner.json", "report.html"}  # hold clocks and process numbers alone, or are made anew


def reexecuted(arguments: list[str]) -> int | None:
    """None in a process that has the shim; else the exit code of this command run again under it."""
    if os.environ.get(MARK):
        return None
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        print("skipped: the shim needs Linux and a C compiler")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "faulty_calls.so"
        words = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "faulty_calls.c"), "-ldl"]
        subprocess.run(words, check=True)
        environment = os.environ | {MARK: "1", "LD_PRELOAD": str(library)}
        return subprocess.run([sys.executable, "-m", "tests.faults", *arguments], env=environment).returncode


class Shim:
    """The library that this process was started under."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.faulty_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
        self._library.faulty_calls.restype = ctypes.c_long

    def arm(self, folder: Path, at: int, fault: int) -> None:
        """From now on count the calls below ``folder``; the ``at``-th (from 0) meets the fault."""
        self._library.faulty_arm(os.fsencode(folder), at, fault)

    def calls(self) -> str:
        """A letter for each call so far (see NAMES)."""
        buffer = ctypes.create_string_buffer(100_000)
        count = self._library.faulty_calls(buffer, ctypes.c_long(len(buffer)))
        return buffer.raw[:count].decode()


def prepared() -> Callable[[Path], None]:
    """A function that makes the run in a folder; its data and imports are there before a process is forked."""
    sys.path[:0] = [str(HERE)]  # as the test suite has it
    import small_runs

    import flatcompress.pipeline as pipeline
    from flatcompress.data import preview

    preload()
    pipeline.measure = lambda work, stage, method, seconds, passes, flatness=True: {  # type: ignore[assignment]
        "stage": stage, "method": method, "accuracy": {}, "passes": passes, "seconds": seconds,
    }  # fmt: skip
    pipeline.dry_run = lambda work, stages: None  # type: ignore[assignment]
    preview.sheet(small_runs.bundle())  # draws with a font, which is loaded once
    stages = (
        {"train": {"method": "sam", "epochs": 1, "averaging": "ema"}},
        {"prune": {"method": "magnitude", "ratio": 0.4, "epochs": 1, "schedule_steps": 1}},
        {"export": {"profile": "float32", "latency": False}},
    )

    def run(folder: Path) -> None:
        small_runs.pipeline(*stages, checkpoint_every=2, batch_size=200).run(folder)

    return run


class EveryCall:
    """The runs with a fault, what became of them, and what became of the runs that went on."""

    def __init__(self, folder: Path, run: Callable[[Path], None]) -> None:
        self.folder, self.run, self.shim = folder.resolve(), run, Shim()
        self.path = self.folder / "run"
        self.reference: dict[str, str] = {}
        self.calls = ""
        self.known: dict[str, str] = {}
        self.table: dict[str, Counter[str]] = {fault: Counter() for fault in (*FAILING, SHORTS, KILLED, TORN)}
        self.wrong: list[str] = []

    def undisturbed(self) -> None:
        """The run that all others must equal, and its calls."""
        code, said = self._ended(self._begun(self.path, -1, 0, counted=self.folder / "calls"))
        if code != 0:
            raise SystemExit(f"the undisturbed run failed ({code}):\n{said}")
        self.calls = (self.folder / "calls").read_text()
        self.reference = fingerprint(self.path)

    def failing(self, fault: str, at: int) -> None:
        """The run with an error at call ``at``, and the run that goes on."""
        shutil.rmtree(self.path, ignore_errors=True)
        code, said = self._ended(self._begun(self.path, at, FAILING[fault]))
        outcome = {0: "finished", 2: "refused", 3: "refused"}.get(code, "crashed")
        name = f"{fault} at call {at} ({NAMES[self.calls[at]]})"
        if outcome == "crashed" or (outcome == "refused" and SAID[fault] not in said):
            self.wrong.append(f"{name}: exit code {code}: {said[-1500:]}")
        self._judge(fault, outcome, name, self.path)

    def short_writes(self) -> None:
        """The run in which every write takes half of what it was given."""
        shutil.rmtree(self.path, ignore_errors=True)
        code, said = self._ended(self._begun(self.path, -1, SHORT))
        if code != 0:
            self.wrong.append(f"{SHORTS}: exit code {code}: {said[-1500:]}")
        self.table[SHORTS]["faults"] = self.calls.count("w") - 1
        self._judge(SHORTS, "finished" if code == 0 else "crashed", SHORTS, self.path)

    def killed(self, chosen: Container[int]) -> None:
        """What a run killed at each of the ``chosen`` calls leaves behind, and the runs that go on from there."""
        shutil.rmtree(self.path, ignore_errors=True)
        child = self._begun(self.path, -1, PAUSES)
        copy = self.folder / "copy"
        for at, letter in enumerate(self.calls):
            for fault in (KILLED, TORN) if letter == "w" else (KILLED,):
                _, status = os.waitpid(child, os.WUNTRACED)
                if not os.WIFSTOPPED(status):
                    raise SystemExit(f"the run ended at call {at}; it has {len(self.calls)} when it is let run")
                if at in chosen:
                    shutil.rmtree(copy, ignore_errors=True)
                    if self.path.exists():
                        shutil.copytree(self.path, copy)
                    self._judge(fault, "killed", f"{fault} {at} ({NAMES[letter]})", copy)
                os.kill(child, signal.SIGCONT)
        self._ended(child)

    def _judge(self, fault: str, outcome: str, name: str, path: Path) -> None:
        row = self.table[fault]
        row["faults"] += 1
        row[outcome] += 1
        state = digest(path)
        if state not in self.known:
            self.known[state] = self._gone_on(path)
            row["gone on"] += 1
        if self.known[state]:
            row["lost"] += 1
            self.wrong.append(f"{name}: {self.known[state]}")

    def _gone_on(self, path: Path) -> str:
        code, said = self._ended(self._begun(path, -1, 0))
        if code != 0:
            return f"cannot be gone on with: exit code {code}: {said[-1500:]}"
        found = fingerprint(path)
        names = sorted(found.keys() | self.reference.keys())
        changed = [name for name in names if found.get(name) != self.reference.get(name)]
        return f"ends in other bits: {', '.join(changed)}" if changed else ""

    def _begun(self, path: Path, at: int, fault: int, counted: Path | None = None) -> int:
        """The run in a process of its own; its number."""
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            with open(self._output(os.getpid()), "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            self.shim.arm(path, at, fault)
            code = _exit_code(self.run, path)
            if counted is not None:
                counted.write_text(self.shim.calls())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _ended(self, child: int) -> tuple[int, str]:
        """The exit code of a process (negative when killed), and what it said."""
        _, status = os.waitpid(child, 0)
        said = self._output(child).read_text(errors="replace")
        self._output(child).unlink()
        return os.waitstatus_to_exitcode(status), said

    def _output(self, child: int) -> Path:
        return self.folder / f"said{child}"

    def summary(self) -> str:
        """A row per fault, and the verdict."""
        kinds = Counter(NAMES[letter] for letter in self.calls)
        columns = ("faults", "finished", "refused", "killed", "crashed", "gone on", "lost")
        rows = [f"{fault:<24}" + "".join(f"{row[c]:>10}" for c in columns) for fault, row in self.table.items()]
        total = sum(row["faults"] for row in self.table.values())
        return "\n".join(
            [
                f"{len(self.calls)} calls change the folder: {', '.join(f'{n} {k}' for k, n in kinds.most_common())}",
                f"{'fault':<24}" + "".join(f"{c:>10}" for c in columns),
                *rows,
                f"{total} faults, {len(self.known)} different folders gone on from, {len(self.wrong)} wrong",
            ]
        )


def _exit_code(run: Callable[[Path], None], path: Path) -> int:
    from flatcompress.errors import RunError, UserError

    try:
        run(path)
    except (UserError, RunError) as error:
        print(error)
        return 3 if isinstance(error, RunError) else 2
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def digest(folder: Path) -> str:
    """What a folder holds as far as a run that goes on can tell: clocks and process numbers left out."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        name = re.sub(r"-\d+", "-N", str(path.relative_to(folder))) if ".tmp-" in str(path) else path.name
        if path.name not in UNTOLD:
            found.update(f"{path.parent.relative_to(folder)}/{name}\0".encode())
            found.update(_content(path) if path.is_file() else b"folder")
    return found.hexdigest()


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name == "manifest.json":  # sums of files that hold clocks: do they fit?
        try:
            listed = json.loads(data)["files"].items()
            return repr([(n, _fits(path.with_name(n), row["sha256"])) for n, row in listed]).encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            return data
    if path.suffix == ".jsonl":
        return b"\n".join(_timeless(line) for line in data.split(b"\n"))
    return _timeless(data) if path.suffix == ".json" else data


def _fits(path: Path, expected: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == expected


def _timeless(text: bytes) -> bytes:
    try:
        value: Any = plain(json.loads(text))
    except ValueError:
        return text
    return json.dumps(value, sort_keys=True).encode()


def main(arguments: list[str], sample: int, seed: int) -> int:
    """Faults at every call, or at ``sample`` of them; 0 when every run could be gone on with to the same bits."""
    code = reexecuted(arguments)
    if code is not None:
        return code
    run = prepared()
    with tempfile.TemporaryDirectory() as folder:
        campaign = EveryCall(Path(folder), run)
        campaign.undisturbed()
        calls = range(len(campaign.calls))
        chosen = sorted(random.Random(seed).sample(calls, sample)) if sample else calls
        campaign.killed(chosen)
        print(f"killed at {len(chosen)} calls: {len(campaign.known)} different folders", flush=True)
        campaign.short_writes()
        for fault in FAILING:
            for at in chosen:
                campaign.failing(fault, at)
                if not sample and at % 50 == 49:
                    print(f"{fault}: call {at + 1} of {len(calls)}, {len(campaign.wrong)} wrong", flush=True)
        print(campaign.summary())
        print("\n".join(f"\n--- {text}" for text in campaign.wrong[:20]))
    return 1 if campaign.wrong else 0
