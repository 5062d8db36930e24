"""An environment of its own for every peer, made once with the ordinary pip, at versions that were tried.

    python -m benchmarks._peer_envs [NAME ...]      makes them (a gigabyte each: every one holds a torch)

They lie in ``.venv-peers/NAME``. One that cannot be made is reported with pip's reason; the benchmark says so in the
peer's row and goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-peers"
BASE = ("torch==2.13.*", "numpy>=1.26", "onnx==1.23.2", "onnxscript==0.7.2", "safetensors>=0.4.5")
PACKAGES = {
    "onnxruntime": (*BASE, "onnxruntime==1.31.1", "sympy"),
    "brevitas": (*BASE, "brevitas==0.13.4", "onnxoptimizer==0.4.2"),
    "torch-pruning": (*BASE, "torch-pruning==1.6.1"),
    "nncf": (*BASE, "nncf==3.4.0", "torchao==0.18.0"),  # nncf.strip imports torchao
    # Quark and onnxruntime 1.28 read no newer files than onnx 1.22's
    "quark": ("torch==2.13.*", "numpy>=2.0", "onnx==1.22.0", "onnxruntime==1.28.*", "amd-quark==0.13"),
    "inc": (*BASE, "neural-compressor-pt==3.10", "torchao==0.18.0"),
    "torchao": (*BASE, "torchao==0.18.0"),
    "pytorch-optimizer": (*BASE, "torch-pruning==1.6.1", "pytorch_optimizer==4.1.0"),
    "emx": ("emx-onnx-cgen==1.4.0",),  # no torch: it reads ONNX and writes C
}
# NNCF compiles an extension where it is first used: a part of its installation, not of anybody's training.
AFTERWARDS = {
    "nncf": "import torch; from nncf.torch.quantization.extensions import QuantizedFunctionsCPU as made; "
    "made.get('Quantize_forward')"
}


@dataclass(frozen=True)
class Environment:
    """``python`` to run a peer with, or ``problem``: why there is none."""

    python: Path | None
    problem: str = ""


def ensure(name: str) -> Environment:
    """The environment ``name``, made if it is not there yet; one whose pins changed is installed again."""
    folder = FOLDER / name
    python, done = folder / "bin" / "python", folder / "installed.json"
    wanted = list(PACKAGES[name])
    if done.exists() and json.loads(done.read_text())["wanted"] == wanted:
        return Environment(python)
    print(f"making {folder.relative_to(ROOT)}: {' '.join(wanted)}", file=sys.stderr, flush=True)
    try:
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", *wanted])
        if name in AFTERWARDS:
            _run([str(python), "-c", AFTERWARDS[name]])
        versions = _run([str(python), "-m", "pip", "list", "--format=freeze"]).split()
    except (OSError, subprocess.CalledProcessError) as error:
        return Environment(None, _reason(error))
    done.write_text(json.dumps({"wanted": wanted, "versions": versions}, indent=1) + "\n")
    return Environment(python)


def installed(name: str) -> list[str]:
    """``package==version`` of what the environment ``name`` holds; nothing where there is none."""
    done = FOLDER / name / "installed.json"
    return json.loads(done.read_text())["versions"] if done.exists() else []


def surroundings() -> dict[str, str]:
    """Environment variables for a peer: one thread, this checkout's modules, no time-out on NNCF's compiler."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "NNCF_EXTENSION_LOAD_TIMEOUT": "0", "PYTHONPATH": str(ROOT)}


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, env=surroundings()).stdout


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    """The last line that says ERROR, without addresses."""
    text = str(getattr(error, "stderr", "") or error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])[:200]


def main(names: list[str]) -> int:
    """Make the environments ``names`` (all); 1 where one could not be made."""
    found = {name: ensure(name) for name in names or PACKAGES}
    for name, environment in found.items():
        print(f"{name}: {environment.problem or environment.python}")
    return int(any(e.python is None for e in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
