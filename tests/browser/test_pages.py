"""The report and the comparison as a browser shows them, wide and narrow, light and dark."""

from __future__ import annotations

import sys
from pathlib import Path

import browsing
import pytest

from flatcompress.report import build, compare

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from fabricated_run import write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    with browsing.chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    one, other = write_run(folder / "one", "one"), write_run(folder / "other", "other", seed=1)
    return {"report": build(one), "compare": compare.build([one, other], folder / "compare.html")}


@pytest.fixture
def opened(request, browser, pages):
    name, width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
    page, said = context.new_page(), []
    page.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("request", lambda r: said.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
    page.goto(pages[name].as_uri())
    yield page, said
    context.close()


EVERY = [(name, w, s) for name in ("report", "compare") for w in (1400, 420) for s in ("light", "dark")]


@pytest.mark.parametrize("opened", EVERY, indirect=True, ids=lambda p: "-".join(map(str, p)))
def test_the_page_is_silent_and_no_wider_than_the_screen(opened):
    page, said = opened
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.parametrize("opened", EVERY, indirect=True, ids=lambda p: "-".join(map(str, p)))
def test_axe_finds_nothing_serious_with_everything_unfolded(opened):
    page, _ = opened
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browsing.violations(page) == []


@pytest.mark.parametrize("opened", [("report", 1400, "light"), ("report", 420, "light")], indirect=True, ids=str)
def test_every_table_that_is_cut_off_says_so_and_no_other(opened):
    page, _ = opened
    boxes = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map((b) => [b.scrollWidth > b.clientWidth + 1, "
        "b.classList.contains('more')])"
    )
    assert boxes and all(cut == told for cut, told in boxes)


@pytest.mark.parametrize("opened", [("report", 1400, "light")], indirect=True, ids=str)
def test_a_pointer_over_a_chart_reads_its_values(opened):
    page, _ = opened
    page.locator("#training .plot").first.hover()
    assert "epoch" in page.locator("#tip").inner_text() and "%" in page.locator("#tip").inner_text()


@pytest.mark.parametrize("opened", [("report", 420, "dark")], indirect=True, ids=str)
def test_disorder_in_the_legend_runs_the_way_the_cells_do(opened):
    """In dark mode as in light, the end of the legend's ramp is the fully disordered cell's colour."""
    page, _ = opened
    full = page.evaluate("getComputedStyle(document.querySelector('rect.heat')).fill")
    ramp = page.evaluate("getComputedStyle(document.querySelector('.ramp')).backgroundImage")
    assert ramp.rstrip(")").endswith(full.rstrip(")"))


@pytest.mark.parametrize("opened", [("report", 420, "light")], indirect=True, ids=str)
def test_every_entry_of_the_contents_leads_somewhere(opened):
    page, _ = opened
    targets = page.evaluate("[...document.querySelectorAll('.contents a')].map((a) => a.getAttribute('href'))")
    assert len(targets) > 8
    assert all(page.evaluate(f"document.querySelector('{t}') !== null") for t in targets)
