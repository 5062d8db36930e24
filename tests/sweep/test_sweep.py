"""Sweeps: which runs there are, what they share, what is skipped, how a setting is chosen, what the table says."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from flatcompress.cli import app as cli
from flatcompress.errors import RunError, UserError
from flatcompress.sweep import pool, table
from flatcompress.sweep.pool import Finished
from flatcompress.sweep.spec import load_sweep, parse_sweep, runs_of, tasks_of

RECIPE = {
    "device": "cpu",
    "data": {"name": "rotated-digits", "held_out": "75", "size": 8, "corruptions": "none", "batch_size": 1024},
    "model": {"name": "resnet8", "width": 4},
    "stages": [
        {"train": {"method": "none", "epochs": 1}},
        {"quantize": {"method": "lsq", "epochs": 1}},
    ],
}
METHODS = [
    {"name": "float", "stages": [{"train": {"method": "none", "epochs": 1}}]},
    {"name": "LSQ"},
    {"name": "SAM", "set": {"stages.1.quantize.method": "lsq_sam"}, "grid": {"stages.1.quantize.rho": [0.05, 0.2]}},
]


def spec(**keys):
    return parse_sweep({"recipe": RECIPE, "methods": METHODS, "seeds": [0, 1], "held_out": ["0", "75"], **keys})


def result(method, seed, held_out, accuracy, val=0.5, setting=None):
    sweep = spec()
    entry = next(m for m in sweep.methods if m.name == method)
    run = runs_of(sweep, entry, setting or entry.settings()[0], [seed], [held_out])[0]
    row = {"accuracy": {"test": 0.9, "held_out": accuracy, "corrupted": None}, "passes": 8, "seconds": 2.0,
           "bytes": 4000, "macs": 10}  # fmt: skip
    return Finished(run, None, [row], val)


def test_every_combination_is_a_run_with_its_overrides():
    sweep = spec()
    runs = runs_of(sweep, sweep.methods[2], {"stages.1.quantize.rho": 0.2}, sweep.seeds, sweep.held_out)
    assert [(r.held_out, r.seed) for r in runs] == [("0", 0), ("0", 1), ("75", 0), ("75", 1)]
    config = runs[0].recipe.stages[1].config
    assert (config.method, config.hyper, runs[2].recipe.data.options["held_out"]) == ("lsq_sam", {"rho": 0.2}, "75")


def test_equal_beginnings_are_shared_and_a_run_can_be_the_beginning():
    sweep = spec()
    runs = [r for m in sweep.methods for r in runs_of(sweep, m, m.settings()[0], [0], ["0"])]
    tasks = tasks_of(runs)
    assert len(tasks) == 3
    floats = next(r.key for r in runs if r.method == "float")
    assert [tasks[r.key].base for r in runs] == [None, floats, floats]


def test_a_beginning_that_no_method_asks_for_becomes_a_task():
    sweep = spec(methods=METHODS[1:])
    runs = [r for m in sweep.methods for r in runs_of(sweep, m, m.settings()[0], [0], ["0"])]
    tasks = tasks_of(runs)
    bases = {tasks[r.key].base for r in runs}
    assert len(tasks) == 3 and len(bases) == 1
    assert not tasks[bases.pop()].wanted


def test_methods_that_compute_the_same_share_one_folder():
    twins = [{"name": "a"}, {"name": "b", "set": {"stages.1.quantize.method": "lsq"}}]
    sweep = spec(methods=twins)
    runs = [r for m in sweep.methods for r in runs_of(sweep, m, {}, [0], ["0"])]
    assert len(runs) == 2 and len(tasks_of(runs)) == 1


def test_different_seeds_share_nothing():
    sweep = spec(methods=METHODS[1:2])
    tasks = tasks_of(runs_of(sweep, sweep.methods[0], {}, [0, 1], ["0"]))
    assert [t.base for t in tasks.values()] == [None, None]


def test_setting_is_chosen_by_validation_and_never_by_the_held_out_domain():
    sweep = spec()
    low, high = sweep.methods[2].settings()
    done = [result("SAM", s, d, 0.9, 0.50, low) for s in (0, 1) for d in ("0", "75")]
    done += [result("SAM", s, d, 0.1, 0.51, high) for s in (0, 1) for d in ("0", "75")]
    assert pool._best(sweep, sweep.methods[2], done) == high


def test_table_averages_domains_within_a_seed_then_seeds():
    done = [result("LSQ", 0, "0", 0.4), result("LSQ", 0, "75", 0.6), result("LSQ", 1, "0", 0.6),
            result("LSQ", 1, "75", 0.8)]  # fmt: skip
    row = table.table(done)[0]
    assert row.held_out.mean == pytest.approx(0.6)
    assert row.held_out.std == pytest.approx(0.1414, abs=1e-4)
    assert row.by_domain["0"].mean == pytest.approx(0.5)
    text = table.markdown([row])
    assert "60.0 ± 14.1" in text and "chosen by validation" in text and "corrupted |" not in text


def test_one_held_out_domain_is_shown_once():
    text = table.markdown(table.table([result("LSQ", 0, "0", 0.4)]))
    assert "held out (0)" in text and text.count("40.0") == 1


def test_paired_difference_cancels_what_seeds_share():
    a = [result("LSQ", 0, "0", 0.5), result("LSQ", 1, "0", 0.9)]
    b = [result("float", 0, "0", 0.4), result("float", 1, "0", 0.8), result("float", 2, "0", 0.1)]
    gain = table.paired(a, b)
    assert gain.mean == pytest.approx(0.1) and gain.std == pytest.approx(0.0, abs=1e-12) and gain.n == 2


def test_page_escapes_names():
    page = table.page("<b>", table.table([result("LSQ", 0, "0", 0.4)]))
    assert "<b>" not in page and "&lt;b&gt;" in page and "<svg" in page


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"seedz": [1]}, "allowed keys"), ({"methods": []}, "methods"), ({"seeds": [1, 1]}, "given twice"),
     ({"methods": [{"name": "a", "grid": {"x": []}}]}, "lists no value")],
)  # fmt: skip
def test_wrong_sweeps_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        spec(**keys)


def test_wrong_override_names_the_method_before_anything_runs(tmp_path):
    sweep = spec(output_dir=str(tmp_path), methods=[{"name": "odd", "set": {"stages.1.quantize.method": "lsqq"}}])
    with pytest.raises(UserError, match=r"(?s)odd.*lsqq"):
        pool.run_sweep(sweep)
    assert not list(tmp_path.iterdir())


def test_file_finds_its_recipe_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text(json.dumps(RECIPE))
    (tmp_path / "sweep.yaml").write_text(json.dumps({"recipe": "base.yaml", "methods": METHODS}))
    assert load_sweep(tmp_path / "sweep.yaml").recipe["model"]["width"] == 4
    (tmp_path / "sweep.yaml").write_text(json.dumps({"recipe": "bas.yaml", "methods": METHODS}))
    with pytest.raises(UserError, match="not there"):
        load_sweep(tmp_path / "sweep.yaml")


def test_plan_writes_recipes_that_any_queue_can_run(tmp_path):
    commands = pool.plan(spec(output_dir=str(tmp_path), seeds=[0]))
    assert len(commands) == 8 and all("flatcompress run" in c for c in commands)


@pytest.mark.slow
def test_sweep_runs_shares_resumes_and_reports_failures(tmp_path):
    keys = {"output_dir": str(tmp_path), "seeds": [0], "held_out": ["75"]}
    sweep = spec(**keys, methods=METHODS[:2])
    finished = pool.run_sweep(sweep)
    assert [len(f.rows) for f in finished] == [1, 2]
    floats, quantized = finished
    assert quantized.rows[0] == floats.rows[0]  # the very same stage, measured once
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("ledger.json")}
    lines = []
    again = pool.run_sweep(sweep, lines.append)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("ledger.json")} == stamps and "0 to do" in lines[0]
    text, data = table.write(sweep, again)
    assert {p.name for p in sweep.folder.glob("table.*")} == {"table.md", "table.json", "table.html"}
    assert len(data["runs"]) == 2 and "LSQ" in text
    broken = spec(**keys, methods=[{"name": "hot", "set": {"stages.0.train.optimizer.lr": 1e30}}])
    with pytest.raises(RunError, match="hot"):
        pool.run_sweep(broken)


def test_verb_plans_a_sweep_and_names_what_is_wrong_with_one(tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps({"recipe": RECIPE, "methods": METHODS[:1], "seeds": [0], "output_dir": str(tmp_path)}))
    assert cli._guarded(["sweep", str(path), "--plan", "--json"]) == 0
    commands = json.loads(capsys.readouterr().out)
    assert len(commands) == 1 and "--output" in commands[0]
    path.write_text("recipe: 3\n")
    assert cli._guarded(["sweep", str(path)]) == 2
    assert "methods" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_sweep_that_is_stopped(tmp_path, number):
    recipe = {**RECIPE, "stages": [{"train": {"method": "none", "epochs": 100_000}}]}
    path = tmp_path / "sweep.yaml"
    path.write_text(
        json.dumps({"name": "long", "recipe": recipe, "methods": [{"name": "float"}], "seeds": [0],
                    "held_out": ["75"], "output_dir": str(tmp_path)})
    )  # fmt: skip
    command = [sys.executable, "-m", "flatcompress", "sweep", str(path)]
    sweep = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, text=True)
    try:
        _wait_until(lambda: any("epoch" in log.read_text() for log in tmp_path.rglob("log.jsonl")))
        sweep.send_signal(number)
        error = sweep.communicate(timeout=120)[1]
        if number == signal.SIGTERM:
            assert sweep.returncode == 130 and "same command resumes it" in error
            assert any(tmp_path.rglob("checkpoints/*"))
        _wait_until(lambda: not _group_lives(sweep.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(sweep.pid, signal.SIGKILL)


def _wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def _group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_task_without_accuracy_is_refused_before_anything_runs():
    sweep = parse_sweep(
        {"recipe": {**RECIPE, "task": "regression"}, "methods": METHODS, "seeds": [0], "held_out": ["0"]}
    )
    with pytest.raises(UserError, match="compares accuracy, which task 'regression' does not have"):
        pool.check_all(sweep)
