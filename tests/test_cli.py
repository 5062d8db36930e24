"""The command line: every verb, exit codes, and bad input that is one message and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny import recipe, write

from flatcompress.cli.app import _guarded


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flatcompress"])

    def call(*arguments: object) -> tuple[int, str, str]:
        code = _guarded([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def pictures(folder: Path, classes: tuple[str, ...] = ("a", "b"), n: int = 12) -> Path:
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (16, 16), (40 * index, 9 * i, 99)).save(folder / name / f"{i}.png")
    return folder


def stages(**replaced: dict) -> list[dict]:
    return [{kind: {**body, **replaced.get(kind, {})}} for s in recipe()["stages"] for kind, body in s.items()]


# name -> (recipe changes given the test's folder, texts that the message must contain)
BAD = {
    "unknown_key": (lambda d: {"epoch": 3}, ["epoch", "unknown key"]),
    "misspelt_method": (lambda d: {"stages": stages(train={"method": "saam"})}, ["saam", "Did you mean"]),
    "misspelt_prune_method": (lambda d: {"stages": stages(prune={"method": "adasp"})}, ["'adasap'"]),
    "misspelt_qat_method": (lambda d: {"stages": stages(quantize={"method": "gaqt"})}, ["'gaqat'"]),
    "misspelt_importance": (lambda d: {"stages": stages(prune={"importance": "tailor"})}, ["'taylor'"]),
    "ratio_too_big": (lambda d: {"stages": stages(prune={"ratio": 1.5})}, ["ratio", "1.5"]),
    "bits_too_small": (lambda d: {"stages": stages(quantize={"weight_bits": 1})}, ["weight_bits", "1"]),
    "held_out_unknown": (lambda d: {"data": {"name": "rotated-digits", "held_out": "80"}}, ["80", "75"]),
    "data_option_unknown": (lambda d: {"data": {"name": "rotated-digits", "sise": 8}}, ["sise", "'size'"]),
    "data_folder_missing": (lambda d: {"data": {"name": "folder", "path": str(d / "none")}}, ["/none"]),
    "empty_class": (
        lambda d: {"data": {"name": "folder", "path": str(_with_empty_class(d))}},
        ["empty", "nothing-here"],
    ),
    "one_class": (lambda d: {"data": {"name": "folder", "path": str(pictures(d / "p", ("only",)))}}, ["only"]),
    "corrupt_png": (lambda d: {"data": {"name": "folder", "path": str(_with_corrupt_png(d))}}, ["broken.png"]),
    "not_an_image": (lambda d: {"data": {"name": "folder", "path": str(_with_text_file(d))}}, ["notes.png"]),
    "domain_missing": (
        lambda d: {"data": {"name": "domains", "path": str(_domains(d)), "held_out": "sktech"}},
        ["sktech", "'sketch'"],
    ),
    "cifar_missing": (lambda d: {"data": {"name": "cifar10", "path": str(d / "nowhere")}}, ["nowhere"]),
    "mnist_missing": (lambda d: {"data": {"name": "mnist", "path": str(d / "nowhere")}}, ["nowhere"]),
    "model_unknown": (lambda d: {"model": {"name": "resnet9"}}, ["resnet9", "Did you mean"]),
    "model_option_unknown": (lambda d: {"model": {"name": "resnet8", "widht": 2}}, ["widht"]),
    "factory_missing": (lambda d: {"model": {"name": "no_such_package.zoo:net"}}, ["no_such_package"]),
    "factory_function_missing": (lambda d: {"model": {"name": "flatcompress.errors:net"}}, ["net"]),
    "timm_absent": (lambda d: {"model": {"name": "timm:resnet10t"}}, ["flatcompress[timm]"]),
    "weights_missing": (
        lambda d: {"model": {"name": "resnet8", "weights": str(d / "w.safetensors")}},
        ["w.safetensors"],
    ),
    "weights_pickle": (lambda d: {"model": {"name": "resnet8", "weights": str(_pickle(d))}}, ["evil.pt"]),
    "order_export_first": (lambda d: {"stages": [{"export": {"profile": "float32"}}, {"train": {}}]}, ["export"]),
    "order_prune_last": (
        lambda d: {"stages": [{"train": {}}, {"quantize": {}}, {"prune": {}}]},
        ["'prune' comes after 'quantize'"],
    ),
    "order_prune_untrained": (lambda d: {"stages": [{"prune": {}}]}, ["random weights"]),
    "packed_without_quantize": (lambda d: {"stages": [{"train": {}}, {"export": {}}]}, ["float32"]),
    "pruned_to_nothing": (
        lambda d: {"stages": stages(prune={"ratio": 0.99, "min_channels": 8})},
        ["ratio", "0.99"],
    ),
    "ignore_matches_nothing": (lambda d: {"stages": stages(quantize={"ignore": ["layer9"]})}, ["layer9"]),
    "prune_ignore_matches_nothing": (lambda d: {"stages": stages(prune={"ignore": ["re:nope.*"]})}, ["nope"]),
    "everything_ignored": (lambda d: {"stages": stages(prune={"ignore": ["re:.*"]})}, ["prune"]),
    "device_absent": (lambda d: {"device": "cuda:63"}, ["cuda:63"]),
    "unwritable_output": (lambda d: {"output_dir": str(_file(d))}, ["cannot be written"]),
    "negative_rho": (lambda d: {"stages": stages(train={"rho": -1})}, ["rho", "-1"]),
}


def _with_empty_class(d: Path) -> Path:
    pictures(d / "p")
    (d / "p" / "nothing-here").mkdir()
    return d / "p"


def _with_corrupt_png(d: Path) -> Path:
    pictures(d / "p")
    whole = (d / "p" / "a" / "0.png").read_bytes()
    (d / "p" / "a" / "broken.png").write_bytes(whole[: len(whole) // 2])
    return d / "p"


def _with_text_file(d: Path) -> Path:
    pictures(d / "p")
    (d / "p" / "b" / "notes.png").write_text("no picture")
    return d / "p"


def _domains(d: Path) -> Path:
    for domain in ("photo", "sketch"):
        pictures(d / "domains" / domain)
    return d / "domains"


def _pickle(d: Path) -> Path:
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {d / 'owned'}",))

    path = d / "evil.pt"
    path.write_bytes(pickle.dumps(Evil()))
    return path


def _file(d: Path) -> Path:
    path = d / "a-file"
    path.write_text("in the way")
    return path


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_and_nothing_is_written(name: str, cli, tmp_path):
    change, expected = BAD[name]
    path = write(tmp_path, recipe(**change(tmp_path)))
    code, out, err = cli("run", path, "--quiet")
    assert code == 2, err
    for text in expected:
        assert text in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "owned").exists()


def test_missing_recipe_and_unknown_verb_and_flag_exit_2(cli, tmp_path):
    assert cli("run", tmp_path / "none.yaml")[0] == 2
    assert cli("runn", "x")[0] == 2
    assert cli("run")[0] == 2
    assert cli("bench", tmp_path / "x.onnx", "--threads", "0")[0] == 2


def test_validate_init_schema_list(cli, tmp_path):
    path = write(tmp_path)
    code, out, _ = cli("validate", path, "--json")
    assert code == 0
    assert json.loads(out)["stages"] == ["train", "prune", "quantize", "export"]
    assert not (tmp_path / "runs").exists()
    for template in ("quickstart", "folder", "domains", "cifar10"):
        starter = tmp_path / f"{template}.yaml"
        assert cli("init", starter, "--template", template)[0] == 0
        assert cli("validate", starter, "--syntax-only")[0] == 0
    assert cli("init", starter)[0] == 2  # it exists
    assert cli("init", tmp_path / "x.yaml", "--template", "quikstart")[0] == 2
    code, out, _ = cli("schema")
    assert "stages" in json.loads(out)["properties"]
    code, out, _ = cli("list", "--json")
    tables = json.loads(out)
    assert {"sam", "asam", "sagm"} <= {row["name"] for row in tables["methods"]}
    assert cli("list", "models")[0] == 0
    assert cli("list", "modles")[0] == 2


def test_run_verify_bench_report_export_sharpness(cli, tmp_path):
    path = write(tmp_path)
    code, out, err = cli("run", path, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["certificate"]["holds"] is True
    folder = Path(result["folder"])
    assert cli("verify", folder)[0] == 0
    code, out, _ = cli("bench", result["onnx"], "--runs", "3", "--json")
    assert json.loads(out)["files"][0]["bytes"] == Path(result["onnx"]).stat().st_size
    Path(result["report"]).unlink()
    assert cli("report", folder)[0] == 0
    assert "<html" in Path(result["report"]).read_text()
    code, out, err = cli("export", folder, "--profile", "int8", "--json")
    assert code == 0, err
    assert json.loads(out)["file"]["profile"] == "int8"
    assert cli("export", folder, "--profile", "float32")[0] == 2
    code, out, _ = cli("sharpness", folder, "--stage", "0-train", "--samples", "64", "--json")
    assert code == 0
    assert json.loads(out)["one_step"] is not None
    assert cli("sharpness", folder, "--stage", "0-trian")[0] == 2
    _flip_one_bit(Path(result["onnx"]))
    code, out, _ = cli("verify", folder, "--json")
    assert code == 3
    assert json.loads(out)["holds"] is False


@pytest.mark.parametrize(("holds", "expected"), [(True, 0), (False, 3)])
def test_run_ends_with_3_when_its_certificate_does_not_hold(cli, holds, expected, monkeypatch, tmp_path):
    from types import SimpleNamespace

    made = SimpleNamespace(certificate={"holds": holds}, summary=lambda: {"certificate": {"holds": holds}})
    monkeypatch.setattr("flatcompress.cli.commands.run_recipe", lambda *given: made)
    code, out, _ = cli("run", tmp_path / "r.yaml", "--json")
    assert code == expected and json.loads(out)["certificate"]["holds"] is holds


def _flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_verbs_on_folders_that_are_no_runs_exit_2(cli, tmp_path):
    for verb in ("verify", "report", "export", "sharpness"):
        code, _, err = cli(verb, tmp_path)
        assert code == 2, (verb, err)
        assert cli(verb, tmp_path / "none")[0] == 2
    (tmp_path / "x.onnx").write_bytes(b"no onnx")
    assert cli("bench", tmp_path / "x.onnx")[0] == 2
    assert cli("verify", tmp_path / "x.onnx")[0] == 2


def test_help_and_version_do_not_import_torch():
    probe = (
        "import sys; from flatcompress.cli.app import _guarded; _guarded(['--version']); _guarded(['run', '--help']);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "flatcompress 0." in done.stdout


def test_starters_are_yaml_with_comments():
    from flatcompress.cli.templates import STARTERS

    for text in STARTERS.values():
        assert yaml.safe_load(text)["stages"]
        assert "#" in text
