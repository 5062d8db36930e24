"""Identities across domains: which files show the same thing, so that no identity is in two parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatcompress.data.images.layout import one_name
from flatcompress.data.split import split_identities
from flatcompress.errors import UserError

HELD_OUT = ("unseen", "all")


def identities(paths: Sequence[Path], root: Path, group: Any) -> Tensor:
    """int64 [N]: files with the same key are one identity.

    ``group``: ``name``, the file's name without its suffix, or ``re:PATTERN`` whose first bracket is searched in the
    path below the data folder. UserError names the first file without a key.
    """
    pattern = _pattern(group)
    numbers: dict[str, int] = {}
    found = []
    for path in paths:
        text = one_name(path.relative_to(root).as_posix())
        key = Path(text).stem
        if pattern is not None:
            match = pattern.search(text)
            if match is None or match.group(1) is None:
                raise UserError(f"{path}: data option 'group' ({group!r}) finds no key in {text!r}.")
            key = match.group(1)
        found.append(numbers.setdefault(key, len(numbers)))
    return torch.tensor(found, dtype=torch.int64)


def _pattern(group: Any) -> re.Pattern[str] | None:
    if group == "name":
        return None
    if not isinstance(group, str) or not group.startswith("re:"):
        raise UserError(f"data option 'group' is name or re:PATTERN, found {group!r}")
    try:
        pattern = re.compile(group.removeprefix("re:"))
    except re.error as error:
        raise UserError(f"data option 'group': {group!r} is no regular expression ({error}).") from None
    if not pattern.groups:
        raise UserError(f"data option 'group': {group!r} needs brackets around the part that is the key.")
    return pattern


def split_grouped(
    identity: Tensor, labels: Tensor, source: Tensor, fractions: dict[str, float], seed: int
) -> dict[str, Tensor]:
    """Rows of "train", of the parts in ``fractions``, and of "unseen": outside ``source``, of no trained identity.

    ``identity``, ``labels``: int64 [N]; ``source``: bool [N], the samples to train on. Identities are split in
    proportion of their classes; an identity that is in two classes counts to that of its first sample.
    """
    known = identity[source].unique()
    first = torch.stack([labels[(identity == one).nonzero()[0, 0]] for one in known])
    chosen = split_identities(first, fractions, seed)
    parts = {name: (torch.isin(identity, known[rows]) & source).nonzero().flatten() for name, rows in chosen.items()}
    used = identity[torch.cat([parts["train"], parts.get("val", parts["train"][:0])])].unique()
    parts["unseen"] = (~source & ~torch.isin(identity, used)).nonzero().flatten()
    return parts
