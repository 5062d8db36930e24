"""Who made a file: a detached signature over it, its certificate and its evidence (extra ``trust``).

A certificate says that a file computes what its reference computes; it does not say who wrote either. ``model.sig``
is a Sigstore bundle in the layout of the OpenSSF Model Signing specification (https://github.com/ossf/model-signing-spec),
made with an elliptic-curve key by the package model-signing, so any tool of that layout can check it as well.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from flatcompress.errors import UserError
from flatcompress.onnx_export.proof.reading import certificate_of, read_certificate

NAME = "model.sig"


def sign(path: str | Path, key: str | Path, password: str | None = None) -> Path:
    """Write ``model.sig`` beside the certificate of ``path`` (a run folder, an ONNX file or a certificate).

    ``key``: a PEM file with an elliptic-curve private key (P-256, P-384 or P-521); ``password`` if it is encrypted.
    Signed are the files that `verify` reads: the ONNX file, certificate.json, evidence.safetensors, and sbom.cdx.json
    where there is one. UserError: no certificate, a missing file, a key that is none, model-signing not installed.
    """
    where = certificate_of(Path(path))
    files = _shipped(where.parent, read_certificate(where))
    signing, _, hashing = _library()
    _readable(key, "private")
    others = [p.name for p in where.parent.iterdir() if p.name not in files]
    target = where.parent / NAME
    try:
        made = signing.Config().use_elliptic_key_signer(private_key=Path(key), password=password)
        made.set_hashing_config(hashing.Config().set_ignored_paths(paths=others)).sign(where.parent, target)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{key}: not an elliptic-curve private key in PEM, or another password ({error}). Make one with "
            "`openssl ecparam -name prime256v1 -genkey -noout -out private.pem`."
        ) from None
    return target


def check(folder: Path, certificate: dict[str, Any], key: str | Path) -> str | None:
    """Why ``model.sig`` of ``folder`` does not prove that the key's owner signed these files; None: it does.

    ``key``: a PEM file with the public key. UserError: a key that is none, model-signing not installed.
    """
    bundle = folder / NAME
    _, verifying, _ = _library()
    _readable(key, "public")
    if not bundle.is_file():
        return f"{bundle}: no signature. `flatcompress sign` writes it."
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=Path(key))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{key}: not a public key in PEM ({error}).") from None
    try:
        config.set_ignore_unsigned_files(True).verify(folder, bundle)
    except Exception as error:  # whatever a foreign bundle makes the library raise is a signature that does not hold
        return f"{bundle}: the signature does not hold: {_in_short(error)}"
    missing = sorted(set(_shipped(folder, certificate)) - _signed(bundle))
    return f"{bundle}: does not cover {', '.join(missing)}." if missing else None


def _shipped(folder: Path, certificate: dict[str, Any]) -> list[str]:
    """Names of the files that a signature covers."""
    needed = [str(certificate["file"]["name"]), "certificate.json", str(certificate["evidence"]["name"])]
    for name in needed:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / name}: not there, so it cannot be signed. Export again.")
    return needed + [name for name in ("sbom.cdx.json",) if (folder / name).is_file()]


def _signed(bundle: Path) -> set[str]:
    """Names of the files in a bundle whose signature holds: the subject of its in-toto statement."""
    statement = json.loads(base64.b64decode(json.loads(bundle.read_text())["dsseEnvelope"]["payload"]))
    return {row["name"] for row in statement["predicate"]["resources"]}


def _in_short(error: Exception) -> str:
    """What the library says, without its digests.

    >>> _in_short(ValueError("Signature mismatch: [Hash mismatch for 'a': Expected 'Digest(1)', Actual 'Digest(2)']"))
    "Hash mismatch for 'a'"
    """
    said = re.findall(r"Hash mismatch for '[^']*'", str(error))
    return "; ".join(said) or f"{type(error).__name__} {str(error)[:200]}".strip()


def _readable(key: str | Path, kind: str) -> None:
    if not Path(key).is_file():
        raise UserError(f"{key}: not a file. Give the {kind} key as a PEM file.")


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise UserError(
            f"signatures need model-signing: pip install 'flatcompress[trust]' (its import said: {error})."
        ) from None
    return signing, verifying, hashing
