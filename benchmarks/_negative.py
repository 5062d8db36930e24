"""docs/results/what-did-not-work.md: every claim that the results on disk refute, by figure."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "results" / "what-did-not-work.md"
HEAD = """# What did not work

Claims that our own runs refute, collected from `benchmarks/results/*.json` whenever a benchmark that trains has run. A
line leaves this page when a run says otherwise, and in no other way.
"""


def refuted(results: Path = RESULTS) -> dict[str, list[str]]:
    """{benchmark: refuted claims} of every full run."""
    found = {}
    for path in sorted(results.glob("*.json")):
        if path.stem.endswith("-quick"):
            continue
        claims = json.loads(path.read_text()).get("claims", [])
        missed = [text for text in claims if text.startswith("DOES NOT HOLD")]
        if missed:
            found[path.stem] = missed
    return found


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write the page."""
    lines = [HEAD]
    for name, claims in refuted(results).items():
        lines += [f"## [{name}]({name}.md)", "", *[f"- {c.removeprefix('DOES NOT HOLD: ')}" for c in claims], ""]
    if len(lines) == 1:
        lines.append("Nothing so far.\n")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines))
