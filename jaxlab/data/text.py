"""Byte-level language modelling on files: by default the source files of Python's own standard library."""

import functools
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxlab.errors import ConfigError, UserError

SEPARATOR = 0
"""The byte between files; none of the text files holds it."""


@dataclass(frozen=True)
class TextConfig:
    """Byte-level text from files."""

    path: str = "stdlib"
    """A file, a folder of text files, or `stdlib`: the source files of Python's standard library."""
    pattern: str = "**/*.py"
    """Which files of a folder."""
    sequence_length: int = 1024
    """Tokens in a sequence (T)."""
    holdout_every: int = 20
    """Every how many-th file, in order of names, is held out of training."""

    def __post_init__(self):
        if self.sequence_length < 2:
            raise ConfigError("must be at least 2", key="sequence_length")
        if self.holdout_every < 2:
            raise ConfigError("must be at least 2: something has to be left to train on", key="holdout_every")


class TextSource:
    """Random crops of the training files; the held-out files in order, without overlap."""

    def __init__(self, config: TextConfig):
        self.config = config
        self.training, self.held_out, self.identity = read_files(
            config.path, config.pattern, config.holdout_every
        )
        for name, tokens in (("training", self.training), ("held-out", self.held_out)):
            if len(tokens) <= config.sequence_length:
                raise UserError(
                    f"{config.path}: {len(tokens)} bytes of {name} text cannot fill a sequence of "
                    f"{config.sequence_length}; lower data.text.sequence_length or give more text"
                )

    def batch(self, seed: int, step: int, batch_size: int) -> dict[str, np.ndarray]:
        length = self.config.sequence_length
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(0, len(self.training) - length, size=batch_size)
        return self._crops(self.training, starts)

    def held_out_batches(self, batch_size: int, count: int, split: str = "validation"):
        """At most `count` full batches of held-out text; `test` takes the second half of it, `validation` the first."""
        length = self.config.sequence_length
        half = len(self.held_out) // 2
        tokens = self.held_out[half:] if split == "test" else self.held_out[:half]
        for i in range(min(count, (len(tokens) // length) // batch_size)):
            yield self._crops(tokens, (i * batch_size + np.arange(batch_size)) * length)

    def tokenizer(self) -> None:
        return None

    def _crops(self, tokens: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
        crops = tokens[starts[:, None] + np.arange(self.config.sequence_length)[None]].astype(np.int32)
        mask = np.ones(crops.shape, bool)
        mask[:, 0] = False
        return {"tokens": crops, "loss_mask": mask}


@functools.cache
def read_files(path: str, pattern: str, holdout_every: int) -> tuple[np.ndarray, np.ndarray, str]:
    """(training bytes, held-out bytes, digest of both) of the files under `path`."""
    root = Path(sysconfig.get_paths()["stdlib"]) if path == "stdlib" else Path(path)
    if not root.exists():
        raise UserError(f"{root}: no such file or folder; set data.text.path")
    files = [root] if root.is_file() else sorted(p for p in root.glob(pattern) if p.is_file())
    if path == "stdlib":  # packages installed beside it and its test suite differ from machine to machine
        skipped = ("site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__")
        files = [f for f in files if not set(skipped) & set(f.relative_to(root).parts)]
    texts = [f.read_bytes() for f in files]
    texts = [t for t in texts if t and SEPARATOR not in t]
    if len(texts) == 1:  # one file: its end is held out
        cut = len(texts[0]) * (holdout_every - 1) // holdout_every
        training, held_out = [texts[0][:cut]], [texts[0][cut:]]
    else:
        held_out = texts[holdout_every - 1 :: holdout_every]
        training = [t for i, t in enumerate(texts) if i % holdout_every != holdout_every - 1]
    if not training or not held_out:
        raise UserError(
            f"{root}: {len(texts)} text files match {pattern}; at least {holdout_every} are needed, or one"
        )
    join = lambda parts: np.frombuffer(bytes([SEPARATOR]).join(parts), np.uint8)  # noqa: E731
    training_bytes, held_out_bytes = join(training), join(held_out)
    digest = hashlib.sha256(training_bytes.tobytes() + held_out_bytes.tobytes()).hexdigest()
    return training_bytes, held_out_bytes, digest
