from __future__ import annotations

import json

import pytest
import yaml
from fabricated_run import write_run

from flatcompress.errors import UserError
from flatcompress.report import card

ATTACK = "<img src=x onerror=alert(1)> [a](b) `c` | d"


def test_the_card_says_data_use_metrics_size_and_verdict(tmp_path):
    page = card.build(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    for words in ("## Intended use", "rotated-digits", "domain 75", "digit 3", "| export | 97.92 %", "gaussian\\_noise",
                  "23.4 kB", "331.9 kB", "0.162 ms", "**holds**", "Same class on all 540 samples"):  # fmt: skip
        assert words in page, words


def test_its_head_is_the_yaml_that_a_hub_reads(tmp_path):
    folder = write_run(tmp_path / "run", name='a: "b" # c')
    head = yaml.safe_load(card.build(folder).read_text(encoding="utf-8").split("---\n")[1])
    assert head["pipeline_tag"] == "image-classification"
    found = head["model-index"][0]
    assert found["name"] == 'a: "b" # c'
    assert found["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.9792}]


def test_a_certificate_that_fails_says_so_and_names_in_files_stay_text(tmp_path):
    folder = write_run(tmp_path / "run", name=ATTACK)
    certificate = json.loads((folder / "certificate.json").read_text())
    certificate |= {"holds": False, "failures": [ATTACK]}
    (folder / "certificate.json").write_text(json.dumps(certificate))
    page = card.build(folder).read_text(encoding="utf-8")
    body = page.split("---\n", 2)[2]
    assert "**does not hold**" in body
    assert "\\<img src=x" in body and " <img" not in body


@pytest.mark.parametrize("kept", ["recipe.yaml", "ledger.json", "log.jsonl", "certificate.json"])
def test_any_one_file_is_enough_for_a_card(tmp_path, kept):
    folder = write_run(tmp_path / "run")
    for path in folder.glob("*.*"):
        if path.name != kept:
            path.unlink()
    assert "## Certificate" in card.build(folder).read_text(encoding="utf-8")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        card.build(tmp_path)
