from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import random
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise

import fabricated_run
import pytest
from fabricated_run import write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flatcompress import storage
from flatcompress.errors import RunError, UserError
from flatcompress.report import build, costs, curves, examples, gather, said
from flatcompress.report.numbers import duration

ATTACK = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>"
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """The page as a browser reads it; raises when tags are not nested properly."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.scripts = ""
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts += data
        elif self.open and self.open[-1] != "style":
            self.text += data


def page_of(folder) -> Page:
    return Page(build(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "quickstart")


@pytest.fixture(scope="module")
def html(run):
    return build(run).read_text(encoding="utf-8")


def test_the_page_shows_every_part(html):
    text = Page(html).text
    for words in ("quickstart", "Certificate holds", "14.2 × smaller", "97.9 %", "0.162 ms", "From stage to stage",
                  "Channels kept", "Scale-gradient conflict", "stage2.0.conv2", "gaussian_noise", "QLinearConv",
                  "all 540 samples", "9f86d081884c", "method: gaqat", "weights in theory", "fc has no following layer",
                  "it makes the classes", "plan of 2-quantize", "“75”", "W4A4 in 8 of 10 layers", "Bits and flatness",
                  "a budget of 4 bits per weight: 4 at 3 bits, 3 at 4 bits, 3 at 5 bits", "loss by 0.01",
                  "digit 3", "right in float, wrong in the file", "most confident mistakes",
                  "1 of 10 layers compute in floats",
                  "0.346 ms", "0.210 ms", "as a float32 file", "sharpness of each layer", "no disorder to much",
                  "The whole certificate"):  # fmt: skip
        assert words in text, words
    assert Page(html).tags.count("figure") == 14


def test_the_page_is_one_file_that_needs_no_network(html):
    page = Page(html)
    for name, value in page.attributes:
        if name == "href":  # the table of contents
            assert (value or "")[:1] == "#" and f'id="{value[1:]}"' in html, value
        elif name in ("src", "action", "poster", "data", "srcset"):
            assert (value or "").startswith("data:image/png;base64,"), (name, value)
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(", re.sub(r'src="data:[^"]*"', "", html), re.I)
    assert "link" not in page.tags and page.tags.count("script") == 1


def test_the_only_script_is_the_one_the_content_policy_names(html):
    digest = base64.b64encode(hashlib.sha256(Page(html).scripts.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in html or f"script-src 'sha256-{digest}'" in html


def test_the_same_folder_gives_the_same_page(run, html):
    assert build(run).read_text(encoding="utf-8") == html


NAMED = {"bits", "corruptions", "quantizers", "counts", "packages", "threads"}  # objects whose keys are names
KEPT = {"event", "stage", "schema"}


def poison(value, named: bool = False):
    """A copy with an attack in place of every text and in every key that is a name."""
    if isinstance(value, dict):
        attacked = {f"{k}{ATTACK}" if named else k: poison(v, k in NAMED) for k, v in value.items() if k not in KEPT}
        return attacked | {k: v for k, v in value.items() if k in KEPT}
    if isinstance(value, list):
        return [poison(v) for v in value]
    return ATTACK if isinstance(value, str) else value


def test_no_name_from_any_file_becomes_markup(tmp_path):
    folder = write_run(tmp_path / "run", name=ATTACK)
    for name in ("ledger.json", "certificate.json"):
        (folder / name).write_text(json.dumps(poison(json.loads((folder / name).read_text()))))
    lines = [poison(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines[0].pop("stages")
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoints" / "0-train").rename(
        folder / "checkpoints" / "0-<script>alert(2)<"
    ) if os.sep == "/" else None
    html = build(folder).read_text(encoding="utf-8")
    page = Page(html)
    drawn = len(json.loads((folder / "examples.json").read_text())["pictures"])
    assert page.tags.count("script") == 1 and page.tags.count("img") == 1 + drawn
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "<script>alert" not in html and "<script>alert" in page.text
    tips = [json.loads(value or "") for name, value in page.attributes if name == "data-tip"]
    assert any("<script>" in series["n"] for tip in tips for series in tip["s"])


@pytest.mark.parametrize("kept", ["recipe.yaml", "ledger.json", "log.jsonl", "certificate.json"])
def test_any_one_file_is_enough_for_a_page(run, tmp_path, kept):
    shutil.copy(run / kept, tmp_path / kept)
    assert "flatcompress" in page_of(tmp_path).text


@pytest.mark.parametrize(
    "lost", ["recipe.yaml", "ledger.json", "log.jsonl", "certificate.json", "preview.png", "checkpoints"]
)
@pytest.mark.parametrize("damage", ["remove", "cut", "garbage", "folder"])
def test_a_missing_or_damaged_file_costs_only_its_part(run, tmp_path, lost, damage):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / lost
    whole = b"" if path.is_dir() else path.read_bytes()
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "remove":
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"\xff\x00{[" * 50)
    text = page_of(folder).text
    assert "From stage to stage" in text  # without a ledger the log's own rows stand in, or the ledger is there
    if damage in ("garbage", "folder") and lost != "checkpoints":
        assert lost in text


def test_an_interrupted_run_gets_a_page_that_says_so(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = (run / "log.jsonl").read_text().splitlines()[:12]
    (folder / "log.jsonl").write_text(
        "\n".join(lines) + '\n{"event": "stopped", "reason": "stopped after step 40"}\n{"eve'
    )
    text = page_of(folder).text
    assert "Interrupted: stopped after step 40" in text and "No stage has finished yet" in text
    assert "1 unreadable line" in text and "Learning rate" in text


def test_a_certificate_that_fails_says_why(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    certificate = json.loads((run / "certificate.json").read_text())
    certificate |= {"holds": False, "failures": ["argmax equals the reference's on 91 %"]}
    (folder / "certificate.json").write_text(json.dumps(certificate))
    page = page_of(folder)
    assert "Certificate does not hold" in page.text and "argmax equals the reference's on 91 %" in page.text
    assert "Certificate holds" not in page.text
    assert ("class", "good") not in page.attributes[page.attributes.index(("class", "checks")) :][:5]


def epochs_shown(folder) -> list[str]:
    tips = [json.loads(value or "") for name, value in page_of(folder).attributes if name == "data-tip"]
    return next(tip["l"] for tip in tips if "epoch" in tip["l"][0])


def test_what_a_resumed_run_repeats_is_drawn_once(tmp_path):
    def epochs(*numbers):
        return [{"event": "epoch", "stage": "0-train", "epoch": n, "epochs": 5, "loss": 1 / n} for n in numbers]

    events = [{"event": "run", "stages": ["0-train"]}, {"event": "stage", "stage": "0-train"}, *epochs(1, 2, 3)]
    events += [{"event": "stage", "stage": "0-train", "resumed_at_step": 20}, *epochs(3, 4, 5)]
    events += [{"event": "epoch", "stage": "7-gone", "epoch": 1, "loss": 3}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert epochs_shown(tmp_path) == [f"0-train · epoch {n} of 5" for n in range(1, 6)]


def test_a_stage_that_begins_again_forgets_its_first_attempt(tmp_path):
    again = [{"event": "stage", "stage": "0-train"}, {"event": "epoch", "stage": "0-train", "epoch": 1, "loss": 1}]
    events = [again[0], *({**again[1], "epoch": n} for n in (1, 2, 3)), *again]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert epochs_shown(tmp_path) == ["0-train · epoch 1"]


def test_not_measured_is_a_dash_and_diverged_is_said(tmp_path):
    rows = [{"stage": "train", "accuracy": {"test": None}, "sharpness": "NaN", "bytes": 1000, "macs": 0}]
    (tmp_path / "ledger.json").write_text(json.dumps({"schema": 1, "rows": rows}))
    html = build(tmp_path).read_text(encoding="utf-8")
    assert (
        "<td>NaN" in html and "<td>0<" in html and "accuracy" not in Page(html).text.split("Small figures")[0].lower()
    )


def test_ten_thousand_epochs_and_quantizers_stay_a_small_page(tmp_path):
    draw = random.Random(0)
    epochs = [{"event": "epoch", "stage": "0-train", "epoch": n, "loss": draw.random()} for n in range(10_000)]
    quantizers = {f"q{i}": {"disorder": draw.random(), "frozen": i % 2 == 0} for i in range(300)}
    conflict = [{"event": "conflict", "stage": "1-q", "step": n, "quantizers": quantizers} for n in range(200)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs + conflict))
    path = build(tmp_path)
    assert path.stat().st_size < 1_000_000 and "236 more quantizers" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", ["absent", "file", "empty", "\0"])
def test_what_is_no_run_folder_is_a_user_error(tmp_path, path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        build(tmp_path / path)


def test_a_full_disk_is_a_run_error_and_keeps_the_old_page(run, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, os.strerror(28))

    shutil.copy(run / "ledger.json", tmp_path)
    before = build(tmp_path).read_bytes()
    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(RunError, match="kept"):
        build(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from([10**400, -1e308, 1e308, 5e-324, "NaN", "-Infinity", ATTACK, "\ud800", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def mutate(value, data):
    """A copy of ``value`` with a few parts, anywhere in it, replaced by arbitrary JSON."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 4))):
        at = value
        while isinstance(at, (dict, list)) and at:
            key = data.draw(st.sampled_from(list(at)) if isinstance(at, dict) else st.integers(0, len(at) - 1))
            if not isinstance(at[key], (dict, list)) or not at[key] or data.draw(st.integers(0, 3)) == 0:
                at[key] = data.draw(json_values)
                break
            at = at[key]
    return value


