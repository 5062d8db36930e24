"""Damage for files: to their bytes, or hostile values inside a structure that stays sound."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from typing import Any

Rng = random.Random

HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 1e308, -0.0, 1e-320, 10**400, "", " ", "\x00", "nan", "NaN",
    "Infinity", "../../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "<script>alert(1)</script>", "[/red]",
    "[bold", "{{7*7}}", "%s%n", "\ud800", "\u202e", "a" * 5000, "os:system", "evil.module:boom", "0-train", "1-prune@3",
    [], {}, [[]], [None], {"": None}, {"a": {"b": {"c": []}}}, [1] * 300, ["x"] * 300, {"kind": "channels", "data": {}},
]  # fmt: skip
TEXT = [b"\x00", b"\xff\xfe", b"&a *a", b"!!python/object/apply:os.system [id]", b"<<: *x", b"- - - - - -", b"{", b"[",
        b'"', b"\n", b"1e999", b"NaN", b"Infinity", b"\t", b"? ", b"|", b"%YAML 9.9", b"\x80" * 9]  # fmt: skip


def damage(data: bytes, rng: Rng) -> bytes:
    """One to four changes to the bytes."""
    buffer = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(buffer) + 1)
        length = min(len(buffer) - at, int(rng.expovariate(1 / 12)) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(buffer):
            buffer[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            buffer[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del buffer[at : at + length * rng.choice((1, 1, 10))]
        elif kind == 3:
            buffer[at:at] = buffer[at : at + length] * rng.choice((1, 2, 50))
        elif kind == 4:
            del buffer[at:]
        elif kind == 5:
            buffer[at:at] = rng.choice(TEXT)
        else:
            number = rng.choice((0, -1, 2**31 - 1, -(2**31), 2**62))
            buffer[at : at + 8] = number.to_bytes(8, "little", signed=True)
    return bytes(buffer)


def twist(value: Any, rng: Rng) -> Any:
    """One to three hostile changes inside nested plain data."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return rng.choice(HOSTILE)
        parent, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(["", "$", "schema", "name", key + "x", "__class__"])] = copy.deepcopy(parent[key])
        elif kind == 2:
            other, name = rng.choice(places)
            with contextlib.suppress(KeyError, IndexError):
                parent[key] = copy.deepcopy(other[name])
        elif kind == 3 and type(parent[key]) in (int, float) and abs(parent[key]) < 1e300:
            parent[key] = rng.choice((-1, 1e9, 0.5)) * parent[key] + rng.choice((-1, 0, 1))
        else:
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
    return value


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def mutated_json(data: bytes, rng: Rng) -> bytes:
    """Damaged text, or sound JSON with hostile values."""
    if rng.random() < 0.3:
        return damage(data, rng)
    text = json.dumps(twist(json.loads(data), rng), ensure_ascii=rng.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def mutated_safetensors(data: bytes, rng: Rng) -> bytes:
    """Damaged bytes, or a sound frame around a header with hostile values."""
    if rng.random() < 0.4:
        return damage(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(twist(json.loads(data[8 : 8 + length]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutated_onnx(data: bytes, rng: Rng) -> bytes:
    """Damaged bytes, or a model with a hostile field somewhere."""
    import onnx

    if rng.random() < 0.4:
        return damage(data, rng)
    model = onnx.load_model_from_string(data)
    for _ in range(rng.randint(1, 3)):
        _twist_message(model, rng)
    return model.SerializeToString()


def _twist_message(message: Any, rng: Rng) -> None:
    while True:  # walk to a random field
        descriptor, value = rng.choice(message.ListFields() or [(None, None)])
        if descriptor is None:
            return
        repeated = not isinstance(value, str | bytes | int | float) and hasattr(value, "__len__")
        if repeated and len(value) == 0:
            return
        inner = rng.choice(list(value)) if repeated else value
        if hasattr(inner, "ListFields"):
            if rng.random() < 0.1:
                message.ClearField(descriptor.name)
                return
            if repeated and rng.random() < 0.1:
                del value[rng.randrange(len(value))]
                return
            message = inner
            continue
        new = _other(inner, rng)
        with contextlib.suppress(ValueError, TypeError, UnicodeError):
            if repeated:
                value[rng.randrange(len(value))] = new
            else:
                setattr(message, descriptor.name, new)
        return


def _other(value: Any, rng: Rng) -> Any:
    if isinstance(value, bytes):
        return damage(value, rng)
    if isinstance(value, str):
        return rng.choice(["", "../x", "QLinearConv", "If", "Loop", "Scan", "x" * 300, "ConstantOfShape", value + "_"])
    if isinstance(value, float):
        return rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e30])
    return rng.choice([0, 1, -1, 2, 7, 255, 2**31 - 1, -(2**31), 2**40, value + 1])
