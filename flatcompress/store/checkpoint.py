"""Checkpoints: plan.json + model.safetensors + state.json (+ state.safetensors), checksummed, never half there.

A finished stage is the folder ``checkpoints/1-prune``; a place inside a stage is ``checkpoints/1-prune@000000250``.
Each is written into a temporary folder, fsynced and renamed; the file ``latest`` is replaced last and is what counts:
a folder newer than it names was not yet committed. Nothing is pickled, so a checkpoint from a stranger can at worst
be refused.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from flatcompress import storage
from flatcompress.errors import RunError, UserError
from flatcompress.plan import Plan
from flatcompress.store.codec import decode, encode, unshared

SCHEMA = 1
MOST_JSON = 64 << 20  # bytes of a checkpoint's JSON files; its tensors lie elsewhere
PLAN, MODEL, STATE, TENSORS, MANIFEST, LATEST = (
    "plan.json",
    "model.safetensors",
    "state.json",
    "state.safetensors",
    "manifest.json",
    "latest",
)
_NAME = re.compile(r"(0|[1-9]\d{0,5})-([A-Za-z0-9_.-]{1,80})(?:@(\d{1,12}))?")
_STAGE = re.compile(r"(0|[1-9]\d{0,5})-[A-Za-z0-9_.-]{1,80}")
_LOAD_ERRORS = (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, AttributeError)


@dataclass(frozen=True)
class Checkpoint:
    """What `load` gives back: everything needed to rebuild the model and go on.

    ``step`` is None for a finished stage. ``extra`` is JSON data, ``state`` the nested training state as it was saved
    (tensors on the CPU), ``skipped`` says which newer checkpoints were damaged and passed over.
    """

    path: Path
    stage: str
    step: int | None
    plan: Plan
    state_dict: dict[str, Any]
    extra: dict[str, Any]
    state: Any = None
    skipped: tuple[str, ...] = field(default=())

    @property
    def finished(self) -> bool:
        """Whether the stage was done when this was written."""
        return self.step is None

    @property
    def stage_index(self) -> int:
        """The number in front of the stage id."""
        return int(self.stage.split("-", 1)[0])


def save_stage(
    folder: Path,
    stage: str,
    plan: Plan,
    state_dict: Mapping[str, Any],
    *,
    extra: Mapping[str, Any] | None = None,
    state: Any = None,
) -> Path:
    """Write the checkpoint of a finished stage ("1-prune") and drop the stage's unfinished ones.

    ``extra`` is JSON data, ``state`` any nesting of what `codec.encode` takes. RunError when the disk refuses or a
    value cannot be stored; every earlier checkpoint is then still there. Returns the checkpoint's folder.
    """
    path = _save(Path(folder), _valid_stage(stage), None, plan, state_dict, extra or {}, state)
    for name in _names(path.parent):
        if name.startswith(f"{stage}@"):
            _remove_quietly(path.parent / name)
    return path


def save_progress(
    folder: Path,
    stage: str,
    step: int,
    plan: Plan,
    state_dict: Mapping[str, Any],
    *,
    extra: Mapping[str, Any] | None = None,
    state: Any = None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint inside a stage, after ``step`` steps, and keep the last ``keep`` (at least 1) of them."""
    if not 0 <= step < 10**12:
        raise ValueError(f"step must be in 0..1e12, not {step}")
    path = _save(Path(folder), _valid_stage(stage), step, plan, state_dict, extra or {}, state)
    newest = path.name
    mine = [n for n in _names(path.parent) if n.startswith(f"{stage}@") and _key(n) <= _key(newest)]
    for name in mine[: -max(1, keep)]:
        _remove_quietly(path.parent / name)
    return path


