"""Options that are more than a word or a number."""

from __future__ import annotations

from flatcompress.errors import UserError


def shape_of(text: str | None) -> tuple[int, int, int] | None:
    """``3,224,224`` as three numbers. UserError for anything else.

    >>> shape_of("1,28,28")
    (1, 28, 28)
    """
    if text is None:
        return None
    sides = text.replace("x", ",").split(",")
    if len(sides) != 3 or not all(side.strip().isdigit() and int(side) > 0 for side in sides):
        raise UserError(f"--input-shape {text!r}: three numbers, channels, height and width, for example 3,224,224.")
    channels, height, width = (int(side) for side in sides)
    return channels, height, width


def numbers_of(option: str, text: str | None) -> list[float] | None:
    """``0.5,0.5,0.5`` as numbers. UserError for anything else.

    >>> numbers_of("--mean", "0.5,0.25")
    [0.5, 0.25]
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r}: one number a channel, for example 0.485,0.456,0.406.") from None
