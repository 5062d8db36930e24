"""Texts as token numbers: what a row says, what a vocabulary knows, and a run to a file that reads strings."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flatcompress import Pipeline, data, onnx_export
from flatcompress.data.texts import CHANGES, corrupted
from flatcompress.data.tokens import PADDING, UNKNOWN, Words, words
from flatcompress.errors import UserError

KIT = Path(__file__).parents[2] / "export" / "runner.py"
ROWS = [
    {"text": f"{('warm', 'cold')[i % 2]} room number {i % 7}, please", "label": ("up", "down")[i % 2],
     "place": f"p{i % 3}", "part": ("train", "train", "val", "test")[i % 4], "size": i / 10,
     "tags": "a;b" if i % 2 else "c"}
    for i in range(48)
]  # fmt: skip


def write(path: Path, rows=ROWS) -> Path:
    if path.suffix == ".csv":
        quoted = ([f'"{value}"' for value in row.values()] for row in rows)
        path.write_text("\n".join([",".join(rows[0]), *map(",".join, quoted)]) + "\n")
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(path: Path, **options):
    return data.load("text", **{"path": str(path), "target": "label", "max_length": 8, **options})


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_text_is_its_words_by_number_with_padding_behind(name, tmp_path):
    found = load(write(tmp_path / name))
    assert found.classes == ("down", "up") and found.input_shape == (8,) and found.features["text"] == "words"
    vocabulary = found.features["vocabulary"]
    x, y = found.train.__getitems__(list(range(len(found.train))))
    assert x.dtype == torch.int64 and int(x.max()) < len(vocabulary) + 2
    for row, label in zip(x.tolist(), y.tolist()):
        said = [vocabulary[number - 2] for number in row if number > UNKNOWN]
        assert said[0] == ("warm" if found.classes[label] == "up" else "cold") and said[1:3] == ["room", "number"]
        assert row[-2:] == [PADDING, PADDING] and len(said) == 6
    assert set(found.corrupted) == {f"{kind}/{severity}" for kind in CHANGES for severity in (1, 3, 5)}


def test_the_vocabulary_is_the_training_part_s_most_frequent_words():
    made = Words(["a b b", "b c", "a d"], 4, 2)
    assert made.vocabulary == ["b", "a"] and made.size == 4
    assert made(["B a z b a b"]).tolist() == [[2, 3, UNKNOWN, 2]] and made.cut(["a b c d e", "a"]) == 1
    assert words("Cafe\u0301!") == ["caf\u00e9", "!"]


def test_split_domain_and_other_tasks_are_those_of_the_table(tmp_path):
    path = write(tmp_path / "t.csv")
    found = load(path, split="part", domain="place", held_out="p1", corruptions="none")
    assert len(found.held_out) == 16 and found.held_out_domain and not found.corrupted
    assert len(found.train) + len(found.val) + len(found.test) == 32
    assert load(path, target="size", task="regression").task.name == "regression"
    assert load(path, target="tags", task="multilabel").classes == ("a", "b", "c")


def test_a_text_that_is_too_long_loses_its_end_and_is_counted(tmp_path):
    found = load(write(tmp_path / "t.csv"), max_length=3)
    assert any("48 of 48 texts are longer than max_length" in note for note in found.notes)


def test_corruptions_are_the_same_every_time_and_grow_with_the_severity():
    texts = [row["text"] for row in ROWS]
    first, again = corrupted(texts, 3), corrupted(texts, 3)
    assert first == again
    for kind in CHANGES:
        changed = [sum(a != b for a, b in zip(texts, first[f"{kind}/{severity}"])) for severity in (1, 3, 5)]
        assert 0 < changed[0] < changed[2]


WRONG = {
    "no table": ({"path": "nowhere.csv"}, "give a table"),
    "no text column": ({"text": "words"}, r"column of t\.csv \(text\) 'words'"),
    "no target": ({"target": None}, "say which column is learned"),
    "an empty text": ({}, r"t\.csv:4: column 'text' is empty"),
    "a class that training has not": ({"split": "part"}, "test part has samples of odd"),
    "a length of one": ({"max_length": 1}, "max_length is 2"),
    "no tokenizer": ({"tokenizer": "bert-base-uncased"}, "folder of a tokenizer, found 'bert-base-uncased'"),
    "masks": ({"task": "segmentation"}, "no targets for task 'segmentation'"),
    "image corruptions": ({"corruptions": ["fog"]}, "corruptions is default or none"),
    "augmentation": ({"augment": "standard"}, "augment"),
    "a domain without a column": ({"held_out": "p1"}, "name their column with 'domain'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_text_that_cannot_be_used_is_named_in_one_sentence(case, tmp_path):
    options, reason = WRONG[case]
    rows = [dict(row) for row in ROWS]
    if "empty" in case:
        rows[2]["text"] = " "
    if "class" in case:
        rows[3]["label"] = "odd"
    with pytest.raises(UserError, match=reason) as caught:
        load(**{"path": write(tmp_path / "t.csv", rows), **options})
    assert "\n" not in str(caught.value)


def test_a_folder_of_a_transformers_tokenizer_makes_its_own_numbers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    known = {"[PAD]": 0, "[UNK]": 1, "warm": 2, "cold": 3, "room": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "own"
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")
    wrapped.save_pretrained(folder)
    found = load(write(tmp_path / "t.csv"), tokenizer=str(folder))
    x, y = found.test.__getitems__([0, 1, 2])
    assert (
        x[:, 0].tolist() == [2 if found.classes[c] == "up" else 3 for c in y.tolist()] and x[:, 1].tolist() == [4] * 3
    )
    assert found.features == {
        "text": "transformers", "tokenizer": "own", "max_length": 8, "vocabulary_size": 5, "padding": 0,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer that transformers reads"):
        load(tmp_path / "t.csv", tokenizer=str(folder))


@pytest.mark.filterwarnings("ignore:.*compute in floats")
def test_a_run_ends_in_a_certified_file_that_reads_strings_by_itself(tmp_path):
    section = {"name": "text", "path": str(write(tmp_path / "t.csv")), "target": "label", "max_length": 8}
    stages = [
        {"train": {"method": "sam", "epochs": 3, "optimizer": {"lr": 0.01}}},
        {"prune": {"method": "magnitude", "ratio": 0.3, "epochs": 1, "schedule_steps": 1}},
        {"quantize": {"epochs": 1, "weight_bits": 4, "activation_bits": 8, "flatness_map": False}},
        {"export": {"latency": False}},
    ]
    model = {"name": "flatcompress.models.text_nets:text_cnn", "width": 8, "embedding": 8}
    made = Pipeline(
        model, {**section, "corruptions": "none"}, stages, name="text", batch_size=8, device="cpu", threads=1
    )
    result = made.run(tmp_path / "run")
    assert result.certificate["holds"], result.certificate["failures"]
    assert onnx_export.verify(tmp_path / "run").holds
    spec = importlib.util.spec_from_file_location("device_runner", KIT)
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    device, ours = runner.Model(result.onnx), made.load_data()
    texts = [row["text"] for row in ROWS]
    numbers = np.stack([device.preprocess(text) for text in texts])
    made_by_us = Words(texts, 8, 9)
    made_by_us._numbers = {word: i for i, word in enumerate(ours.features["vocabulary"], 2)}
    assert np.array_equal(numbers, made_by_us(texts).numpy())
    assert set(device.read("warm room number 3, please")["probabilities"]) == {"up", "down"}
    assert device.predict("cold room")[0][0] in ("up", "down") and device.bench(runs=1)["median_ms"] > 0
    with pytest.raises(UserError, match="text wants a model of token numbers"):
        Pipeline("resnet8", section, stages, name="wrong", device="cpu").prepare()
