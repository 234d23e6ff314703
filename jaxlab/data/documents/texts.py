"""Texts as tokens."""

import json
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from jaxlab.data.documents.document import Counts, Document, content_key, largest_id, words_digest
from jaxlab.data.documents.readers import LONGEST_TEXT, Row
from jaxlab.processing import encode_batch, encode_with_spans


class TextEncoder:
    """Texts, with what the tokenizer puts around them and a token after them."""

    def __init__(self, tokenizer: Tokenizer | None, end: int) -> None:
        self.tokenizer, self.end = tokenizer, end
        self.largest = 255 if tokenizer is None else largest_id(tokenizer)
        before: list[int] = []
        after: list[int] = []
        if tokenizer is not None:
            [around] = encode_with_spans(["a"], tokenizer)
            stop = around.text_end
            begin = next((i for i in range(stop) if not around.special[i]), stop)
            before, after = around.ids[:begin].tolist(), around.ids[stop:].tolist()
        if not after or after[-1] != end:
            after = [*after, end]
        self.before, self.after = np.asarray(before, np.int64), np.asarray(after, np.int64)
        self.identity = json.dumps(["text", words_digest(tokenizer), before, after])

    def encode(self, rows: Sequence[tuple[str, Row]], counts: Counts) -> list[Document]:
        """See `Encoder`.

        Raises:
          UserError: the tokenizer fails on a text.
        """
        kept: list[tuple[Row, str, int]] = []
        texts: list[str] = []
        names: list[str] = []
        for where, row in rows:
            text = _text_of(row, where, counts, no_zero=self.tokenizer is None)
            if text is None:
                continue
            parts = list(_stretches(text))
            kept.append((row, text, len(parts)))
            texts += parts
            names += [where] * len(parts)
        encoded = iter(encode_batch(texts, self.tokenizer, special=False, where=names))
        documents = []
        for row, text, number in kept:
            ids = [next(encoded) for _ in range(number)]
            whole = [self.before] * row.first + ids + [self.after] * row.last
            documents.append(Document(np.concatenate(whole), content_key(text)))
        return documents


def _stretches(text: str) -> Iterator[str]:
    """A text in stretches that a tokenizer takes at once, cut after lines where it has lines."""
    while len(text) > LONGEST_TEXT:
        cut = text.rfind("\n", LONGEST_TEXT // 2, LONGEST_TEXT) + 1 or LONGEST_TEXT
        yield text[:cut]
        text = text[cut:]
    yield text


def _text_of(row: Row, where: str, counts: Counts, *, no_zero: bool) -> str | None:
    """The text of a row; None where it makes no document, which is counted."""
    counts.rows += row.first
    if row.problem:
        counts.note_bad(row.problem)
    elif row.value is None:
        counts.null += 1
    elif not isinstance(row.value, str):
        counts.note_bad(f"{where}: the column holds {type(row.value).__name__}, not a text; set column")
    elif row.first and row.last and not row.value.strip():
        counts.empty += 1
    elif no_zero and "\0" in row.value:
        counts.note_bad(f"{where}: holds the byte 0, which ends a text where tokens are bytes")
    elif not _is_utf8(row.value):
        counts.note_bad(f"{where}: half of a surrogate pair, which is not valid in UTF-8")
    else:
        return row.value
    return None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can say such letters by escapes
        return False
    return True
