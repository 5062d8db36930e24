"""What is recorded beside a figure: machine and versions."""

from __future__ import annotations

import gc
import os
import platform
import sys
import types
import weakref

import pytest
import torch

import flatcompress
from flatcompress import environment


def test_the_machine_is_named():
    found = environment.machine()
    assert found["processor"] and found["platform"] and found["cores"] == os.cpu_count()


def test_versions_are_those_of_the_modules_in_use():
    assert environment.versions("torch", "flatcompress") == {
        "torch": torch.__version__,
        "flatcompress": flatcompress.__version__,
    }


def test_a_module_from_a_package_of_another_name_has_its_own_version(monkeypatch):
    module = types.ModuleType("some_runtime")
    module.__version__ = "7.1"
    monkeypatch.setitem(sys.modules, "some_runtime", module)
    assert environment.versions("some-runtime") == {"some-runtime": "7.1"}


def test_a_package_without_a_version_is_left_out_and_said():
    with pytest.warns(UserWarning, match="no-such-package has no metadata"):
        assert environment.versions("no-such-package") == {}


def test_freed_memory_can_be_given_back_where_the_c_library_is_glibc():
    assert environment.give_back_memory() is (platform.libc_ver()[0] == "glibc")


def test_garbage_that_was_there_before_is_collected_after_and_new_garbage_inside():
    class Thing:
        pass

    def looped():
        thing = Thing()
        thing.self = thing
        return weakref.ref(thing)

    gc.disable()
    try:
        before = looped()
        with environment.settled():
            inside = looped()
            gc.collect()
            assert before() is not None and inside() is None
        gc.collect()
        assert before() is None
    finally:
        gc.enable()
