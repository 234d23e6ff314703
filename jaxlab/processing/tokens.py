"""Text to tokens and back. Every tokenizer that comes from a file is made here, and used through here.

What a tokenizer.json stores of truncation and padding is of the texts that it was once used on, and would cut
or fill ours without a word: it is cleared. A damaged one can do anything to the `tokenizers` library, which
then raises any exception, or panics and prints a trace of its own: all of it becomes one line.
"""

import codecs
import functools
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from jaxlab.errors import UserError
from jaxlab.models import ModelConfig

MOST_GROWTH = 1024
"""How many times longer a normalizer may make a text: real ones write a letter as a few."""

_CAPTURE = threading.RLock()


def make_tokenizer(make: Callable[[], Tokenizer], place: str | Path, what: str = "a tokenizer") -> Tokenizer:
    """The tokenizer that `make` makes of a file, which neither cuts nor fills texts.

    Args:
      place: the file, for the message.
      what: what the file should have been.

    Raises:
      UserError: it is none.
    """
    with _one_line(f"{place}: not {what}"):
        tokenizer = make()
        _clear(tokenizer)
        growth = _growth(tokenizer)
    if growth > MOST_GROWTH:
        raise UserError(f"{place}: not {what}: its normalizer can make a text {growth:.3g} times as long")
    return tokenizer


def encode(
    text: str, tokenizer: Tokenizer | None, *, special: bool = True, where: str = "the text"
) -> list[int]:
    """Token ids of a text: its bytes where the model has no tokenizer.

    Args:
      special: with the tokens that the tokenizer puts around a text.
      where: what the text is, for the message.

    Raises:
      UserError: the text cannot be encoded in UTF-8, or the tokenizer fails on it.
    """
    return encode_batch([text], tokenizer, special=special, where=[where])[0].tolist()


def encode_batch(
    texts: Sequence[str], tokenizer: Tokenizer | None, *, special: bool = True, where: Sequence[str] = ()
) -> list[np.ndarray]:
    """Token ids of each text, int64[T]; see `encode`.

    Raises:
      UserError: a text cannot be encoded in UTF-8, or the tokenizer fails on it.
    """
    raw = []
    for text, name in zip(texts, where or ["the text"] * len(texts), strict=True):
        try:
            raw.append(text.encode())
        except UnicodeEncodeError as error:
            raise UserError(f"{name} is not valid UTF-8 (at its character {error.start + 1})") from None
    if tokenizer is None:
        return [np.frombuffer(text, np.uint8).astype(np.int64) for text in raw]
    name = where[0] if len(where) == 1 else "the texts" if not where else f"{where[0]} ... {where[-1]}"
    with _one_line(f"{name}: the tokenizer fails on it"):
        _clear(tokenizer)  # one that a caller made
        encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
        return [np.asarray(one.ids, np.int64) for one in encoded]


class Encoded(NamedTuple):
    """The tokens of a text, and which of its letters each is made of."""

    ids: np.ndarray
    """int64[T]"""
    spans: np.ndarray
    """int64[T, 2]: the letters [first, end) of the text; empty for tokens that stand for none of them."""
    special: np.ndarray
    """bool[T]: tokens that the tokenizer put around the text."""

    @property
    def text_end(self) -> int:
        """Where the tokens of the text end, before those that the tokenizer puts after it."""
        end = len(self.ids)
        while end and self.special[end - 1]:
            end -= 1
        return end


