"""The device kit: a runner that needs numpy and onnxruntime alone, a C++ program, the .ort conversion."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from flatcompress import models, quant
from flatcompress.onnx_export import certify, export

KIT = Path(__file__).parents[2] / "export"
SHAPE = (1, 12, 12)
# Anything the runner may not need is made impossible to import.
ALONE = (
    "import sys, runpy\nfor name in ('torch', 'onnx', 'flatcompress', 'PIL', 'safetensors'): sys.modules[name] = None\n"
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A certified export of a small quantized network, with preprocessing and class names in the file."""
    folder = tmp_path_factory.mktemp("kit")
    model = models.build("resnet8", num_classes=10, input_shape=SHAPE, seed=0, width=8)
    x = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(0))
    quant.quantize(model, weight_bits=4, activation_bits=4, example_input=x[:2])
    quant.calibrate(model, [x])
    made = {"preprocessing": json.dumps({"layout": "NCHW", "size": SHAPE, "mean": [0.25], "std": [0.5]})}
    names = [f"class {i}" for i in range(10)]
    exported = export(model.eval(), x[:2], folder / "model.onnx", metadata=made, class_names=names)
    with torch.no_grad():
        labels = model(x).argmax(1)
    certify(exported, [x], labels, latency_runs=0)
    return folder


def runner(*arguments: object, python: str = sys.executable) -> subprocess.CompletedProcess:
    script = ALONE + f"sys.argv = {[str(KIT / 'runner.py'), *map(str, arguments)]!r}\n"
    script += "runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, timeout=120)


def picture(folder: Path, size: int = 20) -> tuple[Path, np.ndarray]:
    """A grey image as binary .pgm."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size)).astype(np.uint8)
    path = folder / "image.pgm"
    path.write_bytes(b"P5\n# a comment\n%d %d\n255\n" % (size, size) + pixels.tobytes())
    return path, pixels


def test_the_runner_repeats_the_certified_accuracy_with_numpy_and_onnxruntime_alone(run_folder):
    found = json.loads(runner(run_folder / "model.onnx", "check").stdout)
    certificate = json.loads((run_folder / "certificate.json").read_text())
    assert found["accuracy"] == certificate["metric"]["onnxruntime"]
    assert found["accuracy"] == certificate["evidence"]["accuracy"]
    assert found["samples"] == 40 and found["equal_argmax"] == 1.0


@pytest.mark.slow
def test_the_runner_works_in_an_environment_of_numpy_and_onnxruntime(run_folder, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    packages = ["numpy", f"onnxruntime=={ort.__version__}"]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, timeout=600)
    arguments = [python, str(KIT / "runner.py"), str(run_folder / "model.onnx"), "check"]
    found = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    certificate = json.loads((run_folder / "certificate.json").read_text())
    assert found["accuracy"] == certificate["metric"]["onnxruntime"]


def test_the_runner_classifies_files_and_folders(run_folder, tmp_path):
    path, pixels = picture(tmp_path)
    np.save(tmp_path / "frame.npy", pixels)
    done = runner(run_folder / "model.onnx", "predict", tmp_path, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(row["path"]).name for row in rows] == ["frame.npy", "image.pgm"]
    assert rows[0]["logits"] == rows[1]["logits"]
    assert rows[0]["classes"][0][0].startswith("class ")
    assert "class" in runner(run_folder / "model.onnx", "predict", path).stdout


def test_the_runner_says_what_is_missing(run_folder, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"x")
    done = runner(run_folder / "model.onnx", "predict", tmp_path / "photo.png")
    assert done.returncode == 1 and "needs Pillow" in done.stderr and "Traceback" not in done.stderr
    done = runner(tmp_path / "absent.onnx", "bench")
    assert done.returncode == 1 and "no such file" in done.stderr


def test_the_runner_prepares_images_as_pillow_and_torch_would(run_folder):
    Image = pytest.importorskip("PIL.Image")
    sys.path.insert(0, str(KIT))
    try:
        import runner as kit
    finally:
        sys.path.remove(str(KIT))
    model = kit.Model(run_folder / "model.onnx")
    for size in (12, 30, 7):
        pixels = np.random.default_rng(1).integers(0, 256, (size, size + 3, 3)).astype(np.uint8)
        grey = np.asarray(Image.fromarray(pixels).convert("L"), np.float32)
        resized = np.asarray(Image.fromarray(grey, mode="F").resize((12, 12), Image.Resampling.BILINEAR))
        expected = (resized[None] / 255 - 0.25) / 0.5
        np.testing.assert_allclose(model.preprocess(pixels), expected, atol=0.02)
        assert model.preprocess(pixels[:, :, ::-1], bgr=True) == pytest.approx(model.preprocess(pixels), abs=1e-5)
    assert model.bench(runs=2)["median_ms"] > 0
    assert len(model.predict(pixels, top=2)) == 2


def test_the_ort_conversion_gives_the_same_outputs(run_folder, tmp_path):
    arguments = [sys.executable, str(KIT / "to_ort.py"), str(run_folder / "model.onnx"), str(tmp_path / "model.ort")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "largest difference 0.0" in done.stdout
    assert (tmp_path / "model.ort").stat().st_size > 0


def onnxruntime_for_cpp(folder: Path) -> tuple[Path, Path]:
    """(folder of the C header, folder of the library); skips where there is no header, which no wheel contains."""
    places = [os.environ.get("ONNXRUNTIME_INCLUDE", ""), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
    header = next((Path(p) for p in places if p and (Path(p) / "onnxruntime_c_api.h").is_file()), None)
    if header is None or shutil.which("g++") is None:
        pytest.skip(
            "needs g++ and onnxruntime_c_api.h: set ONNXRUNTIME_INCLUDE to its folder (a release archive has it)"
        )
    own = os.environ.get("ONNXRUNTIME_LIB")
    if own:
        return header, Path(own)
    libraries = sorted((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so*"))
    if not libraries:
        pytest.skip("this onnxruntime wheel has no shared library: set ONNXRUNTIME_LIB")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(libraries[0])
    return header, folder


def test_the_cpp_program_gives_onnxruntimes_own_numbers(run_folder, tmp_path):
    header, library = onnxruntime_for_cpp(tmp_path)
    program = tmp_path / "predict"
    subprocess.run(
        [
            *("g++", "-std=c++17", "-O1", "-Wall", "-Werror", f"-I{header}", str(KIT / "cpp" / "predict.cpp")),
            *(f"-L{library}", "-lonnxruntime", f"-Wl,-rpath,{library}", "-o", str(program)),
        ],
        check=True,
        timeout=120,
    )

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [program, run_folder / "model.onnx", *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    x = np.random.default_rng(0).standard_normal((1, *SHAPE)).astype(np.float32)
    (tmp_path / "input.f32").write_bytes(x.tobytes())
    expected = ort.InferenceSession(str(run_folder / "model.onnx")).run(None, {"input": x})[0][0]
    np.testing.assert_array_equal(np.array(run("--raw", tmp_path / "input.f32").split(), np.float32), expected)
    path, _ = picture(tmp_path)
    first = run(path).split()[:2]
    assert (
        f"{first[0]} {first[1]}"
        == json.loads(runner(run_folder / "model.onnx", "predict", path, "--json").stdout)["classes"][0][0]
    )
    assert "median" in run("--bench", 3)
    done = subprocess.run([program, tmp_path / "absent.onnx", "--bench", "1"], capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr
