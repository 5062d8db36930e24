from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import warnings

import pytest
import torch
from faulty_os import FaultyOs, PowerCut, outcome
from hypothesis import given, settings
from hypothesis import strategies as st

from flatcompress import storage
from flatcompress.errors import RunError, UserError
from flatcompress.plan import Plan, Step
from flatcompress.randomness import capture, restore
from flatcompress.store import checkpoint
from flatcompress.store.checkpoint import load, load_latest, recover, rewind, save_progress, save_stage

PLAN = Plan([Step("channels", {"kept": [0, 2]})])


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), value), "b": torch.zeros(0)}


def value_of(found) -> float | None:
    return None if found is None else found.state_dict["w"][0].item()


def flip(path, offset: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if offset is None else offset] ^= 1
    path.write_bytes(bytes(data))


def test_a_stage_comes_back_whole(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "rng": capture(), 3: float("nan")}
    path = save_stage(tmp_path, "1-prune", PLAN, model.state_dict(), extra={"best": 0.5}, state=state)
    assert path == tmp_path / "1-prune"
    assert {"plan.json", "model.safetensors", "state.json", "state.safetensors"} < set(os.listdir(path))
    found = load(path)
    assert found.finished and found.stage == "1-prune" and found.stage_index == 1 and found.extra == {"best": 0.5}
    assert found.plan == PLAN and found.state_dict.keys() == model.state_dict().keys()
    assert all(torch.equal(found.state_dict[k], v) for k, v in model.state_dict().items())
    optimizer.load_state_dict(found.state["optimizer"])


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        save_stage(tmp_path / folder, "0-train", PLAN, weights(1), extra={"x": [1]}, state={"t": torch.ones(2), "i": 1})
    for name in os.listdir(tmp_path / "a" / "0-train"):
        assert (tmp_path / "a/0-train" / name).read_bytes() == (tmp_path / "b/0-train" / name).read_bytes(), name


