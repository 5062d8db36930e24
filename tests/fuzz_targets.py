"""Every kind of file that a verb reads: how a damaged one is made, and what reads it."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from flatcompress.errors import UserError
from tests.fuzz_mutate import Rng, damage, mutated_json, mutated_onnx, mutated_safetensors, twist

# kind of file -> share of the inputs
TARGETS = {
    "recipe": 0.18,
    "plan": 0.10,
    "ledger": 0.07,
    "log": 0.08,
    "run_recipe": 0.03,
    "report_certificate": 0.06,
    "checkpoint": 0.21,
    "weights": 0.10,
    "certificate": 0.04,
    "evidence": 0.03,
    "onnx_verify": 0.02,
    "onnx_bench": 0.03,
    "images": 0.03,
    "idx": 0.02,
}
# The kinds of file by their everyday names, and the targets that read one of them.
KINDS = {
    "recipes": ("recipe", "run_recipe"),
    "plans": ("plan",),
    "ledgers": ("ledger",),
    "checkpoints": ("checkpoint",),
    "certificates": ("certificate", "report_certificate", "evidence"),
    "ONNX files": ("onnx_verify", "onnx_bench"),
    "logs": ("log",),
    "weights": ("weights",),
    "images": ("images", "idx"),
}


class Failed(Exception):
    """A verb answered in a way that it must not."""


def command(*words: str) -> None:
    """Run a verb of the command line in this process; only the exit codes 0, 2 and 3 are answers."""
    from flatcompress.cli.app import _guarded

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = _guarded(list(words))
    if code not in (0, 2, 3) or "Traceback" in err.getvalue():
        raise Failed(f"exit code {code}: {err.getvalue()[-500:]}")
    if code == 2 and not err.getvalue().strip():
        raise Failed("exit code 2 without a message")
    if code == 2:
        raise UserError(err.getvalue())


class Bench:
    """Sound files, a place to put damaged ones, and one method per kind of file that reads it."""

    def __init__(self, folder: Path, sound: Path) -> None:
        self.folder, self.sound = folder, sound
        self.run = folder / "run"
        self.last = ""  # the last file that was changed, for a message
        shutil.copytree(sound, self.run)

    def put(self, name: str, data: bytes) -> Path:
        path = self.run / name
        path.write_bytes(data)
        self.last = f"{name}: {data[:2000]!r}"
        return path

    def back(self, *names: str) -> None:
        for name in names:
            (self.run / name).write_bytes((self.sound / name).read_bytes())

    def recipe(self, rng: Rng) -> None:
        from flatcompress.cli.templates import STARTERS

        texts = [(self.sound / "recipe.yaml").read_text(), *STARTERS.values()]
        text = rng.choice(texts)
        if rng.random() < 0.6:
            import yaml

            data = json.dumps(twist(yaml.safe_load(text), rng)).encode()  # JSON is YAML
        else:
            data = damage(text.encode(), rng)
        path = self.folder / "recipe.yaml"
        path.write_bytes(data)
        self.last = f"recipe: {data[:2000]!r}"
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
        from flatcompress.store import checkpoint

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
            from flatcompress.randomness import restore

            if isinstance(found.state, dict) and isinstance(found.state.get("rng"), dict):
                restore(found.state["rng"])
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

    def images(self, rng: Rng) -> None:
        from flatcompress import data

        root = self._image_folder()
        files = sorted(root.rglob("*.*"))
        sound = {path: path.read_bytes() for path in rng.sample(files, rng.randint(1, 3))}
        try:
            for path, content in sound.items():  # Hypothesis may end an input at any draw
                path.write_bytes(damage(content, rng))
            policy = rng.choice(("error", "skip"))
            options = {"size": 8, "channels": rng.choice((1, 3)), "corruptions": "none", "corrupted_count": 4}
            data.load("folder", path=str(root), on_bad_sample=policy, **options)
        finally:
            for path, content in sound.items():
                path.write_bytes(content)

    def _image_folder(self) -> Path:
        """Two classes of eight small images in as many formats as Pillow writes everywhere."""
        from PIL import Image

        root = self.folder / "images"
        for i in range(16) if not root.exists() else ():
            place = root / ("cat", "dog")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            kind = ("png", "jpeg", "bmp", "gif", "png", "tiff", "webp", "jpeg")[i // 2]
            picture = Image.frombytes("L", (12, 10), random.Random(i).randbytes(120))
            (picture if i % 3 else picture.convert("RGB")).save(place / f"{i}.{kind}")
        return root

    def idx(self, rng: Rng) -> None:
        from flatcompress import data

        root = self.folder / "mnist"
        root.mkdir(exist_ok=True)
        for part in ("train", "t10k"):
            n = 40
            images = b"\x00\x00\x08\x03" + b"".join(v.to_bytes(4, "big") for v in (n, 6, 6)) + bytes(range(36)) * n
            labels = b"\x00\x00\x08\x01" + n.to_bytes(4, "big") + bytes(i % 10 for i in range(n))
            (root / f"{part}-images-idx3-ubyte").write_bytes(images)
            (root / f"{part}-labels-idx1-ubyte").write_bytes(labels)
        path = root / rng.choice(sorted(p.name for p in root.iterdir()))
        content = path.read_bytes()
        if rng.random() < 0.2:
            path.unlink()
            path = path.with_name(path.name + ".gz")
            content = gzip.compress(content)
        path.write_bytes(damage(content, rng))
        try:
            data.load("mnist", path=str(root), size=8, corruptions="none", corrupted_count=4)
        finally:
            path.unlink()
