"""Prompts with images for a VLM, in four token classes: system, image, instruction, answer.

The flow between such classes, layer by layer, is what "Cross-modal Information Flow in Multimodal Large
Language Models" (arXiv 2411.18620) looks at: from the image to the question, from there to the last position.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlab.checkpoints import OpenModel
from jaxlab.data import Row, read_table
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.files import shipped
from jaxlab.icl.prompts import Prompts, bucket
from jaxlab.icl.roles import Part, Roles
from jaxlab.models import MllamaVisionConfig, PlainVisionConfig, prepare_batch
from jaxlab.processing import Message, Placed, as_texts, check_token_ids, encode_with_spans, render_chat

NAMES = ("system", "image", "instruction", "answer")
"""The token classes: what the template and the system say; the tokens of the image; the words of the prompt;
the last position of the prompt, and answer tokens that are read."""
SYSTEM, IMAGE, INSTRUCTION, ANSWER = range(4)
_MARKS = ("\ue000", "\ue001")
"""Around the instruction, while it is placed; no text holds them."""


@dataclass(frozen=True)
class ImagePromptsConfig:
    """Prompts with an image and an answer each, for a VLM."""

    kind: Literal["images"] = "images"
    path: str = ""
    """A .jsonl, .json, .csv or .tsv file, or a folder of the file below."""
    file: str = ""
    """The file within path, if that is a folder."""
    image: str = "image"
    """The column of the image's file, as seen from the folder of the table; nothing in it: no image."""
    prompt: str = "prompt"
    """The column of the instruction."""
    answer: str = "answer"
    """The column of the answer, whose tokens are the targets of the flows."""
    answer_tokens: int = 1
    """At most so many tokens of the answer are targets; their losses are summed."""
    chat: bool = True
    """Whether the chat template of the model is used, if it has one."""
    system: str = ""
    """With chat: what the conversation begins with."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("must be given", key="path")
        if self.answer_tokens < 1:
            raise ConfigError(f"must be at least 1, is {self.answer_tokens}", key="answer_tokens")

    @property
    def table(self) -> Path:
        return shipped(self.path) / self.file if self.file else shipped(self.path)


class ImagePrompt(NamedTuple):
    """A row of the table."""

    where: str
    images: tuple[str, ...]
    prompt: str
    answer: str


def read_image_prompts(config: ImagePromptsConfig) -> list[ImagePrompt]:
    """The prompts of a table.

    Raises:
      UserError: it cannot be read, or a row has no prompt or no answer, or names an image that is not there.
    """
    path = config.table
    if path.is_dir():
        raise UserError(f"{path}: a folder; set data.file to the table in it")
    rows = read_table(path, (config.image, config.prompt, config.answer))
    found = [_row(row, path.parent) for row in rows]
    if bare := [row for row in found if not row.images]:
        warnings.warn(
            f"{len(bare)} of {len(found)} rows name no image and are asked without one; the first: "
            f"{bare[0].where}",
            UserNote,
            stacklevel=2,
        )
    return found


def _row(row: Row, folder: Path) -> ImagePrompt:
    image, prompt, answer = (value.strip() for value in row.values)
    for name, value in (("prompt", prompt), ("answer", answer)):
        if not value:
            raise UserError(f"{row.where}: the {name} is empty")
    if any(mark in prompt for mark in _MARKS):
        raise UserError(
            f"{row.where}: the prompt holds a letter of private use, {_MARKS[0]!a} or {_MARKS[1]!a}"
        )
    images = (str(folder / image),) if image else ()
    for file in images:
        if not Path(file).is_file():
            raise UserError(f"{row.where}: no image {file}")
    return ImagePrompt(row.where, images, prompt, answer)


class ImagePrompts:
    """One prompt a batch: images have numbers of tokens of their own. Padded to few lengths, on the right: no
    token sees what follows but those of images and prefixes, and these see none of the padding."""

    def __init__(self, config: ImagePromptsConfig, opened: OpenModel) -> None:
        """
        Raises:
          UserError: the model has no vision, no tokenizer or no processor files, or its images are no tokens.
        """
        self.config, self.opened, self.model = config, opened, opened.config
        if not self.model.has_vision:
            raise UserError(f"{opened.path}: without vision; data of kind images is for VLMs")
        if isinstance(self.model.vision, PlainVisionConfig) or opened.tokenizer is None:
            raise UserError(f"{opened.path}: data of kind images needs files of tokenizer and processor")
        if isinstance(self.model.vision, MllamaVisionConfig):
            raise UserError(
                f"{opened.path}: its images are no tokens of the text, so that no flows come from them"
            )
        self.tokenizer = opened.tokenizer
        self.template = opened.chat_template if config.chat else None
        if config.system and self.template is None:
            raise UserError("data.system: is for conversations, and no chat template is used")
        self.rows = read_image_prompts(config)
        self.length = self.model.max_length
        self.label_names: tuple[str, ...] = ()
        self.roles = Roles(labels=(), query=ANSWER, classes=len(NAMES), names=NAMES)
        self._made: dict[int, Prompts] = {}

    def count(self, examples: int) -> int:
        return min(examples, len(self.rows))

    def with_shots(self, shots: int) -> "ImagePrompts":
        raise UserError("data: prompts with images have no demonstrations")

    def fixed(self) -> "ImagePrompts":
        return self

    def lessons(self, seed: int, per_class: int) -> Prompts:
        raise UserError("data: prompts with images have no classes to learn")

    def facts(self) -> dict[str, Any]:
        return {}

    def batches(self, seed: int, examples: int, batch_size: int) -> list[Prompts]:
        """The prompts one by one, drawn and ordered by the seed."""
        order = np.random.default_rng((seed, 2)).permutation(len(self.rows))[: self.count(examples)]
        return [self._numbered(int(at), row) for row, at in enumerate(order)]

    def _numbered(self, at: int, row: int) -> Prompts:
        if at not in self._made:
            self._made[at] = self._prompt(self.rows[at])
        return self._made[at]._replace(rows=np.array([row], np.int32))

    def _text(self, row: ImagePrompt) -> str:
        """The prompt, its instruction between marks."""
        instruction = row.prompt.join(_MARKS)
        if self.template is None:
            return instruction
        mark = self.opened.processor.mark(self.tokenizer)
        lead = self.opened.processor.lead(1, self.tokenizer)
        parts = [{"type": "image"}] * len(row.images) + [{"type": "text", "text": instruction}]
        system = [{"role": "system", "content": self.config.system}] if self.config.system else []
        messages: list[Message] = [*system, {"role": "user", "content": parts}]

        def render(messages: Sequence[Message]) -> str:
            assert self.template is not None
            place = f"{self.opened.path}: chat template"
            special = self.opened.special_tokens
            return render_chat(messages, self.template, special_tokens=special, image_mark=lead, place=place)

        text = render(messages)
        # A template that reads parts, and leaves images out.
        return text if text.count(mark) == len(row.images) else render(as_texts(messages, lead))

    def _prompt(self, row: ImagePrompt) -> Prompts:
        """One prompt.

        Raises:
          UserError: an image that cannot be read, a prompt that is too long, an answer that changes the
            tokens before it.
        """
        processor, text = self.opened.processor, self._text(row)
        first = self.opened.special_tokens.get("bos_token")
        adds_none = self.template is not None and bool(first) and text.startswith(str(first))
        try:
            placed = processor.place(text, row.images, self.tokenizer)
            before, _, rest = placed.text.partition(_MARKS[0])
            instruction, _, after = rest.partition(_MARKS[1])
            whole = before + instruction + after
            special = False if adds_none else processor.text.special_tokens
            answer = row.answer if self.template is not None else f" {row.answer}"
            prompt, answered = encode_with_spans([whole, whole + answer], self.tokenizer, special=special)
            ids = prompt.ids[: prompt.text_end]
            following = answered.ids[len(ids) : answered.text_end]
            if not len(following) or not np.array_equal(answered.ids[: len(ids)], ids):
                raise UserError(
                    "the answer changes the tokens of the prompt before it; end the prompt otherwise"
                )
            targets = following[: self.config.answer_tokens]
            # All target tokens but the last are read; the places before them give them.
            read = Placed(whole + self.tokenizer.decode(targets[:-1].tolist()), placed.ones)
            batch = self._batch(read, np.concatenate([ids, targets[:-1]]), special)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        prompts = self._classes(batch, prompt.spans, len(before), len(instruction), len(ids), targets)
        filler = 1 if self.model.image_token == 0 else 0
        return prompts.padded(min(bucket(prompts.parts.shape[1]), self.length), filler)

    def _batch(self, placed: Placed, ids: np.ndarray, special: bool) -> dict[str, Any]:
        batch = self.opened.processor.encode(placed, self.tokenizer, special_tokens=special)
        tokens = batch["tokens"][:, : len(ids)]
        if not np.array_equal(tokens[0], ids):
            raise UserError("the tokens of the answer are others in its text; set data.answer_tokens to 1")
        if len(ids) > self.model.max_length:
            raise UserError(f"its prompt has {len(ids)} tokens, the model reads {self.model.max_length}")
        check_token_ids(tokens, self.model, self.tokenizer, where="it")
        size = batch["tokens"].shape[1]
        cut = {
            name: x[:, : len(ids)] if x.ndim > 1 and x.shape[:2] == (1, size) else x
            for name, x in batch.items()
        }
        try:
            return dict(prepare_batch({**cut, "tokens": tokens}, self.model))
        except ValueError as error:
            raise UserError(f"its processor does not fit the model: {error}") from error

    def _classes(
        self,
        batch: dict[str, Any],
        spans: np.ndarray,
        start: int,
        length: int,
        asked: int,
        targets: np.ndarray,
    ) -> Prompts:
        tokens = np.asarray(batch["tokens"])
        classes = np.full(tokens.shape, SYSTEM, np.int32)
        first, end = spans[:asked].T
        inside = (end > start) & (first < start + length) & (end > first)
        classes[0, :asked][inside] = INSTRUCTION
        classes[tokens == self.model.image_token] = IMAGE
        classes[0, asked - 1 :] = ANSWER
        parts = np.where(classes == INSTRUCTION, Part.TEXT, Part.FORMAT).astype(np.int32)
        parts[0, asked - 1] = Part.LAST
        names, labels = np.unique(targets, return_inverse=True)
        positions = np.arange(asked - 1, asked - 1 + len(targets), dtype=np.int32)
        alone = len(targets) == 1
        nothing = np.full(tokens.shape, -1, np.int32)
        return Prompts(
            batch={name: np.asarray(x) for name, x in batch.items()},
            classes=classes,
            positions=positions if alone else positions[None],
            label_tokens=names[None].astype(np.int32),
            labels=labels.astype(np.int32) if alone else labels[None].astype(np.int32),
            parts=parts,
            label_words=nothing,
            demonstrations=nothing,
            rows=np.zeros(1, np.int32),
        )


def image_prompts_identity(config: ImagePromptsConfig) -> str:
    """A digest of the table and its images.

    Raises:
      UserError: one is missing.
    """
    digest = hashlib.sha256()
    for row in read_image_prompts(config):
        digest.update(json.dumps([row.prompt, row.answer]).encode())
        for file in row.images:
            digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return digest.hexdigest()