def test_random_states_come_back(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    save_stage(tmp_path, "0-train", PLAN, {}, state=capture())
    before = draw()
    restore(load_latest(tmp_path).state)
    assert draw() == before
    with pytest.raises(UserError, match="random state"):
        restore({"python": (3, (1, 2), None)})


def test_extra_state_of_modules_that_is_no_tensor_comes_back(tmp_path):
    save_stage(tmp_path, "0-train", PLAN, {"w": torch.ones(1), "q._extra_state": {"bits": 4, "seen": (1, 2)}})
    assert load_latest(tmp_path).state_dict["q._extra_state"] == {"bits": 4, "seen": (1, 2)}


def test_progress_keeps_the_last_k_and_a_finished_stage_drops_them(tmp_path):
    save_stage(tmp_path, "0-train", PLAN, weights(0))
    for step in (5, 10, 2000):
        save_progress(tmp_path, "1-prune", step, PLAN, weights(step), extra={"step": step}, keep=2)
    assert sorted(n for n in os.listdir(tmp_path) if "@" in n) == ["1-prune@000000010", "1-prune@000002000"]
    found = load_latest(tmp_path)
    assert (found.stage, found.step, found.finished, value_of(found)) == ("1-prune", 2000, False, 2000)
    save_stage(tmp_path, "1-prune", PLAN, weights(7))
    assert not [n for n in os.listdir(tmp_path) if "@" in n] and value_of(load_latest(tmp_path)) == 7


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors", "state.json", "state.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(tmp_path, name, damage):
    for step in (1, 2):
        save_progress(tmp_path, "0-train", step, PLAN, weights(step), state=torch.ones(3))
    path = tmp_path / "0-train@000000002" / name
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        flip(path, 12 if name == "manifest.json" else None)
    else:
        path.write_bytes(path.read_bytes()[:20] if damage == "cut" else b"")
    with pytest.warns(UserWarning, match="000002 is damaged"):
        found = load_latest(tmp_path)
    assert value_of(found) == 1 and len(found.skipped) == 1 and name in found.skipped[0]


def test_when_nothing_sound_is_left_the_run_starts_again_with_a_warning(tmp_path):
    assert load_latest(tmp_path / "absent") is None
    save_stage(tmp_path, "0-train", PLAN, weights(1))
    flip(tmp_path / "0-train" / "model.safetensors")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert load_latest(tmp_path) is None
    assert "0-train is damaged" in str(seen[0].message) and "from the beginning" in str(seen[1].message)


def test_a_missing_or_foreign_pointer_means_the_newest_folder(tmp_path):
    for index, stage in enumerate(["0-train", "1-prune"]):
        save_stage(tmp_path, stage, PLAN, weights(index))
    for text in ("nonsense\n", "../../etc\n", None):
        if text is None:
            (tmp_path / "latest").unlink()
        else:
            (tmp_path / "latest").write_text(text)
        assert value_of(load_latest(tmp_path)) == 1


def test_rewind_forgets_later_stages_only(tmp_path):
    for index, stage in enumerate(["0-train", "1-prune", "2-quantize"]):
        save_stage(tmp_path, stage, PLAN, weights(index))
    save_progress(tmp_path, "3-more", 4, PLAN, weights(3))
    rewind(tmp_path, 2)
    assert value_of(load_latest(tmp_path)) == 1
    assert sorted(os.listdir(tmp_path)) == ["0-train", "1-prune", "latest"]
    rewind(tmp_path, 0)
    assert load_latest(tmp_path) is None and os.listdir(tmp_path) == ["latest"]
    save_stage(tmp_path, "0-train", PLAN, weights(9))
    assert value_of(load_latest(tmp_path)) == 9


def test_what_cannot_be_stored_is_a_run_error_that_names_it(tmp_path):
    save_stage(tmp_path, "0-train", PLAN, weights(1))
    with pytest.raises(RunError, match=r"hook.*Earlier ones are kept"):
        save_stage(tmp_path, "1-prune", PLAN, weights(2), state={"hook": print})
    with pytest.raises(RunError, match="__metadata__"):
        save_stage(tmp_path, "1-prune", PLAN, {"__metadata__": torch.ones(1)})
    for stage in ("prune", "../0-x", "1-", "01-x"):
        with pytest.raises(ValueError, match="stage id"):
            save_stage(tmp_path, stage, PLAN, {})
    assert value_of(load_latest(tmp_path)) == 1


def scenario(folder) -> None:
    """The life of a run's checkpoints; the weights say how far it is."""
    save_progress(folder, "0-train", 1, PLAN, weights(1), keep=1)
    save_progress(folder, "0-train", 2, PLAN, weights(2), keep=1)
    save_stage(folder, "0-train", PLAN, weights(3))
    save_stage(folder, "0-train", PLAN, weights(4))  # written again over the old one
    save_progress(folder, "1-prune", 1, PLAN, weights(5), state={"t": torch.ones(2)})
    save_stage(folder, "1-prune", PLAN, weights(6))


def use(monkeypatch, shim) -> None:
    monkeypatch.setattr(storage, "os", shim)
    monkeypatch.setattr(checkpoint, "os", shim)


def count_calls(tmp_path, monkeypatch) -> int:
    shim = FaultyOs()
    use(monkeypatch, shim)
    scenario(tmp_path / "count")
    use(monkeypatch, FaultyOs())
    return shim.calls


@pytest.mark.parametrize("after", [False, True])
def test_a_power_cut_between_any_two_calls_leaves_a_state_to_go_on_from(tmp_path, monkeypatch, after):
    calls, last = count_calls(tmp_path, monkeypatch), 0
    assert calls > 100
    for at in range(calls):
        folder = tmp_path / "run"
        use(monkeypatch, FaultyOs(at, after=after))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a power cut damages nothing, so nothing may be passed over
            with pytest.raises(PowerCut):
                scenario(folder)
            # a second cut while recovering from the first
            use(monkeypatch, FaultyOs(at % 3, after=after))
            with contextlib.suppress(PowerCut):
                recover(folder)
            use(monkeypatch, FaultyOs())
            recover(folder)
            found = value_of(load_latest(folder)) or 0
            assert found >= last, f"call {at}: went back from {last} to {found}"
            last = found
            assert not [n for n in os.listdir(folder) if n.startswith(".")] if folder.exists() else True
            if at % 4 == 0:  # and the run can be done over the remains
                scenario(folder)
                assert value_of(load_latest(folder)) == 6
                assert sorted(os.listdir(folder)) == ["0-train", "1-prune", "latest"]
        shutil.rmtree(folder, ignore_errors=True)
    assert last == 6


@pytest.mark.filterwarnings("ignore:.*could not be removed")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failing_call_is_a_run_error_and_leaves_a_state_to_go_on_from(tmp_path, monkeypatch, code):
    errors, last = 0, 0
    for at in range(0, count_calls(tmp_path, monkeypatch), 9 if code == errno.EROFS else 1):
        folder = tmp_path / "run"
        use(monkeypatch, FaultyOs(at, code))
        error = outcome(RunError, scenario, folder)
        finished = error is None  # then only clearing away failed
        if error is not None:
            errors += 1
            assert "kept" in error and os.strerror(code) in error
        use(monkeypatch, FaultyOs())
        recover(folder)
        found = value_of(load_latest(folder)) or 0
        assert found == 6 if finished else found >= last
        last = found if not finished else last
        shutil.rmtree(folder)
    assert errors > 10


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    state = {"t": torch.ones(2), "tuple": (1, 2.5, None), "numpy": capture()["numpy"], 7: b"x"}
    return save_stage(folder, "0-train", PLAN, weights(1), extra={"a": 1}, state=state)


@settings(max_examples=150)
@given(data=st.data())
def test_mutated_files_with_matching_checksums_load_or_are_user_errors(sound, tmp_path_factory, data):
    """A hostile checkpoint: its manifest agrees with its changed files, so only the parsers stand between."""
    folder = tmp_path_factory.getbasetemp() / "hostile" / "0-train"
    shutil.copytree(sound, folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["plan.json", "model.safetensors", "state.json", "state.safetensors"]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content), 600) - 1))
        kind = data.draw(st.sampled_from(["byte", "cut", "insert"]))
        if kind == "byte":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 20))]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        if not content:
            break
    (folder / name).write_bytes(bytes(content))
    files = {n: {"sha256": storage.sha256_file(folder / n)} for n in os.listdir(folder) if n != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "files": files}))
    error = outcome(UserError, load, folder)
    assert error is None or str(folder) in error


@given(st.binary(max_size=60) | st.sampled_from([b'{"schema":1,"files":{"../../x":{}}}', b'{"schema":1,"files":[]}']))
def test_a_hostile_manifest_is_a_user_error(sound, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "manifest" / "0-train"
    shutil.copytree(sound, folder, dirs_exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(UserError):
        load(folder)
