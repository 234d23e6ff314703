"""Language modelling on files, in bytes or in a model's tokens: by default the source files of Python's own
standard library."""

import functools
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from jaxlab.checkpoints import open_model, resolve
from jaxlab.errors import ConfigError, UserError
from jaxlab.processing import encode_batch, make_tokenizer

FindModel = Callable[[str], Path]
"""From the name of a model to its folder or file. Raises UserError if there is none."""

SEPARATOR = 0
"""The byte between files; none of the text files holds it."""


@dataclass(frozen=True)
class TextConfig:
    """Text from files."""

    kind: Literal["text"] = "text"
    path: str = "stdlib"
    """A file, a folder of text files, or `stdlib`: the source files of Python's standard library."""
    pattern: str = "**/*.py"
    """Which files of a folder."""
    tokenizer: str | None = None
    """A model whose tokenizer makes tokens of each file, with those that it puts around a text; none: tokens
    are bytes."""
    sequence_length: int = 1024
    """Tokens in a sequence (T)."""
    holdout_every: int = 20
    """Every how many-th file, in order of names, is held out of training."""

    def __post_init__(self) -> None:
        if not self.pattern or Path(self.pattern).is_absolute():
            raise ConfigError("must be a pattern relative to the folder, such as **/*.py", key="pattern")
        if self.sequence_length < 2:
            raise ConfigError("must be at least 2", key="sequence_length")
        if self.holdout_every < 2:
            raise ConfigError("must be at least 2: something has to be left to train on", key="holdout_every")


class TextSource:
    """Random crops of the training files; the held-out files in order, without overlap."""

    source_names: tuple[str, ...] = ()

    def __init__(self, config: TextConfig, find_model: FindModel = resolve):
        self.config = config
        self._tokenizer = None if config.tokenizer is None else tokenizer_of(config.tokenizer, find_model)
        self.training, held_out, self.identity = read_text(config, self._tokenizer)
        half, unit = len(held_out) // 2, "bytes" if self._tokenizer is None else "tokens"
        self.held_out = {"validation": held_out[:half], "test": held_out[half:]}
        for name, tokens in {"training": self.training, **self.held_out}.items():
            if len(tokens) < config.sequence_length:
                raise UserError(
                    f"{config.path}: {len(tokens)} {unit} of {name} text cannot fill a sequence of "
                    f"{config.sequence_length}; lower data.sequence_length or give more text"
                )

    def batch(
        self, seed: int, step: int, batch_size: int, rows: slice | None = None
    ) -> dict[str, np.ndarray]:
        length = self.config.sequence_length
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(0, len(self.training) - length + 1, size=batch_size)
        return self._crops(self.training, starts if rows is None else starts[rows])

    def held_out_batches(
        self, batch_size: int, count: int, split: str = "validation", rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """At most `count` full batches of held-out text: `validation` its first half, `test` its second."""
        length, tokens = self.config.sequence_length, self.held_out[split]
        for i in range(min(count, (len(tokens) // length) // batch_size)):
            numbers = i * batch_size + np.arange(batch_size)
            yield self._crops(tokens, (numbers if rows is None else numbers[rows]) * length)

    def held_out_rows(self, batch_size: int, split: str) -> int:
        return batch_size if len(self.held_out[split]) // self.config.sequence_length >= batch_size else 0

    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    @functools.cached_property
    def largest_token(self) -> int:
        return int(max(tokens.max() for tokens in (self.training, *self.held_out.values())))

    def _crops(self, tokens: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
        crops = tokens[starts[:, None] + np.arange(self.config.sequence_length)[None]].astype(np.int32)
        mask = np.ones(crops.shape, bool)
        mask[:, 0] = False
        return {"tokens": crops, "loss_mask": mask}


def tokenizer_of(model: str, find_model: FindModel) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
      UserError: it has none.
    """
    found = open_model(find_model(model)).tokenizer
    if found is None:
        raise UserError(f"{model}: has no tokenizer; name another model, or leave data.tokenizer out")
    return found


def read_text(config: TextConfig, tokenizer: Tokenizer | None = None) -> tuple[np.ndarray, np.ndarray, str]:
    """(training tokens, held-out tokens, digest of what they follow from) of the files that `config` names.

    Raises:
      UserError: nothing there, or too few files.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if config.path == "stdlib" else Path(config.path)
    if not root.exists():
        raise UserError(f"{root}: no such file or folder; set data.path")
    files = [root] if root.is_file() else sorted(p for p in root.glob(config.pattern) if p.is_file())
    if config.path == "stdlib":  # packages installed beside it and its tests differ from machine to machine
        skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
        files = [f for f in files if not skipped & set(f.relative_to(root).parts)]
    try:
        stamped = tuple((f, f.stat().st_mtime_ns, f.stat().st_size) for f in files)
        words = None if tokenizer is None else tokenizer.to_str()
        training, held_out, digest = _read(stamped, config.holdout_every, words)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}; set data.path") from error
    if files and not any(f.stat().st_size for f in files):
        what = f"all {len(files)} files that match {config.pattern} are" if len(files) > 1 else "the file is"
        raise UserError(f"{root}: {what} empty; set data.path")
    if not len(training) or not len(held_out):
        raise UserError(
            f"{root}: {len(files)} files match {config.pattern}; at least {config.holdout_every} of text are "
            "needed, or one; set data.path, pattern or holdout_every"
        )
    return training, held_out, digest


@functools.cache
def _read(
    files: tuple[tuple[Path, int, int], ...], holdout_every: int, words: str | None
) -> tuple[np.ndarray, np.ndarray, str]:
    """The tokens of files, each with its time of change and its size, so that a changed file is read again.

    `words` is the tokenizer as text; None: bytes.
    """
    found = {file: file.read_bytes() for file, _, _ in files}
    found = {file: text for file, text in found.items() if text and SEPARATOR not in text}
    if words is not None:
        _check_utf8(found)
    texts = list(found.values())
    if len(texts) == 1:  # one file: its end is held out
        cut = len(texts[0]) * (holdout_every - 1) // holdout_every
        while words is not None and texts[0][cut] & 0xC0 == 0x80:  # inside a letter
            cut -= 1
        training, held_out = [texts[0][:cut]], [texts[0][cut:]]
    else:
        held_out = texts[holdout_every - 1 :: holdout_every]
        training = [t for i, t in enumerate(texts) if i % holdout_every != holdout_every - 1]
    joined = [bytes([SEPARATOR]).join(part) for part in (training, held_out)]
    digest = hashlib.sha256(f"{len(joined[0])} ".encode())
    for part in joined:
        digest.update(part)
    if words is None:
        return np.frombuffer(joined[0], np.uint8), np.frombuffer(joined[1], np.uint8), digest.hexdigest()
    digest.update(words.encode())
    tokenizer = make_tokenizer(lambda: Tokenizer.from_str(words), "the tokenizer of the data")
    return _encode(training, tokenizer), _encode(held_out, tokenizer), digest.hexdigest()


def _encode(texts: list[bytes], tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of texts, one after the other."""
    encoded = encode_batch([text.decode() for text in texts], tokenizer)
    return np.concatenate([np.zeros(0, np.int32), *(ids.astype(np.int32) for ids in encoded)])


def _check_utf8(texts: dict[Path, bytes]) -> None:
    for file, text in texts.items():
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}: not valid UTF-8 (at its byte {error.start + 1}), which a tokenizer reads; "
                "convert it, choose files by data.pattern, or leave data.tokenizer out to read bytes"
            ) from None
