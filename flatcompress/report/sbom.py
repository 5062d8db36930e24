"""sbom.cdx.json: what a run's file was made of, as a CycloneDX bill of materials (extra ``trust``)."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flatcompress.errors import UserError
from flatcompress.report.gather import Run, gather
from flatcompress.report.numbers import mapping, text
from flatcompress.storage import sha256_file, write_text_atomic

NAME = "sbom.cdx.json"
_SPACE = uuid.UUID("3b0b4f0c-6f0e-5d3a-9d55-7d1c3a0f6f11")  # of serial numbers: the same file has the same one


def build(folder: str | Path) -> Path:
    """Write ``sbom.cdx.json`` into a run folder: CycloneDX 1.6 JSON, valid against its schema.

    The component is the exported file with its SHA-256; below it are the network, the data set and the packages that
    the certificate names, with their versions. UserError: no exported file, or the package is not installed.
    """
    run = gather(folder)
    path = run.path / NAME
    write_text_atomic(path, render(run), "The bill of materials before this one is kept.")
    return path


def render(run: Run) -> str:
    """The bill as text. The same run gives the same text: its time is the file's."""
    _require()
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.output.json import JsonV1Dot6

    claim = mapping(mapping(run.certificate).get("file"))
    name = str(claim.get("name") or "model.onnx")
    file = run.path / name
    if Path(name).name != name or not file.is_file():
        raise UserError(f"{run.path}: there is no exported file to list; add an export stage and run again.")
    digest, whole = sha256_file(file), _file(run, file)
    parts = [_model(run), _data(run), *_packages(run)]
    made = datetime.fromtimestamp(int(file.stat().st_mtime), tz=UTC)
    bom = Bom(serial_number=uuid.uuid5(_SPACE, digest), metadata=BomMetaData(component=whole, timestamp=made))
    for part in parts:
        bom.components.add(part)
    bom.register_dependency(whole, parts)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _file(run: Run, file: Path) -> Any:
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType

    certificate = mapping(run.certificate)
    claim = mapping(certificate.get("file"))
    told = {
        "bytes": file.stat().st_size,
        "profile": claim.get("profile"),
        "opset": claim.get("opset"),
        "recipe_sha256": certificate.get("recipe_sha256"),
        "certificate_holds": certificate.get("holds"),
    }
    return Component(
        name=file.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=file.name,
        description=f"{text(run.name, 80)}: exported by flatcompress",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256_file(file))],
        properties=[Property(name=f"flatcompress:{k}", value=text(v, 200)) for k, v in told.items() if v is not None],
    )


def _model(run: Run) -> Any:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    section = mapping(run.recipe.get("model"))
    weights = section.get("weights")
    start = Path(str(weights)) if weights else None
    known = start is not None and start.is_file()
    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=sha256_file(start))] if known and start is not None else []
    said = f"starting from the weights {text(weights, 200)}" if weights else "trained from random weights"
    name = text(section.get("name"), 120) or "unknown network"
    return Component(name=name, type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref="network", description=said,
                     hashes=hashes)  # fmt: skip


def _data(run: Run) -> Any:
    from cyclonedx.model.component import Component, ComponentType

    name = text(mapping(run.recipe.get("data")).get("name"), 120) or "unknown data set"
    return Component(name=name, type=ComponentType.DATA, bom_ref="data")


def _packages(run: Run) -> list[Any]:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    found = []
    for package, version in sorted(mapping(mapping(run.certificate).get("versions")).items()):
        kind = ComponentType.PLATFORM if package == "python" else ComponentType.LIBRARY
        purl = None if package == "python" else PackageURL("pypi", name=text(package, 80), version=text(version, 40))
        found.append(Component(name=text(package, 80), version=text(version, 40), type=kind, purl=purl,
                               bom_ref=f"package:{text(package, 80)}"))  # fmt: skip
    return found


def _require() -> None:
    try:
        import cyclonedx.output.json  # noqa: F401
    except ImportError:
        raise UserError("a bill of materials needs cyclonedx-python-lib: pip install 'flatcompress[trust]'.") from None
