"""Files that are wrong on purpose are refused, at 9, 100 and 1,795 samples."""

from __future__ import annotations

import shutil

import pytest

from benchmarks import planted_faults as planted
from flatcompress.onnx_export import certify, export, verify
from flatcompress.storage import sha256_file


@pytest.mark.parametrize(
    ("samples", "every"),
    [(9, 3), (100, 5), pytest.param(1795, 1, marks=pytest.mark.slow), pytest.param(9, 1, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", list(planted.NETWORKS))
def test_what_moves_an_output_by_more_than_a_step_is_refused(name, samples, every, tmp_path):
    rows, missed = planted.rows(name, [samples], tmp_path, every)
    assert missed == []
    assert {row["fault"] for row in rows if row["files"]} == set(planted.KINDS)
    told = {row["fault"] for row in rows if row["beyond a step"]}
    assert len(told) >= 4, rows


@pytest.mark.parametrize("kind", planted.KINDS)
def test_verify_refuses_it_by_replay_when_the_hash_was_adapted(kind, tmp_path, good):
    folder, exported, step, x = good
    for name in ("certificate.json", "evidence.safetensors"):
        shutil.copy(folder / name, tmp_path / name)
    bad, text = tmp_path / "model.onnx", (tmp_path / "certificate.json").read_text()
    moves = []
    for fault in [f for f in planted.faults(exported.path) if f.kind == kind][::4]:
        fault.plant(exported.path, bad)
        (tmp_path / "certificate.json").write_text(text.replace(sha256_file(exported.path), sha256_file(bad)))
        moves.append(planted.moved(exported.path, bad, x.numpy(), step))
        assert moves[-1] <= 1 or not verify(tmp_path).holds
    assert max(moves) > 1


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    x, y = (t[:40] for t in planted.digits())
    exported = export(planted.trained(1), x[:2], folder / "model.onnx", "int8")
    certificate = certify(exported, [x], y, latency_runs=0)
    assert certificate["holds"], certificate["failures"]
    return folder, exported, certificate["parity"]["step"], x
