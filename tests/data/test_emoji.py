"""The emoji data set is built from packages as npm writes them: small ones, drawn here."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from flatcompress import data
from flatcompress.cli.app import _guarded
from flatcompress.data.emoji import building, drawing
from flatcompress.data.emoji.classes import CLASSES, capped, chosen, is_variant
from flatcompress.data.emoji.packages import PACKAGES, Package, key
from flatcompress.errors import UserError

SIDE = 20
SUBGROUPS = ("animal-bird", "drink")
CODES = {subgroup: [f"1f{n}{i}0" for i in range(5)] for n, subgroup in enumerate(SUBGROUPS, 4)}
METADATA = [
    {"image": f"{code}-fe0f.png", "subcategory": subgroup, "sort_order": i}
    for subgroup, codes in CODES.items() for i, code in enumerate(codes)
] + [{"image": "1f1e6.png", "subcategory": "country-flag", "sort_order": 99}]  # fmt: skip


def png(colour: str, box: tuple[int, int, int, int] = (3, 5, 9, 15)) -> bytes:
    image = Image.new("RGBA", (SIDE, SIDE))
    ImageDraw.Draw(image).rectangle(box, fill=colour)
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def packed(folder: Path, package: Package, files: dict[str, bytes]) -> Package:
    with tarfile.open(folder / package.file, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return replace(package, sha256=hashlib.sha256((folder / package.file).read_bytes()).hexdigest())


def drawn(folder: Path, missing: str = "") -> tuple[Package, ...]:
    """Two hands: one names its files in capitals with a variation selector, the other in small letters without."""
    folder.mkdir()
    listed = Package("art", "@a/art", "1.0.0", "", "package/img", ".png", "Art", "MIT", "package/emoji.json")
    other = Package("line", "line", "2.0.0", "", "package/x", ".png", "Line", "CC-BY-4.0")
    codes = [code for group in CODES.values() for code in group]
    first = {f"package/img/{code.upper()}-FE0F.png": png("red") for code in codes}
    second = {f"package/x/{code}.png": png("blue", (1, 1, 18, 8)) for code in codes if code != missing}
    return (
        packed(folder, listed, {"package/emoji.json": json.dumps(METADATA).encode(), **first}),
        packed(folder, other, {**second, "package/other/1f1e6.png": png("blue")}),
    )  # fmt: skip


def test_every_domain_has_the_same_emoji_under_the_same_names(tmp_path):
    table = drawn(tmp_path / "pk", missing=CODES["drink"][0])
    made = building.build(tmp_path / "pk", tmp_path / "out", 16, ("art", "line"), table=table)
    found = {}
    for domain in ("art", "line"):
        folder = tmp_path / "out" / domain
        found[domain] = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    assert found["art"] == found["line"] == sorted(
        [f"bird/{code}.png" for code in CODES["animal-bird"]] + [f"drink/{code}.png" for code in CODES["drink"][1:]]
    )  # fmt: skip
    assert made["classes"] == {"bird": 5, "drink": 4} and made["images"] == 18
    assert made["left_out"]["not in every package"] == 1
    assert json.loads((tmp_path / "out" / "counts.json").read_text())["identities"] == 9
    assert "CC-BY-4.0" in (tmp_path / "out" / "LICENSES.txt").read_text()
    assert Image.open(tmp_path / "out" / "contact-sheet.png").size[1] > 60


def test_the_set_is_read_as_domains_and_no_emoji_is_in_two_parts(tmp_path):
    table = drawn(tmp_path / "pk")
    building.build(tmp_path / "pk", tmp_path / "out", 16, ("art", "line"), table=table)
    with pytest.warns(UserWarning, match="held_out_seen"):
        bundle = data.load(
            "domains", path=str(tmp_path / "out"), size=16, held_out="line", group="name", corruptions="none",
            val_fraction=0.2, test_fraction=0.2,
        )  # fmt: skip
    unseen, seen = set(bundle.held_out.identities.tolist()), set(bundle.held_out_seen.identities.tolist())
    assert not unseen & set(bundle.train.identities.tolist()) and not unseen & seen
    assert len(bundle.held_out) + len(bundle.held_out_seen) == 10


def test_the_same_packages_give_the_same_bytes(tmp_path):
    table = drawn(tmp_path / "pk")
    for name in ("a", "b"):
        building.build(tmp_path / "pk", tmp_path / name, 16, ("art", "line"), table=table)
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_what_is_drawn_fills_the_picture_and_keeps_its_shape():
    image = drawing.picture(png("red", (8, 4, 11, 13)), ".png", 40, "here")  # 4 x 10 pixels
    left, top, right, bottom = image.getchannel("A").point(lambda v: 255 * (v > 127)).getbbox()
    assert abs((bottom - top) - 36) <= 2 and abs((right - left) - 36 * 4 / 10) <= 2
    assert abs((left + right) / 2 - 20) <= 1 and abs((top + bottom) / 2 - 20) <= 1


def test_an_outline_is_rastered():
    pytest.importorskip("resvg_py")
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><rect x="2" y="2" width="4" height="4"/></svg>'
    image = drawing.on_ground(drawing.picture(svg, ".svg", 20, "here"), "outline", "1f600")
    assert image.getpixel((10, 10)) == (0, 0, 0) and min(image.getpixel((0, 0))) >= drawing.DARKEST


def test_without_the_library_that_draws_svg_it_says_what_to_install(tmp_path, monkeypatch):
    art, line = drawn(tmp_path / "pk")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"pip install 'flatcompress\[emoji\]'"):
        building.build(
            tmp_path / "pk", tmp_path / "out", 16, ("art", "line"), table=(art, replace(line, suffix=".svg"))
        )


def test_missing_packages_are_named_with_the_commands_that_fetch_them(tmp_path, capsys):
    (tmp_path / "pk").mkdir()
    assert _guarded(["data", "emoji-domains", "--packages", str(tmp_path / "pk"), "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert all(p.command in said for p in PACKAGES if p.domain != "flat") and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 4}, "size must lie in"), ({"domains": ("art", "photo")}, "photo"), ({"domains": ("art",)}, "two of"),
        ({"most": 1}, "most be 3 or more"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused(change, reason, tmp_path):
    table = drawn(tmp_path / "pk")
    with pytest.raises(UserError, match=reason):
        building.build(tmp_path / "pk", tmp_path / "out", **{"domains": ("art", "line"), "table": table, **change})
    assert not (tmp_path / "out").exists()


def test_another_file_of_that_name_is_refused(tmp_path):
    table = drawn(tmp_path / "pk")
    with (tmp_path / "pk" / table[1].file).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="SHA-256"):
        building.build(tmp_path / "pk", tmp_path / "out", 16, ("art", "line"), table=table)


def test_a_picture_that_cannot_be_drawn_leaves_nothing_behind(tmp_path):
    art, line = drawn(tmp_path / "pk")
    codes = [code for group in CODES.values() for code in group]
    broken = packed(tmp_path / "pk", line, {f"package/x/{code}.png": b"no picture" for code in codes})
    with pytest.raises(UserError, match=r"line-2.0.0.tgz: 1f400.png"):
        building.build(tmp_path / "pk", tmp_path / "out", 16, ("art", "line"), table=(art, broken))
    assert [p.name for p in tmp_path.iterdir()] == ["pk"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    table = drawn(tmp_path / "pk")
    with pytest.raises(UserError, match="is there already"):
        building.build(tmp_path / "pk", tmp_path / "pk", 16, ("art", "line"), table=table)


def test_a_list_that_names_no_code_points_is_refused():
    with pytest.raises(UserError, match="no code points"):
        chosen(json.dumps([{"image": "../x.png", "subcategory": "drink", "sort_order": 1}]).encode())
    with pytest.raises(UserError, match="cannot be read"):
        chosen(b"{}x")


def test_a_capped_class_keeps_its_spread():
    codes = {f"{i:x}": "face" for i in range(100)}
    kept = list(capped(codes, 10))
    assert kept == [f"{i:x}" for i in range(0, 100, 10)]


def test_every_subgroup_belongs_to_one_class():
    subgroups = [s for group in CLASSES.values() for s in group]
    assert len(subgroups) == len(set(subgroups)) and len(CLASSES) == 24


def test_the_same_drawing_of_another_sex_or_skin_is_one_emoji():
    assert key("1F3C3-200D-2642-FE0F.svg") == "1f3c3-200d-2642"
    assert [is_variant(c) for c in ("1f3c3-200d-2642", "1f44b-1f3fb", "1f468-200d-1f33e", "1f468", "2640")] == [
        True, True, True, False, False,
    ]  # fmt: skip
