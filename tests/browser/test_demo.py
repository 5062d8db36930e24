"""The demo page: the browser's outputs are Python's."""

from __future__ import annotations

import functools
import http.server
import re
import threading

import browsing
import pytest
from PIL import Image

from flatcompress import Pipeline
from flatcompress.cli.demoing import demo
from flatcompress.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "run"
    stages = [
        {"train": {"method": "none", "epochs": 1}},
        {"quantize": {"weight_bits": 4, "activation_bits": 4, "epochs": 1}},
        {"export": {"profile": "packed", "latency": False}},
    ]
    Pipeline(model="resnet8", data={"name": "rotated-digits", "held_out": "75"}, stages=stages, threads=1).run(folder)
    return folder


def test_webgpu_is_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match=r"webgpu.*uint8 wrongly"):
        demo(tmp_path, None, None, "webgpu")


def test_a_folder_without_an_exported_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no model\.onnx"):
        demo(tmp_path, None, None)


@pytest.fixture(scope="module")
def page(run):
    package = browsing.npm_package("onnxruntime-web")
    if package is None:
        pytest.skip("needs the npm package onnxruntime-web: npm install it, or set NPM_PACKAGES to its node_modules")
    made = demo(run, None, package)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=made["folder"])
    handler.log_message = lambda *args: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, browsing.chromium() as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        ours = (address, "blob:", "data:")
        context = browser.new_context(viewport={"width": 420, "height": 900}, bypass_csp=False)
        opened, said = context.new_page(), []
        opened.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
        opened.on("pageerror", lambda e: said.append(str(e)))
        opened.on("request", lambda r: said.append(r.url) if not r.url.startswith(ours) else None)
        opened.goto(address)
        opened.locator("#status", has_text=re.compile("Ready|not work")).wait_for(timeout=60_000)
        yield opened, said
        server.shutdown()


@pytest.mark.slow
def test_the_browser_computes_what_python_computes_on_256_images(page):
    opened, said = page
    assert "Ready" in opened.locator("#status").inner_text()
    found = opened.evaluate("window.demo.check()")
    assert found["samples"] == 256 and found["same"] == 256
    assert found["worst"] <= 1e-5
    assert said == []
    assert opened.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.slow
def test_an_own_picture_is_classified(page, tmp_path):
    opened, _ = page
    Image.effect_noise((90, 60), 80).save(tmp_path / "own.png")
    opened.locator("#said").evaluate("(e) => { e.textContent = ''; }")
    opened.locator("#file").set_input_files(tmp_path / "own.png")
    opened.locator("#said:not(:empty)").wait_for(timeout=30_000)
    assert "%" in opened.locator("#scores").inner_text()