def encode_with_spans(
    texts: Sequence[str], tokenizer: Tokenizer, *, special: bool = True, where: str = "the texts"
) -> list[Encoded]:
    """Token ids of each text, and where in it each token stands; see `encode`.

    Raises:
      UserError: a text cannot be encoded in UTF-8, or the tokenizer fails on it.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where} are not valid UTF-8 (at character {error.start + 1} of one)") from None
    with _one_line(f"{where}: the tokenizer fails on them"):
        _clear(tokenizer)
        return [
            Encoded(
                np.asarray(one.ids, np.int64),
                np.asarray(one.offsets, np.int64).reshape(-1, 2),
                np.asarray(one.special_tokens_mask, bool),
            )
            for one in tokenizer.encode_batch(list(texts), add_special_tokens=special)
        ]


def decode(ids: Any, tokenizer: Tokenizer, *, skip_special: bool = True) -> str:
    """The text of token ids.

    Args:
      ids: int[T], a list or an array on the host.
      skip_special: leave special tokens out.

    Raises:
      UserError: the tokenizer fails on them.
    """
    with _one_line("tokens: the tokenizer fails to decode them"):
        text: str = tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=skip_special)
        return text


class TextStream:
    """From each token the text that it adds to what was shown; parts of a letter wait for the rest of it."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int] = ()) -> None:
        """
        Args:
          prompt: the tokens before: whether a word begins with a space depends on them.
        """
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Of the ids, what stands before `_start` is forgotten, and before `_shown` is shown.
        self._ids = list(prompt)[-_CONTEXT:] if tokenizer is not None else []
        self._start, self._shown = 0, len(self._ids)
        self._before = decode(self._ids, tokenizer) if tokenizer is not None and self._ids else ""

    def add(self, token: int) -> str:
        """The text that a token adds to what was shown.

        Raises:
          UserError: the tokenizer fails on it.
        """
        if self._tokenizer is None:
            return self._bytes.decode(bytes([token])) if token < 256 else f"<{token}>"
        if self._tokenizer.id_to_token(token) is None:  # a row of the embedding that only fills it up
            return f"<{token}>"
        self._ids.append(token)
        text = decode(self._ids[self._start :], self._tokenizer)
        if text.endswith("\ufffd") and len(self._ids) - self._shown < _LONGEST_LETTER:
            return ""
        added = text[len(self._before) :]
        self._start, self._shown = self._shown, len(self._ids)
        self._before = decode(self._ids[self._start :], self._tokenizer)
        return added


_CONTEXT = 8
"""Tokens of the prompt that a stream decodes with the first new one."""
_LONGEST_LETTER = 8
"""Tokens that wait at most: a letter has four bytes, and a token may end one and begin another."""


def check_token_ids(
    tokens: Any, config: ModelConfig, tokenizer: Tokenizer | None = None, *, where: str = "the text"
) -> None:
    """Whether the embedding has a row for every token; a lookup beyond it would say nothing.

    A tokenizer may know more tokens than the model has rows, as long as no text holds one.

    Args:
      tokens: ids, int[...], on the host.
      tokenizer: whose words the message names.
      where: what holds them, for the message.

    Raises:
      UserError: a token is beyond it.
    """
    ids = np.asarray(tokens)
    beyond = ids[(ids < 0) | (ids >= config.embedding_rows)]
    if beyond.size:
        token = int(beyond.reshape(-1)[0])
        word = None if tokenizer is None else tokenizer.id_to_token(token) if token >= 0 else None
        named = f"{word!r}, id {token}," if word is not None else f"{token}"
        raise UserError(
            f"{where} holds the token {named} and the model's embedding has {config.embedding_rows} rows; "
            "take the model's own tokenizer, or text without that token"
        )


def _clear(tokenizer: Tokenizer) -> None:
    """No text is cut or filled."""
    tokenizer.no_truncation()
    tokenizer.no_padding()


def _growth(tokenizer: Tokenizer) -> float:
    """How many times longer the normalizer can make a text, by its replacements."""
    state = None if tokenizer.normalizer is None else json.loads(tokenizer.normalizer.__getstate__())
    return functools.reduce(lambda a, step: a * step, _growths(state), 1.0)


def _growths(step: Any) -> Iterator[float]:
    if isinstance(step, dict):
        if step.get("type") == "Replace" and isinstance(step.get("content"), str):
            yield max(1.0, float(len(step["content"])))
        for inner in step.get("normalizers") or []:
            yield from _growths(inner)


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Whatever the library raises becomes a UserError that begins with `what`, and its traces are not shown.

    A panic of its Rust is a BaseException and prints a backtrace to the standard error of the process, past
    Python: that is caught in a file, and shown if all went well.
    """
    with _CAPTURE, tempfile.TemporaryFile() as caught:
        try:
            standard_error = os.dup(2)
        except OSError:  # there is none
            standard_error = None
        try:
            if standard_error is not None:
                os.dup2(caught.fileno(), 2)
            yield
        except (KeyboardInterrupt, SystemExit, UserError):
            raise
        except BaseException as error:
            caught.truncate(0)
            detail = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{what} ({detail})") from error
        finally:
            if standard_error is not None:
                os.dup2(standard_error, 2)
                if os.lseek(caught.fileno(), 0, os.SEEK_END):
                    os.lseek(caught.fileno(), 0, os.SEEK_SET)
                    os.write(standard_error, caught.read())
                os.close(standard_error)
