"""Finds and reads a certificate, which may come from anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flatcompress.errors import UserError
from flatcompress.onnx_export.proof.certificate import SCHEMA

_MOST_JSON = 32 << 20
_NEEDED = {"holds": bool, "file": dict, "evidence": dict, "parity": dict, "metric": dict, "kernels": dict}


def certificate_of(path: Path) -> Path:
    """The certificate of a run folder, an ONNX file or itself. UserError: there is none."""
    if path.is_dir():
        path = path / "certificate.json"
    elif path.suffix == ".onnx":
        if not path.is_file():
            raise UserError(f"{path}: no such file.")
        path = path.with_name("certificate.json")
    if not path.is_file():
        raise UserError(f"{path}: there is no certificate; an export stage writes one beside the model.")
    return path


def read_certificate(path: Path) -> dict[str, Any]:
    """A certificate as plain data. UserError: unreadable, or none."""
    try:
        if path.stat().st_size > _MOST_JSON:
            raise UserError(f"{path}: too large for a certificate.")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON, or cut off ({error}).") from None
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        raise UserError(f"{path}: not a certificate of schema {SCHEMA} (found {found!r}).")
    for key, kind in _NEEDED.items():
        if not isinstance(raw.get(key), kind):
            raise UserError(f"{path}: not a certificate: {key!r} is missing or no {kind.__name__}.")
    return raw