@pytest.fixture(scope="module")
def originals():
    draw = random.Random(0)
    events = fabricated_run.events(draw)
    few = [e for i, e in enumerate(events) if i % (9 if e["event"] == "epoch" else 4) == 0][:20]
    return {"ledger": fabricated_run.rows(draw), "log": few, "certificate": fabricated_run.certificate(draw)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_mutated_files_always_give_a_sound_page(originals, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "mutated"
    folder.mkdir(exist_ok=True)
    found = {name: mutate(value, data) for name, value in originals.items()}
    (folder / "ledger.json").write_text(json.dumps({"schema": 1, "rows": found["ledger"]}))
    (folder / "certificate.json").write_text(json.dumps(found["certificate"]))
    (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in found["log"]))
    (folder / "recipe.yaml").write_text(data.draw(st.text(max_size=40)), encoding="utf-8", errors="surrogatepass")
    page = page_of(folder)
    assert page.tags.count("script") == 1 and not any(name.startswith("on") for name, _ in page.attributes)


def test_confusion_classes_and_flips_are_those_of_the_predictions(run):
    gathered = gather(run)
    part = said.sections(gathered)[0]
    raw = fabricated_run.predictions(2)["test"]
    before = fabricated_run.predictions(1)["test"]
    for a, row in enumerate(part["matrix"]):
        for b, cell in enumerate(row["cells"]):
            n = sum(1 for pair in zip(raw["labels"], raw["predicted"]) if pair == (a, b))
            assert cell["text"] == (str(n) if n else "")
    wrong = sum(1 for y, was, now in zip(raw["labels"], before["predicted"], raw["predicted"]) if was == y != now)
    assert dict(part["flips"])["right in float, wrong in the file"] == str(wrong)
    assert sum(int(n) for _, n in part["flips"]) == 120
    assert (part["float"], part["network"]) == ("1-prune", "3-export")


def test_the_worst_mistakes_are_the_most_confident_ones(run):
    gathered = gather(run)
    final = said.last(gathered).parts["test"]
    wrong = [i for i, (a, b) in enumerate(zip(final.labels, final.predicted)) if a != b]
    chosen = [w.index for w in examples.wanted(gathered) if w.part == "test"]
    assert set(chosen) <= set(wrong) and len(chosen) == min(24, len(wrong))
    assert [final.confidence[i] for i in chosen] == sorted((final.confidence[i] for i in wrong), reverse=True)[:24]


def test_the_examples_of_a_corruption_are_spread_over_the_test_part():
    """A folder is read class by class, so its first samples are all of one class."""
    assert examples._spread(36) == [0, 9, 18, 27]
    assert [examples._spread(n) for n in (0, 1, 3)] == [[], [0], [0, 1, 2]]


def test_the_time_at_the_top_is_the_time_section_s_sum(run):
    gathered = gather(run)
    for log in gathered.stages.values():
        log.spent = {"seconds": {"the stage": 40.0, "metrics": 2.5}}
    assert len(gathered.stages) == 4 and costs.taken(gathered) == f"{duration(4 * 42.5)} in all"
    next(iter(gathered.stages.values())).spent = {}
    assert costs.taken(gathered).endswith(" without measuring")


@pytest.mark.parametrize("odd", [None, 3, [], {"counts": [[0, 1]]}, {"counts": [[0, -1, 2]]}, {"counts": [[0, 1, 2]]},
                                 {"counts": [[0, 1, "x"]], "labels": [0], "predicted": [1], "confidence": [1]},
                                 {"counts": [[0, 1, 1]], "labels": ["a"], "predicted": [1],
                                  "confidence": [1]}])  # fmt: skip
def test_predictions_that_are_none_are_left_out(odd):
    assert said.read(odd) is None


def test_every_epoch_axis_ends_each_stage_with_a_number_and_has_room_between():
    for n in range(1, 60):
        for every in range(1, 9):
            marked = curves._marked(n, every)
            assert marked[-1] == n - 1 and all(b - a >= every for a, b in pairwise(marked))