def load(path: str | Path) -> Checkpoint:
    """Read one checkpoint folder and verify every checksum. UserError says which file is missing or damaged."""
    path = Path(path)
    match = _NAME.fullmatch(path.name)
    files = _verified_files(path)
    state = storage.read_json(path / STATE)
    if not isinstance(state, dict) or state.get("schema") != SCHEMA or not isinstance(state.get("extra"), dict):
        raise UserError(f"{path / STATE}: not a checkpoint state of schema {SCHEMA}.")
    tensors = _read_tensors(path / TENSORS) if TENSORS in files else {}
    decoded = decode(state.get("state"), tensors, f"{path / STATE}")
    others = decode(state.get("model"), tensors, f"{path / STATE}: model")
    stage, step = state.get("stage"), state.get("step")
    if not isinstance(stage, str) or not _STAGE.fullmatch(stage) or not (step is None or type(step) is int):
        raise UserError(f"{path / STATE}: names no stage and step.")
    if match and (stage, step) != _stage_and_step(path.name):
        raise UserError(f"{path}: holds the checkpoint of {stage} at {step}, not the one its name says.")
    model = _read_tensors(path / MODEL) | (others if isinstance(others, dict) else {})
    return Checkpoint(path, stage, step, Plan.load(path / PLAN), model, state["extra"], decoded)


def finished_stages(folder: Path) -> list[str]:
    """The ids of the finished stages whose checkpoints lie in ``folder``, in order."""
    return [name for name in _names(Path(folder)) if "@" not in name]


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest sound checkpoint, or None when there is none: then the run starts from the beginning.

    Each damaged newer one is passed over with a warning and named in ``skipped``. Changes nothing on disk; call
    `recover` first where a process may have been killed (`RunFolder.locked` does).
    """
    return next(newest_first(folder), None)


def newest_first(folder: Path) -> Iterator[Checkpoint]:
    """The sound checkpoints, newest first, read as they are asked for; each damaged one is warned of."""
    folder = Path(folder)
    skipped: list[str] = []
    sound = False
    for name in reversed(_committed(folder)):
        try:
            found = load(folder / name)
        except UserError as error:
            skipped.append(str(error))
            warnings.warn(f"checkpoint {name} is damaged and passed over: {error}", stacklevel=3)
            continue
        sound = True
        yield replace(found, skipped=tuple(skipped))
    if skipped and not sound:
        warnings.warn(f"{folder}: no sound checkpoint is left; the run starts from the beginning.", stacklevel=3)


def rewind(folder: Path, stage_index: int) -> None:
    """Forget every checkpoint of stage ``stage_index`` and later ones (0: all), in an order that survives a crash."""
    folder = Path(folder)
    recover(folder)
    keep = [n for n in _committed(folder) if _key(n)[0] < stage_index]
    try:
        if keep:
            _point_latest(folder, keep[-1])
        elif (folder / LATEST).exists():
            _point_latest(folder, "")
        for name in reversed(_names(folder)):
            if _key(name)[0] >= stage_index:
                storage.remove_folder(folder / name)
    except OSError as error:
        raise storage.write_error(folder, error, "Earlier stages are kept.") from error


def recover(folder: Path) -> None:
    """Finish or undo what a killed process was in the middle of. Only while holding the run's lock."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    for entry in sorted(os.listdir(folder)):
        if entry.startswith(_OLD) and not (folder / entry.removeprefix(_OLD)).exists():
            os.replace(folder / entry, folder / entry.removeprefix(_OLD))
        elif entry.startswith(_OLD):
            _remove_quietly(folder / entry)
    committed = _committed(folder)
    for name in _names(folder):
        stage, step = _stage_and_step(name)
        # Never pointed to, left over from a rewind that was cut short, or a place inside a stage that is done.
        if name not in committed or (step is not None and stage in committed):
            _remove_quietly(folder / name)
    storage.remove_litter(folder)


_OLD = ".old-"


def _save(
    folder: Path,
    stage: str,
    step: int | None,
    plan: Plan,
    state_dict: Mapping[str, Any],
    extra: Mapping[str, Any],
    state: Any,
) -> Path:
    name = stage if step is None else f"{stage}@{step:09d}"
    kept = "Every earlier checkpoint is kept."
    files = _contents(stage, step, plan, state_dict, extra, state)
    temporary, target = folder / f"{storage.TEMPORARY_PREFIX}{name}-{os.getpid()}", folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder)
        os.mkdir(temporary)
        for file, data in files.items():
            storage.write_bytes(temporary / file, data)
        storage.sync_folder(temporary)
        _swap_in(temporary, target)
        storage.sync_folder(folder)
        _point_latest(folder, name)
    except OSError as error:
        if temporary.exists():
            _remove_quietly(temporary)
        raise storage.write_error(target, error, kept) from error
    return target


