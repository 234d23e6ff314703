"""Conversations about images, as a vision-language model's own processor and chat template have them.

Rows are learnt where the assistant speaks. The rows of a batch have images that end up in the same shapes, so
that a run compiles one step for each such shape and each length, which is a power of two.
"""

import functools
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from jaxlab.checkpoints import OpenModel, open_model, resolve
from jaxlab.data.documents.chats import said
from jaxlab.data.image_rows import ImageRow, read_image_rows
from jaxlab.data.text import FindModel
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.models import Batch, ModelConfig, PlainVisionConfig, prepare_batch, stack_rows
from jaxlab.processing import One, Turns, as_texts, encode_with_spans, render_turns

BEGIN, END = "\ue010", "\ue011"
"""Around the assistant's turns while images are placed; of private use in Unicode."""
SHORTEST = 64
"""The least length that rows are padded to, a power of two, unless `sequence_length` is less."""
_ORIENTATION = 0x0112
_SHOWN = 10


@dataclass(frozen=True)
class ImageChatsConfig:
    """Conversations about images from JSON Lines (docs/finetuning.md)."""

    kind: Literal["image_chats"] = "image_chats"
    path: str = ""
    """A file of JSON Lines, or one JSON list: LLaVA's form, or OpenAI's messages."""
    images: str | None = None
    """The folder in which images lie; by default that of the file. Names never lead out of it."""
    model: str = ""
    """The vision-language model whose processor, tokenizer and chat template are used."""
    chat_template: str | None = None
    """A file in Jinja to take instead of the model's own."""
    train_on: Literal["all", "last"] = "all"
    """Which turns of the assistant are learnt."""
    sequence_length: int = 1024
    """Most tokens in a row (T), those of images among them; longer conversations are left out."""
    holdout_every: int = 20
    """Every how many-th row is held out of training, for validation and test in turns."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """What happens to rows that are damaged, or whose images are not there."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("which file of conversations?", key="path")
        if not self.model:
            raise ConfigError("whose processor and chat template? usually as init_from", key="model")
        if not 2 <= self.sequence_length < 1 << 31:
            raise ConfigError("must be at least 2, and an int32", key="sequence_length")
        if self.holdout_every < 2:
            raise ConfigError("must be at least 2: something has to be left to train on", key="holdout_every")


class Row(NamedTuple):
    """A conversation as tokens."""

    where: str
    tokens: np.ndarray
    """int32[T]"""
    targets: np.ndarray
    """bool[T]: what the assistant says."""
    images: tuple[Path, ...]
    bucket: tuple[Any, ...]
    """What the rows of a batch share: length and shapes of images."""

    @property
    def length(self) -> int:
        """Tokens after padding."""
        return int(self.bucket[0])


