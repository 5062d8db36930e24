"""One emoji as a square picture: rastered, cut to what is drawn, on a light ground."""

from __future__ import annotations

import io

import torch
from PIL import Image

from flatcompress.errors import UserError
from flatcompress.randomness import generator

MARGIN = 0.05  # of the side, around what is drawn: every vendor leaves another one
DARKEST = 200  # of 255, of a ground's three colours
_RASTER = 4  # svg is rastered at so many times the side


def picture(content: bytes, suffix: str, size: int, where: str) -> Image.Image:
    """RGBA, ``size`` x ``size``: what is drawn fills it but for the margin. UserError for what cannot be drawn."""
    image = _raster(content, size * _RASTER, where) if suffix == ".svg" else _opened(content, where)
    box = image.getchannel("A").getbbox()
    if box is None:
        raise UserError(f"{where}: nothing is drawn on it.")
    image = image.crop(box)
    room = max(1, round(size * (1 - 2 * MARGIN)))
    scale = room / max(image.size)
    fitted = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), _LANCZOS)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return canvas


_LANCZOS = Image.Resampling.LANCZOS


def on_ground(image: Image.Image, domain: str, code: str) -> Image.Image:
    """RGB, on a light colour drawn for this picture: a vendor's own ground would give its hand away."""
    colour = torch.randint(DARKEST, 256, (3,), generator=generator(0, "ground", domain, code)).tolist()
    ground = Image.new("RGBA", image.size, (*colour, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def _opened(content: bytes, where: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: cannot be read as a picture ({error}).") from None


def needs_resvg() -> None:
    """UserError where the library that draws svg is not installed."""
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        raise UserError("drawing svg files needs resvg-py: pip install 'flatcompress[emoji]'.") from None


def _raster(content: bytes, side: int, where: str) -> Image.Image:
    needs_resvg()
    import resvg_py

    try:
        drawn = resvg_py.svg_to_bytes(svg_string=content.decode(), width=side)
    except Exception as error:  # whatever the library makes of a file
        raise UserError(
            f"{where}: cannot be drawn ({str(error).splitlines()[0][:200] if str(error) else error!r})."
        ) from None
    return _opened(bytes(drawn), where)
