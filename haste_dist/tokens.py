"""Texts to token ids, as the tokenizers library makes them, most of them from a table of words.

A BERT tokenizer cuts plain ASCII text at spaces and punctuation, whatever its vocabulary, and turns each word into ids on its own.
So each distinct word goes through the library once and is looked up from then on, which is several times faster on short texts.
Texts with anything else in them, and all texts of other kinds of tokenizer, go through the library whole.
"""

import functools
import json
import re
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

TEXTS_AT_ONCE = 1024  # the tokenizer keeps strings and masks for every token of a call
WORDS_KEPT = 2**19  # about 100 MB; then the table starts anew
PIECES = re.compile(r"[0-9A-Za-z]+|[!-/:-@\[-`{-~]")  # of printable ASCII: words and single signs


def tokenizer_rules(backend: Tokenizer, max_length: int, side: str) -> str:
    """A tokenizer as one string that workers can load without transformers: it cuts to ``max_length`` and does not pad."""
    rules = Tokenizer.from_str(backend.to_str())
    rules.no_padding()
    rules.enable_truncation(max_length, direction=side)
    return rules.to_str()


def tokenise(texts: Sequence[str], rules: str) -> pa.ListArray:
    """list<int32> (n,): the token ids of each text, special tokens included, at most max_length of them."""
    tokenizer, table = _load(rules)
    plain = [table is not None and table.takes(text) for text in texts]
    fast = [text for text, is_plain in zip(texts, plain, strict=True) if is_plain]
    slow = [text for text, is_plain in zip(texts, plain, strict=True) if not is_plain]
    if not slow and table is not None:
        return table.tokenise(fast)
    by_library = _by_library(tokenizer, slow)
    if not fast or table is None:
        return by_library
    at = np.empty(len(texts), np.int64)  # where each text's ids are in the two arrays, one behind the other
    at[np.array(plain)] = np.arange(len(fast))
    at[~np.array(plain)] = len(fast) + np.arange(len(slow))
    return pa.concat_arrays([table.tokenise(fast), by_library]).take(pa.array(at))


@functools.lru_cache(maxsize=1)
def _load(rules: str) -> tuple[Tokenizer, "WordTable | None"]:
    tokenizer, page = Tokenizer.from_str(rules), json.loads(rules)
    kinds = [(page.get(part) or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model", "post_processor")]
    by_word = kinds[:3] == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and kinds[3] in (
        None,
        "BertProcessing",
        "TemplateProcessing",
    )
    return tokenizer, WordTable(rules) if by_word else None


def _by_library(tokenizer: Tokenizer, texts: Sequence[str]) -> pa.ListArray:
    pieces, lengths = [np.zeros(0, np.int32)], [0]
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts[start : start + TEXTS_AT_ONCE])]
        pieces.append(np.fromiter(chain.from_iterable(ids), np.int32))
        lengths += [len(row) for row in ids]
    return pa.ListArray.from_arrays(np.cumsum(lengths).astype(np.int32), np.concatenate(pieces))


class Numbers(dict[str, int]):
    """Numbers words as they are asked for; ``fresh`` lists the new ones."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh: list[str] = []

    def __missing__(self, word: str) -> int:
        self.fresh.append(word)
        self[word] = len(self)
        return self[word]


class WordTable:
    """The ids of each word met so far, one after another in ``_ids``, with the place of each word's first in ``_starts``."""

    def __init__(self, rules: str):
        page = json.loads(rules)
        self._max_length, self._left = page["truncation"]["max_length"], page["truncation"]["direction"] == "Left"
        self._added = [re.escape(token["content"]) for token in page["added_tokens"]]
        self._special = re.compile("|".join(self._added) or r"(?!)", re.IGNORECASE)
        self._tokenizer = Tokenizer.from_str(rules)
        self._tokenizer.no_truncation()
        whole = self._tokenizer.encode("a")
        own = [i for i, special in enumerate(whole.special_tokens_mask) if not special]
        self._before = np.array(whole.ids[: own[0]], np.int32)
        self._behind = np.array(whole.ids[own[-1] + 1 :], np.int32)
        self._clear()

    def _clear(self) -> None:
        self._numbers = Numbers()
        self._ids, self._starts = np.zeros(0, np.int32), np.zeros(1, np.int64)

    def takes(self, text: str) -> bool:
        """Whether the text is printable ASCII without special tokens."""
        return text.isascii() and text.isprintable() and self._special.search(text) is None

    def tokenise(self, texts: Sequence[str]) -> pa.ListArray:
        """list<int32> (n,) of texts that ``takes`` is true of."""
        if len(self._numbers) > WORDS_KEPT:
            self._clear()
        # A piece makes one id at least, so no more than max_length pieces of a text matter.
        most = slice(-self._max_length, None) if self._left else slice(self._max_length)
        rows = [PIECES.findall(text)[most] for text in texts]
        words = list(chain.from_iterable(rows))
        numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
        self._learn()
        counts = np.fromiter(map(len, rows), np.int64, len(rows))  # words of a text
        lengths = (self._starts[1:] - self._starts[:-1])[numbers]  # ids of a word
        ends = np.concatenate([[0], np.cumsum(lengths)])  # of the words' ids, were all written one after another
        row_ends = ends[np.concatenate([[0], np.cumsum(counts)])]
        tokens = np.diff(row_ends)
        kept = np.minimum(tokens, self._max_length - len(self._before) - len(self._behind))
        first = row_ends[:-1] + (tokens - kept if self._left else 0)
        offsets = np.concatenate([[0], np.cumsum(kept + len(self._before) + len(self._behind))])

        flat = self._ids[np.repeat(self._starts[numbers] - ends[:-1], lengths) + np.arange(ends[-1])]
        made = np.empty(offsets[-1], np.int32)
        start = offsets[:-1] + len(self._before)
        steps = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)
        made[np.repeat(start, kept) + steps] = flat[np.repeat(first, kept) + steps]
        for i, special in enumerate(self._before):
            made[offsets[:-1] + i] = special
        for i, special in enumerate(self._behind):
            made[offsets[1:] - len(self._behind) + i] = special
        return pa.ListArray.from_arrays(offsets.astype(np.int32), made)

    def _learn(self) -> None:
        """Has the library make the ids of the words that were numbered since the last call."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(self._numbers.fresh, add_special_tokens=False)]
        self._numbers.fresh = []
        self._ids = np.concatenate([self._ids, np.fromiter(chain.from_iterable(ids), np.int32)])
        self._starts = np.concatenate([self._starts, self._starts[-1] + np.cumsum(np.fromiter(map(len, ids), np.int64, len(ids)))])
