"""The training step through torch.compile, which joins operators into fewer passes over memory.

A module is compiled in place while a job trains it; validation and everything after the job runs the module as it is,
so what is measured is what is exported.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flatcompress.errors import UserError

COMPILERS = ("g++", "clang++", "c++")


def check(device: torch.device) -> None:
    """UserError where torch.compile lacks what it needs for ``device``: a C++ compiler, or Triton on a GPU."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UserError("compile: true needs the package triton on a GPU. Install it, or leave compile out.")
        return
    wanted = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    if not any(map(shutil.which, wanted)):
        raise UserError(
            f"compile: true needs a C++ compiler, and none of {', '.join(wanted)} is here. Install one (CXX names "
            "another), or leave compile out."
        )


@contextmanager
def compiled(model: nn.Module, backend: str = "inductor") -> Iterator[None]:
    """Inside, calls of ``model`` are compiled, but for those within `eager`; afterwards it is as it was."""

    def call(*args: Any, **options: Any) -> Any:  # `Module.compile` leaves a module of torch's own, a Sequential, alone
        return model._call_impl(*args, **options)

    model._compiled_call_impl = torch.compile(call, backend=backend)
    try:
        yield
    finally:
        model._compiled_call_impl = None


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Inside, calls of ``model`` are not compiled."""
    own, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = own
