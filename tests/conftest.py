"""One thread per test process: tests run side by side, and threads that wait for one another would only spin."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")

# The longest files first, so that no process is left alone with one at the end.
LONG = ("test_acceptance", "test_pipeline", "test_documents", "test_cli", "test_session_runs", "test_hostile_files")


def pytest_collection_modifyitems(items):
    """Stable: inside a file the order stays."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_is_not_searched_for_garbage():
    """A collection walks every object there is, and each training stage asks for one: it took half of some tests."""
    gc.collect()
    gc.freeze()
