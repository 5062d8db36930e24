"""What a run looked like: one HTML file that opens offline, and the tables and progress of the terminal.

This package reads a run folder's files and events, never live objects, and imports nothing named in them: a report of
a stranger's run folder can at worst be ugly.
"""

from __future__ import annotations

from flatcompress.report import card, compare, examples, sbom
from flatcompress.report.gather import gather
from flatcompress.report.page import build

__all__ = ["build", "card", "compare", "examples", "gather", "sbom"]
