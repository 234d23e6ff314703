"""The sources of batches, how a source is made of it, and whether it fits a model."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from tokenizers import Tokenizer

from jaxlab.checkpoints import resolve
from jaxlab.data.digits import DigitsConfig, DigitsSource
from jaxlab.data.documents.config import DocumentsConfig
from jaxlab.data.documents.source import DocumentsSource
from jaxlab.data.documents.stand_in import StandIn
from jaxlab.data.episodes import EpisodesConfig, EpisodesSource
from jaxlab.data.image_chats import ImageChatsConfig, ImageChatsSource
from jaxlab.data.needle import NeedleConfig, NeedleSource
from jaxlab.data.needle_text import NeedleTextConfig, NeedleTextSource
from jaxlab.data.text import FindModel, TextConfig, TextSource
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, PlainVisionConfig

DataConfig = (
    TextConfig
    | DigitsConfig
    | EpisodesConfig
    | NeedleConfig
    | NeedleTextConfig
    | DocumentsConfig
    | ImageChatsConfig
)
"""What a model is trained or evaluated on."""


@runtime_checkable
class Source(Protocol):
    """Batches as `jaxlab.models.forward` takes them, with loss_mask bool[B, T]: True on targets.

    A training batch is a pure function of seed and step, so the number of the step is the position in the
    data: a checkpoint holds no other, and a resumed run reads on where it was. A batch of several data sets
    has source_ids int32[B] besides, which of `source_names` each row is from; models do not read it.
    """

    source_names: tuple[str, ...]
    """The data sets of a mixture, as source_ids number them; () where batches have none."""

    @property
    def identity(self) -> str:
        """Changes when the data changes."""
        ...

    def batch(
        self, seed: int, step: int, batch_size: int, rows: slice | None = None
    ) -> dict[str, np.ndarray]:
        """The training batch of a step; a pure function of its arguments.

        Args:
          batch_size: rows of the whole batch, of all processes.
          rows: which of them to give; None: all. One of several processes asks for its own, and what they
            get makes up the batch that one process would get.
        """
        ...

    def held_out_batches(
        self, batch_size: int, count: int, split: str = "validation", rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """At most `count` full batches of a held-out split, always the same ones; `rows` of each."""
        ...

    def held_out_rows(self, batch_size: int, split: str) -> int:
        """The rows of the first held-out batch of a split, 0 if there is none; nothing is built."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """None: tokens are bytes."""
        ...

    @property
    def largest_token(self) -> int:
        """The highest token id that a batch may hold."""
        ...


def make_source(config: DataConfig, find_model: FindModel = resolve, *, for_shapes: bool = False) -> Source:
    """The source that `config` describes; `find_model` says where a model is that it names.

    Args:
      for_shapes: only the shapes of batches are asked for. Documents that are not tokenised yet are not
        tokenised for that: what stands for them gives empty batches, and a note says so.

    Raises:
      UserError: what the source reads is not there.
    """
    match config:
        case TextConfig():
            return TextSource(config, find_model)
        case DigitsConfig():
            return DigitsSource(config)
        case EpisodesConfig():
            return EpisodesSource(config)
        case NeedleConfig():
            return NeedleSource(config)
        case NeedleTextConfig():
            return NeedleTextSource(config, find_model)
        case DocumentsConfig():
            source = DocumentsSource(config, find_model)
            return StandIn(source) if for_shapes and not source.prepared else source
        case ImageChatsConfig():
            return ImageChatsSource(config, find_model)


def batch_shapes(source: Source, batch_size: int, split: str = "train") -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a training batch, or of the first held-out one of a split; one row at most is built.

    Raises:
      UserError: the split is too small for a batch.
    """
    if split == "train":
        rows, one = batch_size, source.batch(0, 0, 1)
    else:
        rows = source.held_out_rows(batch_size, split)
        if not rows:
            raise _too_small(source, batch_size, split)
        one = next(iter(source.held_out_batches(1, 1, split)))
    # Of images some arrays have several rows for one of the batch.
    return {name: jax.ShapeDtypeStruct((rows * x.shape[0], *x.shape[1:]), x.dtype) for name, x in one.items()}


