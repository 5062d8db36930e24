"""The preview sheet: what the data looks like, domain by domain and corrupted."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from flatcompress.data.bundle import DataBundle, ImageSet

_LABEL, _GAP, _TILE, _THUMBNAIL = 190, 2, 48, 64
_DRAWN, _LARGE = 12, 192  # samples of a part that are drawn, pixels of their longer side


def sheet(bundle: DataBundle, columns: int = 12) -> Image.Image:
    """An RGB image: one labelled row per domain (one for all where there are none), then one per corruption kind."""
    rows = _domain_rows(bundle, columns) + _corrupted_rows(bundle, columns)
    height, width = bundle.input_shape[1:]
    scale = max(1, round(_TILE / max(height, width)))
    tile = (width * scale, height * scale) if max(height, width) <= 2 * _TILE else (_TILE, _TILE)
    canvas = Image.new("RGB", (_LABEL + columns * (tile[0] + _GAP), len(rows) * (tile[1] + _GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for line, (label, images) in enumerate(rows):
        top = line * (tile[1] + _GAP)
        draw.text((4, top + tile[1] // 2 - 8), label.encode("latin-1", "replace").decode("latin-1")[:24], "black", font)
        for column, picture in enumerate(images):
            canvas.paste(picture.resize(tile, Image.Resampling.NEAREST), (_LABEL + column * (tile[0] + _GAP), top))
    return canvas


def png(bundle: DataBundle) -> bytes:
    """`sheet` as the bytes of a PNG file; nothing for inputs that are no images."""
    if len(bundle.input_shape) != 3:
        return b""
    picture = io.BytesIO()
    sheet(bundle).save(picture, format="PNG", compress_level=1)  # a tenth larger, in a third of the time
    return picture.getvalue()


def thumbnail(bundle: DataBundle, part: str, index: int) -> str:
    """Sample ``index`` of "test", "held_out" or a corrupted copy, at most 64 pixels a side, as a data URI of a PNG."""
    images = {"test": bundle.test, "held_out": bundle.held_out}.get(part) or bundle.corrupted[part]
    picture = _picture(images.pixels([index])[0])
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return _uri(picture)


def drawn(bundle: DataBundle, model: nn.Module, device: torch.device | str = "cpu") -> list[tuple[str, int, str]]:
    """(part, index, data URI of a PNG): samples of the test and the held-out part with what ``model`` gives for them.

    Nothing where the task does not say how a sample is drawn.
    """
    if bundle.task.drawn is None:
        return []
    found = []
    for part, images in (("test", bundle.test), ("held_out", bundle.held_out)):
        rows = list(range(min(_DRAWN, len(images)))) if images is not None else []
        if images is None or not rows:
            continue
        x, y = images.__getitems__(rows)
        with torch.no_grad():
            outputs = model.eval()(x.to(device)).cpu()
        for row, pixels in zip(rows, images.pixels(rows)):
            picture = _picture(pixels)
            scale = max(1, round(_LARGE / max(picture.size)))
            picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
            picture.thumbnail((_LARGE, _LARGE))
            found.append((part, row, _uri(bundle.task.drawn(picture, outputs[row], y[row], bundle.classes))))
    return found


def _uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _domain_rows(bundle: DataBundle, columns: int) -> list[tuple[str, list[Image.Image]]]:
    if not bundle.domains:
        return [(bundle.name, _pictures(bundle.train, torch.arange(len(bundle.train)), columns))]
    rows = []
    for number, domain in enumerate(bundle.domains):
        unseen = domain == bundle.held_out_domain
        images = bundle.held_out if unseen and bundle.held_out is not None else bundle.train
        members = (images.domain_ids == number).nonzero().flatten()
        if len(members):
            rows.append((f"{domain} (held out)" if unseen else domain, _pictures(images, members, columns)))
    return rows


def _corrupted_rows(bundle: DataBundle, columns: int) -> list[tuple[str, list[Image.Image]]]:
    hardest = {key.partition("/")[0]: key for key in sorted(bundle.corrupted)}
    return [
        (key, _pictures(bundle.corrupted[key], torch.arange(len(bundle.corrupted[key])), columns))
        for key in sorted(hardest.values())
    ]


def _pictures(images: ImageSet, members: torch.Tensor, columns: int) -> list[Image.Image]:
    """Up to ``columns`` samples, the classes in turn, always the same ones."""
    order = images.labels[members].argsort(stable=True)
    step = max(1, len(order) // columns)
    chosen = members[order[::step][:columns]]
    return [_picture(pixels) for pixels in images.pixels(chosen.tolist())]


def _picture(pixels: torch.Tensor) -> Image.Image:
    if pixels.shape[0] in (1, 2):
        return Image.fromarray(pixels[0].numpy()).convert("RGB")
    return Image.fromarray(pixels[:3].permute(1, 2, 0).contiguous().numpy())