def _contents(
    stage: str, step: int | None, plan: Plan, state_dict: Mapping[str, Any], extra: Mapping[str, Any], state: Any
) -> dict[str, bytes]:
    weights = {k: v for k, v in state_dict.items() if isinstance(v, torch.Tensor)}
    others = {k: v for k, v in state_dict.items() if not isinstance(v, torch.Tensor)}
    try:
        if "__metadata__" in weights:
            raise TypeError("a parameter named '__metadata__' cannot be stored in a safetensors file")
        both, tensors = encode([state, others])
        skeleton, model = both
        head = {"schema": SCHEMA, "stage": stage, "step": step, "extra": storage.plain(extra)}
        text = storage.to_json({**head, "state": skeleton, "model": model}, indent=1)
        files = {PLAN: plan.to_json().encode(), MODEL: to_safetensors(unshared(weights)), STATE: text.encode()}
        if tensors:
            files[TENSORS] = to_safetensors(tensors)
    except (TypeError, SafetensorError) as error:
        raise RunError(f"stage {stage}: the checkpoint cannot be written: {error}. Earlier ones are kept.") from error
    listing = {name: {"sha256": _sha256(data), "bytes": len(data)} for name, data in files.items()}
    files[MANIFEST] = storage.to_json({"schema": SCHEMA, "files": listing}, indent=1).encode()
    return files


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _swap_in(temporary: Path, target: Path) -> None:
    # A folder cannot be renamed over a full one, so the old one steps aside; `recover` brings it back after a crash.
    if not target.exists():
        os.replace(temporary, target)
        return
    old = target.with_name(f"{_OLD}{target.name}")
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(old, target)
        raise
    _remove_quietly(old)


def _point_latest(folder: Path, name: str) -> None:
    storage.write_text_atomic(folder / LATEST, name + "\n", "Every earlier checkpoint is kept.")


def _verified_files(path: Path) -> set[str]:
    manifest = storage.read_json(path / MANIFEST, 1 << 20)
    files = manifest.get("files") if isinstance(manifest, dict) and manifest.get("schema") == SCHEMA else None
    if not isinstance(files, dict) or not {PLAN, MODEL, STATE} <= set(files) <= {PLAN, MODEL, STATE, TENSORS}:
        raise UserError(f"{path / MANIFEST}: not a checkpoint manifest of schema {SCHEMA}.")
    for name, entry in files.items():
        limit = MOST_JSON if name.endswith(".json") else None
        if not isinstance(entry, dict) or storage.sha256_file(path / name, limit) != entry.get("sha256"):
            raise UserError(f"{path / name}: damaged (its checksum is not the one in {MANIFEST}).")
    return set(files)


def _read_tensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except _LOAD_ERRORS as error:
        raise UserError(f"{path}: not a sound safetensors file ({str(error)[:200]}).") from None


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted((n for n in os.listdir(folder) if _NAME.fullmatch(n) and (folder / n).is_dir()), key=_key)


def _committed(folder: Path) -> list[str]:
    names = _names(folder)
    try:
        latest = storage.read_bytes(folder / LATEST, 1 << 10).decode("utf-8", "replace").strip()
    except UserError:
        return names  # killed between the first folder and the first pointer, or the pointer is gone
    if not latest:
        return []
    return [n for n in names if _key(n) <= _key(latest)] if _NAME.fullmatch(latest) else names


def _key(name: str) -> tuple[int, int, int]:
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[3] is None), int(match[3] or 0)


def _stage_and_step(name: str) -> tuple[str, int | None]:
    stage, _, step = name.partition("@")
    return stage, int(step) if step else None


def _valid_stage(stage: str) -> str:
    if not _STAGE.fullmatch(stage):
        raise ValueError(f"a stage id is NUMBER-NAME, like '1-prune', not {stage!r}")
    return stage


def _remove_quietly(folder: Path) -> None:
    try:
        storage.remove_folder(folder)
    except OSError as error:  # a checkpoint too many is no reason to stop a run
        warnings.warn(f"{folder}: could not be removed ({error}).", stacklevel=3)
