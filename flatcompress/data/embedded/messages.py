"""Short messages to a device at home: what is wanted of it, in many wordings.

A stand-in for text classification, made where it is used. Sentences are put together from phrases; the unseen domain
uses frames around the request that no training sentence has ("would you be so kind as to ...").
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flatcompress.data.bundle import DataBundle
from flatcompress.data.embedded.drawing import checked
from flatcompress.data.texts import of_texts
from flatcompress.data.tokens import Words
from flatcompress.errors import UserError
from flatcompress.randomness import derive
from flatcompress.tasks import build

CLASSES = ("light", "music", "heating", "timer")
_ROOMS = ("kitchen", "bedroom", "hall", "bathroom", "office", "cellar")
_NUMBERS = ("two", "five", "ten", "twenty", "thirty", "forty")
_WISHES = {
    "light": ("turn the {room} lamp {way}", "make the {room} {bright}", "switch the light {way} in the {room}",
              "it is too {dark} in the {room}"),
    "music": ("play something {mood}", "turn the radio {way} in the {room}", "next song in the {room}",
              "it is too {quiet} in the {room}"),
    "heating": ("set the {room} to {number} degrees", "make the {room} {warm}", "turn the radiator {way} in the {room}",
                "it is too {cold} in the {room}"),
    "timer": ("wake me in {number} minutes", "remind me of the {room} in {number} minutes",
              "count {number} minutes for the {room}", "tell me when {number} minutes are over"),
}  # fmt: skip
_WORDS = {
    "room": _ROOMS, "number": _NUMBERS, "way": ("on", "off", "up", "down"), "bright": ("brighter", "darker"),
    "dark": ("dark", "bright"), "mood": ("slow", "loud", "new", "old"), "quiet": ("quiet", "loud"),
    "warm": ("warmer", "cooler"), "cold": ("cold", "hot"),
}  # fmt: skip
_FRAMES = ("{}", "please {}", "{} please", "can you {}", "hey , {}", "{} now", "i said {}")
_UNSEEN = (
    "would you be so kind as to {}",
    "{} if it is not too much to ask",
    "my wish is this : {}",
    "listen , {} , thanks",
)


def drawn_messages(
    seed: int,
    *,
    max_length: int = 16,
    train_count: int = 800,
    val_count: int = 100,
    test_count: int = 200,
    task: Any = None,
) -> DataBundle:
    """Token numbers [max_length]; the counts are messages, and the unseen domain has ``test_count``."""
    counts = checked("drawn-messages", train_count, val_count, test_count)
    learned = build(task)
    if learned.name != "classification" or not 4 <= max_length <= 64:
        raise UserError("drawn-messages has targets for task 'classification', and max_length is from 4 to 64.")
    texts: list[str] = []
    rows: dict[str, Any] = {}
    for name, count in counts.items():
        rng = np.random.default_rng(derive(seed, "messages", name))
        rows[name] = torch.arange(len(texts), len(texts) + count)
        frames = _UNSEEN if name == "held_out" else _FRAMES
        texts += [_message(CLASSES[i % len(CLASSES)], frames, rng) for i in range(count)]
    labels = torch.cat([torch.arange(count) % len(CLASSES) for count in counts.values()])
    made = Words(texts[:train_count], max_length, 1000)
    return of_texts("drawn-messages", texts, labels, CLASSES, rows, made, learned, 0, seed)


def _message(kind: str, frames: tuple[str, ...], rng: np.random.Generator) -> str:
    """One wish in one frame; now and then a word of another wish has slipped in."""
    wish = str(rng.choice(_WISHES[kind])).format(**{key: str(rng.choice(some)) for key, some in _WORDS.items()})
    words = str(rng.choice(frames)).format(wish).split()
    if rng.random() < 0.2:
        stray = str(rng.choice([word for key in ("mood", "way", "warm", "dark") for word in _WORDS[key]]))
        words.insert(int(rng.integers(0, len(words) + 1)), stray)
    return " ".join(words)
