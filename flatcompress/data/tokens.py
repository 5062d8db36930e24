"""Text as token numbers: words of the training part's own vocabulary, or a transformers tokenizer from a folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flatcompress.data.images.layout import one_name
from flatcompress.errors import UserError

PADDING, UNKNOWN = 0, 1
WORD = r"\w+|[^\w\s]"  # a word, or one mark
TRANSFORMERS = "tokenizers of transformers need it: pip install 'flatcompress[transformers]', or tokenizer: words."


class Tokenizer(Protocol):
    """Texts in, int64 [N, length] out; ``said`` is what an exported file tells of it."""

    size: int  # token numbers there are
    length: int

    def __call__(self, texts: Sequence[str]) -> Tensor: ...

    def cut(self, texts: Sequence[str]) -> int:
        """How many of ``texts`` are longer than ``length``, so that their end is lost."""
        ...

    def said(self) -> dict[str, Any]:
        """Plain data."""
        ...


class Words:
    """Words and marks in small letters, numbered from 2 by how often the training texts have them.

    0 is padding, 1 every other word. most: words that are kept.
    """

    def __init__(self, texts: Sequence[str], length: int, most: int) -> None:
        counts = Counter(word for text in texts for word in words(text))
        self.vocabulary = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]
        self.length, self.size = length, len(self.vocabulary) + 2
        self._numbers = {word: i for i, word in enumerate(self.vocabulary, 2)}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """int64 [N, length]."""
        found = torch.full((len(texts), self.length), PADDING)
        for row, text in zip(found, texts):
            numbers = [self._numbers.get(word, UNKNOWN) for word in words(text)[: self.length]]
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return found

    def cut(self, texts: Sequence[str]) -> int:
        """See `Tokenizer`."""
        return sum(len(words(text)) > self.length for text in texts)

    def said(self) -> dict[str, Any]:
        """With every word: a device then needs no file beside the model."""
        return {"text": "words", "pattern": WORD, "max_length": self.length, "vocabulary": self.vocabulary}


def words(text: str) -> list[str]:
    """Words and marks in small letters, in Unicode's NFC form.

    >>> words("Lights ON, please!")
    ['lights', 'on', ',', 'please', '!']
    """
    return re.findall(WORD, one_name(text).lower())


class Pretrained:
    """A tokenizer of transformers from a local folder; nothing is downloaded and no code of the folder is run."""

    def __init__(self, folder: str, length: int) -> None:
        try:
            import transformers
        except ImportError:
            raise UserError(f"data set 'text': {TRANSFORMERS}") from None
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise UserError(f"data set 'text': tokenizer is 'words' or the folder of a tokenizer, found {folder!r}.")
        try:
            self.made = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a damaged folder makes it raise
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(f"{path}: no tokenizer that transformers reads ({reason}).") from None
        if self.made.pad_token_id is None:
            raise UserError(f"{path}: the tokenizer has no token for padding (pad_token), which batches need.")
        self.folder, self.length, self.size = path.name, length, len(self.made)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """int64 [N, length]."""
        found = self.made(list(texts), padding="max_length", truncation=True, max_length=self.length)
        return torch.tensor(found["input_ids"], dtype=torch.int64)

    def cut(self, texts: Sequence[str]) -> int:
        """See `Tokenizer`."""
        return sum(len(ids) > self.length for ids in self.made(list(texts))["input_ids"])

    def said(self) -> dict[str, Any]:
        """The folder's name alone: its files go with the model."""
        return {
            "text": "transformers",
            "tokenizer": self.folder,
            "max_length": self.length,
            "vocabulary_size": self.size,
            "padding": int(self.made.pad_token_id),
        }


def vocabulary_size(features: Mapping[str, Any]) -> int | None:
    """Token numbers of a data set whose inputs are text, from what it says of them; None for other data."""
    if "vocabulary" in features:
        return len(features["vocabulary"]) + 2
    return features.get("vocabulary_size")