def first_held_out(source: Source, batch_size: int, split: str) -> dict[str, np.ndarray]:
    """The first batch of a held-out split.

    Raises:
      UserError: the split is too small for one.
    """
    for batch in source.held_out_batches(batch_size, 1, split):
        return batch
    raise _too_small(source, batch_size, split)


def _too_small(source: Source, batch_size: int, split: str) -> UserError:
    match source:
        case DocumentsSource() if getattr(source.config, split):
            how = f"or give data.{split} more documents"
        case DocumentsSource():
            how = f"raise data.held_out, which is {source.config.held_out:g}, or give more data"
        case TextSource() | ImageChatsSource():
            how = f"lower data.holdout_every, which is {source.config.holdout_every}, or give more data"
        case _:
            how = "or give more data"
    return UserError(
        f"the {split} split of the data holds no full batch of {batch_size}; lower batch_size, {how}"
    )


def check_fits(
    batch: Mapping[str, jax.ShapeDtypeStruct] | Mapping[str, np.ndarray],
    model: ModelConfig,
    source: Source | None = None,
) -> None:
    """Checks that a batch is for `model`, or one of such shapes; of these see `check_all_tokens` besides.

    Args:
      source: where it comes from, which may know more of its images.

    Raises:
      UserError: it is not.
    """
    tokens = batch["tokens"]
    if tokens.shape[1] > model.max_length:
        raise UserError(
            f"sequences of {tokens.shape[1]} tokens exceed the model's max_length {model.max_length}; "
            "raise model.max_length or shorten the data"
        )
    if isinstance(tokens, np.ndarray):
        _check_token(int(tokens.max()), model)
    if isinstance(source, ImageChatsSource):
        source.check_vision(model)
    elif "images" in batch:
        vision = model.vision
        if not isinstance(vision, PlainVisionConfig):
            raise UserError(
                f"the data holds images and the model has {vision.kind if vision else 'no'} vision; "
                "give model.vision of kind plain"
            )
        size = (vision.image_size, vision.image_size, vision.channels)
        if batch["images"].shape[2:] != size:
            raise UserError(
                f"the data holds images of {batch['images'].shape[2:]}, the model takes {size}; "
                "set model.vision.image_size and channels"
            )


def check_all_tokens(source: Source, model: ModelConfig) -> None:
    """Checks that no batch of a source can hold a token that `model` has no row for: a gather past the end of
    a table would say nothing, and one batch tells little.

    Raises:
      UserError: one can.
    """
    _check_token(source.largest_token, model, source.tokenizer())


def _check_token(largest: int, model: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
    if largest >= model.vocab_size:  # they are targets too, and none beyond it is ever made
        word = None if tokenizer is None else tokenizer.id_to_token(largest)
        raise UserError(
            f"the data holds token {largest}{'' if word is None else f' ({word!r})'}, the model's vocab_size "
            f"is {model.vocab_size}; raise model.vocab_size or take other data"
        )


def check_same_words(model: Tokenizer | None, source: Tokenizer | None, path: str | Path) -> None:
    """Checks that the words of the model at `path` are those of the data.

    Raises:
      UserError: a word that the model knows is another one, or none, in the data.
    """
    if model is None or source is None:
        if model is not source:
            kinds = ["words" if tokenizer else "bytes" for tokenizer in (model, source)]
            raise UserError(
                f"{path}: the model reads {kinds[0]}, the data holds {kinds[1]}; change data.kind "
                "or data.tokenizer"
            )
        return
    theirs = source.get_vocab()
    for word, token in model.get_vocab().items():
        if theirs.get(word) != token:
            raise UserError(
                f"{path}: {word!r} is token {token} of the model and {theirs.get(word)} of the data; "
                "take the data of the kind that it was trained on"
            )
