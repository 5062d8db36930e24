"""Texts with a table of what they are: a class, labels, numbers. Inputs are token numbers [length]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatcompress.data.bundle import DataBundle
from flatcompress.data.corruptions import how_many
from flatcompress.data.in_memory import OwnSet, bundle
from flatcompress.data.raw_data import held_out_name
from flatcompress.data.tables import Table, found_table, read_table
from flatcompress.data.targeted import check_learnable, domains_told, parts_told, split, targets
from flatcompress.data.tokens import Pretrained, Tokenizer, Words
from flatcompress.errors import UserError
from flatcompress.randomness import derive
from flatcompress.tasks import Task, build

NAME = "text"
_COLUMNS = ("text", "sentence", "content", "review", "message", "utterance")
SEVERITIES = (1, 3, 5)


def text(
    seed: int,
    *,
    path: Any = None,
    table: Any = None,
    text: Any = None,
    target: Any = None,
    split: Any = None,
    domain: Any = None,
    held_out: Any = None,
    tokenizer: str = "words",
    vocabulary: int = 4000,
    max_length: int = 64,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    corruptions: Any = "default",
    corrupted_count: int = 500,
    task: Any = None,
) -> DataBundle:
    """A CSV, JSON, JSON Lines or Parquet file with a row each: PATH itself, or a ``table`` in the folder PATH.

    text: its column of texts. target: what is learned, as for `image-table`. split, domain, held_out: as there.
    tokenizer: ``words`` (the ``vocabulary`` most frequent ones of the training part) or the folder of a transformers
    tokenizer. max_length: tokens of an input; what is longer loses its end, and is counted. Padding is a token of its
    own, so a network sees from the numbers alone where a text ends. corruptions: typing errors and lost words.
    UserError names the row.
    """
    where, learned = _file(path, table), build(task)
    if not 2 <= max_length <= 4096 or not 10 <= vocabulary <= 1_000_000:
        raise UserError(f"data set {NAME!r}: max_length is 2 to 4,096 and vocabulary 10 to 1,000,000.")
    rows = read_table(where)
    texts = _texts(rows, text)
    given, names = targets(rows, target, learned, NAME)
    domains = domains_told(rows, domain)
    chosen = _rows(rows, given, names, domains, held_out, parts_told(rows, split), seed, learned,
                   {"test": test_fraction, "val": val_fraction})  # fmt: skip
    seen = [texts[i] for i in chosen["train"].tolist()]
    made: Tokenizer = Words(seen, max_length, vocabulary) if tokenizer == "words" else Pretrained(tokenizer, max_length)
    count = how_many(NAME, corruptions, corrupted_count)
    return of_texts(where.stem, texts, given, names, chosen, made, learned, count, seed)


def of_texts(
    name: str,
    texts: Sequence[str],
    given: Any,
    names: tuple[str, ...],
    rows: dict[str, Tensor],
    made: Tokenizer,
    task: Task,
    count: int | None,
    seed: int,
) -> DataBundle:
    """The bundle of ``texts``; ``rows``: which are train, val, test, held_out; ``count``: as for sounds."""
    numbers, wanted = made(texts), torch.as_tensor(given)
    parts: dict[str, Any] = {part: (numbers[at], wanted[at]) for part, at in rows.items()}
    if count is not None:
        at = rows["test"][: count or None]
        spoiled = corrupted([texts[i] for i in at.tolist()], seed)
        parts["corrupted"] = {kind: (made(some), wanted[at]) for kind, some in spoiled.items()}
    named = {"classes": names} if names else {}
    found = bundle({"name": name, **named, **parts}, task)
    for part in (found.train, found.val, found.test, found.held_out, *found.corrupted.values()):
        if isinstance(part, OwnSet) and part.images is not None:
            part.images = part.images.long()  # token numbers are looked up, not computed with
    lost, notes = made.cut(texts), list(found.notes)
    if lost:
        notes.append(
            f"{lost} of {len(texts)} texts are longer than max_length ({made.length} tokens); their end is lost"
        )
    return replace(found, notes=tuple(notes), features=made.said())


def _file(path: Any, table: Any) -> Path:
    where = Path(str(path)).expanduser()
    if path is None or not where.exists():
        raise UserError(f"data set {NAME!r}: give a table, or the folder of one, with 'path', found {path!r}.")
    return found_table(where, table, NAME) if where.is_dir() else where


def _texts(rows: Table, column: Any) -> list[str]:
    if column is None:
        usual = [name for name in rows.columns if name.lower() in _COLUMNS]
        if len(usual) != 1:
            raise UserError(
                f"{rows.path}: say which column is the text, with 'text'; it has {', '.join(rows.columns)}."
            )
        column = usual[0]
    at = rows.position(column, "text")
    return [rows.text(i, at) for i in range(len(rows.rows))]


def _rows(
    table: Table,
    given: Any,
    names: tuple[str, ...],
    domains: list[str] | None,
    held_out: Any,
    told: list[str] | None,
    seed: int,
    task: Task,
    fractions: dict[str, float],
) -> dict[str, Tensor]:
    """Rows of train, val, test and held_out."""
    known = tuple(sorted(set(domains or ())))
    if held_out is not None and domains is None:
        raise UserError(f"data set {NAME!r}: held_out is a domain; name their column with 'domain'.")
    unseen = held_out_name(held_out, known)
    outside = torch.tensor([unseen is not None and d == unseen for d in domains or [""] * len(table.rows)])
    classes = task.name == "classification"
    labels = given if classes else torch.zeros(len(table.rows), dtype=torch.int64)
    rows = split(labels, told, outside, fractions, seed, str(table.path))
    if unseen is not None:
        rows["held_out"] = outside.nonzero().flatten()
    if classes:
        check_learnable(rows, labels, names, str(table.path))
    empty = next((part for part, at in rows.items() if not len(at)), None)
    if empty is not None:
        raise UserError(f"{table.path}: no row for the {empty} part; {len(table.rows)} rows are too few.")
    return rows


def typing(words: list[str], severity: int, rng: np.random.Generator) -> list[str]:
    """In 8 % of the words a severity two neighbouring letters change places."""
    found = []
    for word in words:
        if len(word) > 2 and rng.random() < 0.08 * severity:
            at = int(rng.integers(0, len(word) - 1))
            word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        found.append(word)
    return found


def losing(words: list[str], severity: int, rng: np.random.Generator) -> list[str]:
    """8 % of the words a severity are lost; one is always left."""
    kept = [word for word in words if rng.random() >= 0.08 * severity]
    return kept or words[:1]


CHANGES: dict[str, Callable[[list[str], int, np.random.Generator], list[str]]] = {"typing": typing, "losing": losing}


def corrupted(texts: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Every change of ``texts`` at every severity, by "kind/severity"."""
    found = {}
    for kind, change in CHANGES.items():
        for severity in SEVERITIES:
            rng = np.random.default_rng(derive(seed, kind, severity))
            found[f"{kind}/{severity}"] = [" ".join(change(one.split(), severity, rng)) for one in texts]
    return found
