"""The licence of everything the install brings, and its known vulnerabilities (pip-audit).

Exit code 1 for a licence that is not on the list below or a known vulnerability. Without pip-audit, or where the index
cannot be reached, the second part is skipped with a message: being offline is no finding.
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = "flatcompress"
# Licences under which a permissive package may be used as a dependency, as they are spelt in the wild.
FINE = re.compile(
    r"apache|mit\b|mit-|bsd|isc\b|psf|python software foundation|python-2\.0|mozilla|mpl|unlicense|hpnd|cnri|zlib|0bsd"
    r"|nvidia|intel",  # the runtimes that torch's CUDA and oneDNN builds bring
    re.IGNORECASE,
)
CUDA = re.compile(r"nvidia-.*: .*proprietary.*", re.IGNORECASE)  # and those that do not say whose they are
BSD = "Redistribution and use in source and binary forms"


def dependencies(name: str) -> dict[str, metadata.Distribution]:
    """``name`` and what it needs here, extras left out, by normalised name."""
    found: dict[str, metadata.Distribution] = {}
    open_names = [name]
    while open_names:
        current = re.sub(r"[-_.]+", "-", open_names.pop()).lower()
        if current in found:
            continue
        try:
            found[current] = metadata.distribution(current)
        except metadata.PackageNotFoundError:
            continue  # for another platform or Python
        for line in found[current].requires or []:
            wanted, _, marker = line.partition(";")
            if "extra" not in marker:
                open_names.append(re.split(r"[\s\[(<>=!~]", wanted.strip(), maxsplit=1)[0])
    return found


def licence(distribution: metadata.Distribution) -> str:
    """SPDX expression, else the classifiers, else the first line of the License field, else what the file says."""
    about = distribution.metadata
    if about.get("License-Expression"):
        return str(about["License-Expression"])
    classifiers = [c.rpartition("::")[2].strip() for c in about.get_all("Classifier") or [] if c.startswith("License")]
    if classifiers and classifiers != ["OSI Approved"]:
        return ", ".join(classifiers)
    stated = (about.get("License") or "").strip()
    return stated.splitlines()[0] if stated else _from_file(distribution)


def _from_file(distribution: metadata.Distribution) -> str:
    for file in distribution.files or []:
        if re.match(r"(licen[cs]e|copying)", Path(str(file)).name, re.IGNORECASE):
            text = file.read_text() or ""
            if BSD in " ".join(text.split()):
                return "BSD (by its licence file)"
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return lines[0] if lines else "unknown"
    return "unknown"


def licences() -> int:
    """Print the list; returns how many are not fine."""
    bad = 0
    for name, distribution in sorted(dependencies(ROOT).items()):
        found = licence(distribution)
        fine = bool(FINE.search(found) or CUDA.fullmatch(f"{name}: {found}"))
        bad += not fine
        print(f"{'  ' if fine else '! '}{name:<28}{distribution.version:<16}{found[:80]}")
    print(f"{bad} licences to look at" if bad else "every licence is permissive")
    return bad


def vulnerabilities() -> int:
    """Run pip-audit over what is installed; returns how many packages have a known vulnerability."""
    tool = shutil.which("pip-audit", path=str(Path(sys.executable).parent)) or shutil.which("pip-audit")
    if tool is None:
        print("pip-audit: skipped, it is not installed (pip install pip-audit)")
        return 0
    folder = str(Path(metadata.distribution("torch").locate_file("")))
    command = [tool, "--progress-spinner", "off", "--format", "json", "--timeout", "15", "--path", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        rows = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"pip-audit: skipped, the index cannot be reached ({reason[:200]})")
        return 0
    audited = [row for row in rows if "skip_reason" not in row]
    if not audited:
        print(f"pip-audit: skipped, the index here has advisories for none of the {len(rows)} packages")
        return 0
    bad = [row for row in audited if row["vulns"]]
    for row in bad:
        print(f"! {row['name']} {row['version']}: {', '.join(v['id'] for v in row['vulns'])}")
    print(f"pip-audit: {len(audited)} packages audited, {len(bad)} with known vulnerabilities")
    return len(bad)


if __name__ == "__main__":
    sys.exit(1 if licences() + vulnerabilities() else 0)
