"""Numbers from files of unknown origin, and numbers for people.

`number`, `text` and their like never trust a type: what is not what it should be is None. The formatters turn None
into a dash, so "not measured" can never be read as zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

DASH = "–"
MINUS = "−"
DIVERGED = {"NaN": "NaN", "Infinity": "∞", "-Infinity": f"{MINUS}∞"}


def number(value: Any) -> float | None:
    """A finite float, or None for anything else (also booleans and integers too large for a float)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def text(value: Any, limit: int = 120) -> str:
    """A short single-line text of a scalar; empty for None and for containers."""
    if isinstance(value, bool) or value is None or isinstance(value, (dict, list)):
        return str(value).lower() if isinstance(value, bool) else ""
    if isinstance(value, int) and abs(value) > 10**30:
        return "(a very large integer)"
    line = " ".join(str(value)[: 2 * limit].split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def mapping(value: Any) -> dict[str, Any]:
    """``value`` when it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def records(value: Any) -> list[dict[str, Any]]:
    """The objects in a list; empty when it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the numbers that are there."""
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def width_of(value: float | None, of: float | None) -> str:
    """The width of a bar in per cent, "0" to "100.0"; "0" when either is unknown."""
    if not value or not of or value < 0 or of < 0:
        return "0"
    return f"{100 * min(1.0, value / of):.1f}"


def percent(value: Any, digits: int = 1) -> str:
    """A share as per cent; what is short of all is never rounded up to 100.

    >>> percent(0.98765), percent(0.99999), percent(None), percent("NaN")
    ('98.8 %', '99.9 %', '–', 'NaN')
    """
    found = number(value)
    if found is None:
        return _odd(value)
    shown = min(100 * found, 100 - 10.0**-digits) if found < 1 else 100 * found
    return f"{_signed(shown, digits)} %"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, with its sign.

    >>> points(-0.0123), points(0.0), points(None)
    ('−1.2 pt', '±0.0 pt', '')
    """
    if value is None:
        return ""
    rounded = round(100 * value, 1)
    return "±0.0 pt" if rounded == 0 else f"{'+' if rounded > 0 else MINUS}{abs(rounded):.1f} pt"


def factor(value: float | None) -> str:
    """How many times smaller or larger: ``÷2.0`` or ``×1.5``; empty when unknown or unchanged.

    >>> factor(0.5), factor(1.5), factor(1.0), factor(None)
    ('÷2.0', '×1.5', '', '')
    """
    if value is None or value <= 0 or abs(value - 1) < 0.005:
        return ""
    times, sign = (value, "×") if value > 1 else (1 / value, "÷")
    return f"{sign}{times:.2g}" if times < 10 and times < 1.095 else f"{sign}{times:,.{1 if times < 100 else 0}f}"


def size(value: Any) -> str:
    """Bytes in the decimal units that file managers and data sheets use.

    >>> size(999), size(20_480), size(11_800_000), size(None)
    ('999 B', '20.5 kB', '11.8 MB', '–')
    """
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def count(value: Any) -> str:
    """A count with a short suffix.

    >>> count(78_666), count(12_501_632), count(12)
    ('78.7 k', '12.5 M', '12')
    """
    return _scaled(value, ("", " k", " M", " G", " T"))


def significant(value: Any, digits: int = 3) -> str:
    """A plain number with so many significant digits.

    >>> significant(0.0123456), significant(1234567), significant(3)
    ('0.0123', '1.23e6', '3')
    """
    found = number(value)
    if found is None:
        return _odd(value)
    if found == int(found) and abs(found) < 10**5:
        return _signed(found, 0)
    if 1e-3 <= abs(found) < 10**5:
        return _signed(float(f"{found:.{digits}g}"), max(0, digits - 1 - math.floor(math.log10(abs(found)))))
    mantissa, exponent = f"{found:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", MINUS)


def duration(value: Any) -> str:
    """Seconds as people say them.

    >>> duration(0.25), duration(8.4), duration(95), duration(7322), duration(None)
    ('0.2 s', '8.4 s', '1 min 35 s', '2 h 02 min', '–')
    """
    found = number(value)
    if found is None:
        return _odd(value)
    if found < 59.95:
        return f"{_signed(found, 1)} s"
    minutes, seconds = divmod(round(found), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def milliseconds(value: Any) -> str:
    """A latency.

    >>> milliseconds(0.1234), milliseconds(12.34), milliseconds(None)
    ('0.123 ms', '12.3 ms', '–')
    """
    found = number(value)
    return _odd(value) if found is None else f"{significant(found)} ms"


def _scaled(value: Any, units: tuple[str, ...]) -> str:
    found = number(value)
    if found is None:
        return _odd(value)
    sign, found = (MINUS if found < 0 else ""), abs(found)
    if found < 999.5:
        return f"{sign}{found:.0f}{units[0]}"
    steps = next((n for n in range(1, len(units)) if found < 999.95 * 1000**n), len(units) - 1)
    return f"{sign}{found / 1000**steps:,.1f}{units[steps]}"[:40]


def _signed(value: float, digits: int) -> str:
    shown = f"{value:,.{digits}f}"
    return (shown.lstrip("-") if not shown.strip("-0.,") else shown.replace("-", MINUS))[:40]


def _odd(value: Any) -> str:
    return DIVERGED.get(value, DASH) if isinstance(value, str) else DASH
