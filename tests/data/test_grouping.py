"""Identities that several domains show are never in two parts."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from PIL import Image

from flatcompress import data
from flatcompress.errors import UserError

DOMAINS, CLASSES, N = ("art", "flat", "photo"), ("cat", "dog"), 10


def drawn(root: Path, name: str = "{}-{}.png") -> Path:
    """The same ``N`` things of each class in every domain."""
    for d in DOMAINS:
        for c in CLASSES:
            (root / d / c).mkdir(parents=True)
            for i in range(N):
                Image.new("RGB", (5, 5), (20 * i, 9, 9)).save(root / d / c / name.format(c, i, d))
    return root


def load(root: Path, **keys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return data.load("domains", path=str(root), held_out="photo", size=4, corruptions="none", **keys)


@pytest.mark.parametrize(("name", "group"), [("{}-{}.png", "name"), ("{2}_{0}{1}.png", r"re:_(\w+)\.")])
def test_no_identity_is_in_two_parts_also_across_domains(name: str, group: str, tmp_path):
    bundle = load(drawn(tmp_path, name), group=group, val_fraction=0.2, test_fraction=0.2)
    train, val, test, unseen = (
        set(p.identities.tolist()) for p in (bundle.train, bundle.val, bundle.test, bundle.held_out)
    )
    assert not train & val and not train & test and not val & test
    assert unseen and not unseen & (train | val)
    assert len(train | val | test) == N * len(CLASSES)
    assert len(bundle.train) == 2 * len(train)  # both source domains show each
    assert "4 of 20 images" in bundle.notes[-1]


def test_all_of_the_held_out_domain_can_be_measured(tmp_path):
    assert len(load(drawn(tmp_path), group="name", held_out_identities="all").held_out) == 20


def test_without_a_key_every_file_is_its_own_identity(tmp_path):
    bundle = load(drawn(tmp_path))
    assert len(bundle.held_out) == 20
    assert len(set(bundle.train.identities.tolist())) == len(bundle.train)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"group": "stem"}, "is name or re:PATTERN"), ({"group": "re:("}, "no regular expression"),
        ({"group": "re:cat"}, "needs brackets"), ({"group": r"re:(\d+)x"}, "finds no key"),
        ({"group": "name", "held_out_identities": "some"}, "held_out_identities"),
    ],
)  # fmt: skip
def test_a_key_that_cannot_be_used_is_refused(keys, reason: str, tmp_path):
    with pytest.raises(UserError, match=reason):
        load(drawn(tmp_path), **keys)