class ImageChatsSource:
    """Batches of whole rows from one bucket; see `Source`."""

    source_names: tuple[str, ...] = ()

    def __init__(self, config: ImageChatsConfig, find_model: FindModel = resolve) -> None:
        self.config = config
        self.opened = opened = open_model(find_model(config.model))
        self.model = check_model(opened)
        path = Path(config.path)
        folder = path.parent if config.images is None else Path(config.images)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; set data.images")
        found, bad = read_image_rows(path, folder)
        encoder = Encoder(opened, config)
        rows, problems = encoder.encode(found)
        self._report(bad + problems, encoder.overlong)
        every = config.holdout_every
        self.training = [row for i, row in enumerate(rows) if i % every != every - 1]
        held_out = [row for i, row in enumerate(rows) if i % every == every - 1]
        self.held_out = {"validation": held_out[::2], "test": held_out[1::2]}
        if not self.training or not held_out:
            raise UserError(
                f"{path}: {len(rows)} conversations that can be learnt; at least {every} are needed to hold "
                "some out; set data.holdout_every"
            )
        digest = hashlib.sha256(opened.identity.encode())
        for row in rows:
            digest.update(row.tokens.tobytes() + row.targets.tobytes())
            for image in row.images:
                digest.update(f"{image.name} {image.stat().st_size} ".encode())
        self.identity = digest.hexdigest()
        self._plans: dict[int, tuple[tuple[tuple[int, ...], int], ...]] = {}
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def check_vision(self, model: ModelConfig) -> None:
        """Whether a model takes the images as they are made here.

        Raises:
          UserError: its tower is another than that of `data.model`, or its placeholder.
        """
        if model.vision != self.model.vision:
            raise UserError(
                f"data.model {self.config.model} has another vision tower, or another token for images, than "
                "the model to train; name the same model"
            )

    def _report(self, bad: Sequence[str], overlong: int) -> None:
        """A line for each bad row.

        Raises:
          UserError: there are some, and none is to be passed by.
        """
        if bad and self.config.on_bad_rows == "refuse":
            more = f" (and {len(bad) - 1} more bad rows)" if len(bad) > 1 else ""
            raise UserError(f"{bad[0]}{more}; mend it, or set data.on_bad_rows: skip")
        for line in bad[:_SHOWN]:
            warnings.warn(UserNote(f"{line}; left out"), stacklevel=2)
        left = len(bad) - _SHOWN
        if left > 0:
            warnings.warn(UserNote(f"{self.config.path}: {left} more bad rows left out"), stacklevel=2)
        if overlong:
            warnings.warn(
                UserNote(
                    f"{self.config.path}: {overlong} conversations of more than "
                    f"{self.config.sequence_length} tokens left out (data.sequence_length)"
                ),
                stacklevel=2,
            )

    def batch(
        self, seed: int, step: int, batch_size: int, rows: slice | None = None
    ) -> dict[str, np.ndarray]:
        plan = self._plan(batch_size)
        if not plan:
            raise UserError(
                f"{self.config.path}: no {batch_size} conversations have images of one shape; lower "
                "batch_size"
            )
        epoch, number = divmod(step, len(plan))
        chosen = self._order(batch_size, seed, epoch)[number]
        return self._build([self.training[i] for i in chosen][rows or slice(None)])

    def _plan(self, batch_size: int) -> tuple[tuple[tuple[int, ...], int], ...]:
        if batch_size not in self._plans:
            self._plans[batch_size] = self._make_plan(batch_size)
        return self._plans[batch_size]

    def _make_plan(self, batch_size: int) -> tuple[tuple[tuple[int, ...], int], ...]:
        """For each batch of an epoch, the rows of its bucket and which of its batches it is; what fills no
        batch is told once."""
        buckets = _buckets(self.training)
        left = [rows for rows in buckets.values() if len(rows) < batch_size]
        if left and batch_size > 1:
            count = sum(map(len, left))
            warnings.warn(
                UserNote(
                    f"{self.config.path}: {count} of {len(self.training)} conversations are in none of the "
                    f"batches of {batch_size}: too few have images and lengths of their shapes"
                ),
                stacklevel=2,
            )
        return tuple(
            (tuple(rows), index) for rows in buckets.values() for index in range(len(rows) // batch_size)
        )

    def _shuffled(self, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """The rows of each batch of an epoch, in the order in which they are read."""
        plan = self._plan(batch_size)
        rank = np.argsort(np.random.default_rng((seed, epoch)).permutation(len(self.training)))
        shuffled = {numbers: sorted(numbers, key=lambda i: int(rank[i])) for numbers, _ in plan}
        batches = [
            np.asarray(shuffled[numbers][index * batch_size : (index + 1) * batch_size])
            for numbers, index in plan
        ]
        return [batches[i] for i in np.random.default_rng((seed, epoch, 1)).permutation(len(batches))]

    def held_out_batches(
        self, batch_size: int, count: int, split: str = "validation", rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        made = 0
        for numbers in _buckets(self.held_out[split]).values():
            for start in range(0, len(numbers) - batch_size + 1, batch_size):
                if made == count:
                    return
                made += 1
                chosen = [self.held_out[split][i] for i in numbers[start : start + batch_size]]
                yield self._build(chosen[rows or slice(None)])

    def held_out_rows(self, batch_size: int, split: str) -> int:
        full = any(len(rows) >= batch_size for rows in _buckets(self.held_out[split]).values())
        return batch_size if full else 0

    def tokenizer(self) -> Tokenizer | None:
        return self.opened.tokenizer

    @functools.cached_property
    def largest_token(self) -> int:
        rows = (*self.training, *self.held_out["validation"], *self.held_out["test"])
        return int(max(row.tokens.max() for row in rows))

    def _build(self, rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """A batch of rows from one bucket, prepared for `forward`."""
        tokenizer = self.opened.tokenizer
        assert tokenizer is not None
        batch = stack_rows([self._of_row(row, tokenizer) for row in rows], rows[0].length, self.model)
        batch.setdefault("segment_ids", np.ones_like(batch["tokens"]))
        prepared: dict[str, Any] = {**prepare_batch(batch, self.model)}
        return prepared

    def _of_row(self, row: Row, tokenizer: Tokenizer) -> Batch:
        processor = self.opened.processor
        made: Batch = {"tokens": row.tokens[None], "loss_mask": row.targets[None]}
        if not row.images:
            return made
        try:
            ones = [processor.one(path, len(row.images) == 1) for path in row.images]
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        if _shapes(ones) != row.bucket[1:]:
            raise UserError(f"{row.where}: its images changed since training began")
        of_tokens = processor.text.of_tokens(row.tokens.tolist(), self.model.image_token, ones)
        if self.model.has_prefix:
            of_tokens["token_type_ids"] = _after(row.targets)[None].astype(np.int32)
        return cast(Batch, {**made, **processor.images.together(ones), **of_tokens})


class Encoder:
    """Conversations to rows."""

    def __init__(self, opened: OpenModel, config: ImageChatsConfig) -> None:
        """
        Raises:
          UserError: the model has no tokenizer, or the template cannot be read.
        """
        self.opened, self.config = opened, config
        assert opened.tokenizer is not None
        self.tokenizer = opened.tokenizer
        self.template = opened.chat_template
        if config.chat_template is not None:
            try:
                self.template = Path(config.chat_template).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise UserError(f"{config.chat_template}: no text file: {error}") from error
        self.overlong = 0
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = frozenset(number for number, token in added.items() if token.special)
        self._ones: dict[tuple[tuple[int, int], bool], One] = {}

    def encode(self, rows: Sequence[ImageRow]) -> tuple[list[Row], list[str]]:
        """The rows that can be learnt, and a line on each that cannot."""
        made, bad = [], []
        turns = self._without_template(rows) if self.template is None else self._rendered(rows)
        for row, said_turns in zip(rows, turns, strict=True):
            try:
                found = self._encode(row, said_turns)
            except UserError as error:
                bad.append(str(error) if row.where in str(error) else f"{row.where}: {error}")
            else:
                made += [found] if found is not None else []
        return made, bad

    def _rendered(self, rows: Sequence[ImageRow]) -> list[Turns]:
        """By the chat template: with the images as parts or, where it leaves them out, as words in texts."""
        processor, assembled = self.opened.processor, self.template
        assert assembled is not None
        mark, lead = processor.mark(self.tokenizer), processor.lead(1, self.tokenizer)
        show = lambda chats: render_turns(
            chats,
            assembled,
            special_tokens=self.opened.special_tokens,
            last_only=self.config.train_on == "last",
            place=f"{self.opened.path}: its chat template",
        )
        turns = show([row.conversation for row in rows])
        lacking = [i for i, t in enumerate(turns) if t.problem or t.text.count(mark) != len(rows[i].images)]
        if lacking:
            in_texts = lambda one: one._replace(messages=as_texts(one.messages, lead))
            again = show([in_texts(rows[i].conversation) for i in lacking])
            turns = [*turns]
            for i, found in zip(lacking, again, strict=True):
                turns[i] = found
        return turns

    def _without_template(self, rows: Sequence[ImageRow]) -> list[Turns]:
        """Of models without one (PaliGemma): a question, and its answer with the end of the text."""
        processor = self.opened.processor
        lead, end = processor.lead(1, self.tokenizer), self.opened.special_tokens.get("eos_token", "")
        turns = []
        for row in rows:
            roles = [message["role"] for message in row.conversation.messages]
            if roles != ["user", "assistant"]:
                turns.append(Turns("", (), "without a chat template, one question and one answer are read"))
                continue
            if row.conversation.tools:
                turns.append(Turns("", (), "the model has no chat template that its tools could stand in"))
                continue
            asked, answer = (m["content"] for m in as_texts(row.conversation.messages, lead))
            turns.append(Turns(asked + answer + end, ((len(asked), len(asked + answer + end)),)))
        return turns

    def _encode(self, row: ImageRow, turns: Turns) -> Row | None:
        if turns.problem:
            raise UserError(turns.problem)
        if BEGIN in turns.text or END in turns.text:
            raise UserError(f"holds the character {BEGIN!a} or {END!a}, of private use here")
        ones = [self._one(path, len(row.images) == 1) for path in row.images]
        text, spans = self._placed(turns, ones)
        first = self.opened.special_tokens.get("bos_token")
        special = self.opened.processor.text.special_tokens and not (first and text.startswith(first))
        (found,) = encode_with_spans([text], self.tokenizer, special=special, where=row.where)
        targets = said(Turns(text, tuple(spans)), found.ids, found.spans, self.special)
        if not targets.any():
            raise UserError("the assistant says nothing, so there is nothing to learn")
        if len(found.ids) > self.config.sequence_length:
            self.overlong += 1
            return None
        length = min(max(SHORTEST, 1 << (len(found.ids) - 1).bit_length()), self.config.sequence_length)
        bucket = (length, *_shapes(ones))
        return Row(row.where, found.ids.astype(np.int32), targets, row.images, bucket)

    def _placed(self, turns: Turns, ones: Sequence[One]) -> tuple[str, list[tuple[int, int]]]:
        """The text with the tokens of images in it, and where in it the assistant speaks."""
        place = lambda text: self.opened.processor.place_ones(text, ones, self.tokenizer).text
        if self.template is None:  # what the processor does to a prompt is not done to the answer
            ((begin, end),) = turns.spans
            text = f"{place(turns.text[:begin])}{BEGIN}{turns.text[begin:end]}{END}"
        else:
            text, at = "", 0
            for begin, end in turns.spans:
                text += f"{turns.text[at:begin]}{BEGIN}{turns.text[begin:end]}{END}"
                at = end
            text = place(text + turns.text[at:])
        clean, *pieces = text.split(BEGIN)
        spans = []
        for piece in pieces:
            inner, _, after = piece.partition(END)
            spans.append((len(clean), len(clean) + len(inner)))
            clean += inner + after
        return clean, spans

    def _one(self, path: Path, alone: bool) -> One:
        """What an image of this size becomes, without its pixels."""
        try:
            with Image.open(path) as image:
                size = image.size if image.getexif().get(_ORIENTATION, 1) < 5 else image.size[::-1]
        except Exception as error:  # decoders of broken files raise nearly anything
            raise UserError(f"{path}: not an image that can be read ({error})") from error
        if (size, alone) not in self._ones:
            one = self.opened.processor.one(Image.new("RGB", size), alone)
            shape = np.broadcast_to(np.zeros((), np.float32), one.pixels.shape)
            self._ones[size, alone] = one._replace(pixels=shape)
        return self._ones[size, alone]


def check_model(opened: OpenModel) -> ModelConfig:
    """The model whose processor is used.

    Raises:
      UserError: it has no tower, tokenizer or processor.
    """
    config = opened.config
    if config.vision is None or isinstance(config.vision, PlainVisionConfig):
        raise UserError(f"{opened.path}: no vision-language model of Hugging Face's form; set data.model")
    if opened.tokenizer is None:
        raise UserError(f"{opened.path}: has no tokenizer; set data.model")
    opened.processor.mark(opened.tokenizer)
    return config


def _after(targets: np.ndarray) -> np.ndarray:
    """True from the first target on."""
    return np.arange(len(targets)) >= int(np.argmax(targets))


def _shapes(ones: Sequence[One]) -> tuple[Any, ...]:
    return tuple((one.pixels.shape, one.grid, one.parts, one.alone) for one in ones)


def _buckets(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[int]]:
    found: dict[tuple[Any, ...], list[int]] = {}
    for number, row in enumerate(rows):
        found.setdefault(row.bucket, []).append(number)
    return found
