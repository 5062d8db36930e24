"""Every benchmark, one after the other: ``python -m benchmarks [--quick] [--check] [--only NAME ...]``.

Each runs in a process of its own, so that none warms another's caches or inherits its threads. Exit code 1 where a
benchmark missed a target under ``--check`` or could not run; the others are still run. One that says that it lacks its
data (exit code 2) is left out and named.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def names() -> list[str]:
    """The benchmarks: every public module of this folder."""
    return sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_"))


def main(argv: list[str] | None = None) -> int:
    """Run them; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the short form of each")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), help="which (default: all)")
    options = parser.parse_args(argv)
    flags = [flag for flag in ("--quick", "--check") if getattr(options, flag[2:])]
    failed: list[str] = []
    left_out: list[str] = []
    for name in options.only:
        print(f"\n== {name} {' '.join(flags)}", flush=True)
        start = time.monotonic()
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags], cwd=HERE.parent).returncode
        if code:
            (left_out if code == 2 else failed).append(name)
        print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
    if left_out:
        print(f"\nleft out, each said what it needs: {', '.join(left_out)}")
    if failed:
        print(f"\nfailed or missed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
