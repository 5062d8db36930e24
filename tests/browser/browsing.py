"""A headless Chromium for the tests of pages, and axe-core where there is one; a test without them is skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips where Playwright (the extra browser) or a Chromium is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra browser: pip install '.[browser]'")
    path = os.environ.get("CHROMIUM") or next((p for p in map(shutil.which, NAMES) if p), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium here: install one, or set CHROMIUM to its path ({str(error).splitlines()[0]})")
        yield browser
        browser.close()


def npm_package(name: str) -> Path | None:
    """The folder of an npm package: below NPM_PACKAGES, or node_modules of this folder or one above."""
    given = os.environ.get("NPM_PACKAGES")
    places = [Path(given)] if given else [p / "node_modules" for p in (Path.cwd(), *Path.cwd().parents)]
    return next((p / name for p in places if (p / name / "package.json").is_file()), None)


def violations(page: Any) -> list[str]:
    """Serious and critical findings of axe-core on an open page; skips where the npm package axe-core is missing."""
    package = npm_package("axe-core")
    if package is None:
        pytest.skip("needs the npm package axe-core: npm install axe-core, or set NPM_PACKAGES to its node_modules")
    page.add_script_tag(content=(package / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in found if v["impact"] in ("serious", "critical")]
