"""Initial weights from a file: safetensors, or a state dict that torch loads with ``weights_only``. Never a pickle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatcompress.errors import UserError

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")  # keys under which trainers nest the state dict


def load_weights(model: nn.Module, path: str | Path, new_head: bool = False) -> None:
    """Load ``path`` into ``model`` in place; every name and shape must agree.

    ``new_head`` leaves the last linear layer as initialised, for weights trained on other classes. UserError
    names the file and the first missing, unexpected or mismatching key.
    """
    path = Path(path).expanduser()
    state = read_state(path)
    own = model.state_dict()
    skipped = _head_keys(model) if new_head else set()
    given = {key: value for key, value in state.items() if key not in skipped}
    # Old files lack the norms' step counters, which nothing here reads.
    missing = [k for k in own if k not in given and k not in skipped and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in given if k not in own]
    different = [k for k, v in given.items() if k in own and v.shape != own[k].shape]
    if missing or unexpected or different:
        raise UserError(_mismatch(path, own, given, missing, unexpected, different))
    model.load_state_dict(given, strict=False)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, without a trainer's outer keys and a ``module.`` prefix."""
    if not path.is_file():
        raise UserError(f"weights: no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"weights: cannot read {path}: {error}") from error
    except Exception as error:  # safetensors, zip and pickle each have their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"weights: {path} is not a safetensors file nor a plain state dict of tensors ({reason}). "
            "Files that hold pickled Python objects are refused; save model.state_dict() instead."
        ) from error
    return _tensors(state, path)


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"weights: {path} holds no state dict (a mapping of names to tensors)")
    prefixed = all(str(key).startswith("module.") for key in state)
    return {str(key).removeprefix("module.") if prefixed else str(key): value for key, value in state.items()}


def _head_keys(model: nn.Module) -> set[str]:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {f"{linears[-1]}.weight", f"{linears[-1]}.bias"} if linears else set()


def _first(label: str, keys: Iterable[str]) -> list[str]:
    listed = list(keys)
    return [f"{len(listed)} {label} (first: {listed[0]})"] if listed else []


def _mismatch(
    path: Path,
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    different: list[str],
) -> str:
    parts = _first("missing", missing) + _first("unexpected", unexpected)
    if different:
        key = different[0]
        shapes = f"{tuple(given[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        parts.append(f"{len(different)} of another shape (first: {key}, {shapes})")
    return f"weights: {path} does not fit the model: {'; '.join(parts)}. new_head: true skips the classifier."
