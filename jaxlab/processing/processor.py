"""A prompt with images as a batch, by the processor files of a Hugging Face folder."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from jaxlab.errors import UserError
from jaxlab.processing.base import ImageKind, ImagePart, One, ProcessorKind, TextPart, Token
from jaxlab.processing.image_kinds import find_image_kind
from jaxlab.processing.pixels import read_image
from jaxlab.processing.settings import ProcessorSettings, read_json, shown
from jaxlab.processing.tokens import encode

PREPROCESSOR, PROCESSOR, CONFIG = "preprocessor_config.json", "processor_config.json", "config.json"
TOKENIZER = "tokenizer_config.json"

ImageSource = str | os.PathLike[str] | Image.Image


class Placed(NamedTuple):
    """A prompt whose images are placed: what the tokenizer reads, and what the tower reads."""

    text: str
    ones: tuple[One, ...]


@dataclass(frozen=True)
class Processor:
    """Images and text of one family, as `load_processor` finds them."""

    folder: Path
    convert: bool
    """Images that are not RGB are converted; else they are refused."""
    images: ImagePart
    text: TextPart
    model: ProcessorSettings
    """The model's config.json, for the ids of tokens."""

    def mark(self, tokenizer: Tokenizer) -> str:
        """What stands for an image in a prompt.

        Raises:
          UserError: the tokenizer lacks it.
        """
        return self.text.plain_mark or self._word(self.text.tokens[self.text.mark], tokenizer)

    def lead(self, count: int, tokenizer: Tokenizer) -> str:
        """What goes before a text that does not say where its images are.

        Raises:
          UserError: the tokenizer lacks the family's tokens.
        """
        words = {name: self._word(token, tokenizer) for name, token in self.text.tokens.items()}
        return self.text.lead(count, words)

    def __call__(
        self,
        text: str,
        images: Sequence[ImageSource],
        tokenizer: Tokenizer,
        *,
        special_tokens: bool | None = None,
    ) -> dict[str, np.ndarray]:
        """The batch of one prompt.

        Where the prompt holds no placeholder, the images go before it in the family's usual form; otherwise
        it has to hold one for each.

        Args:
          special_tokens: whether the tokenizer adds its own; None: as the family has it.

        Returns:
          tokens int32[1, T]; images, float32, as the family's processor has its pixel_values; and what the
          family needs besides (image_grid_thw, image_sizes, batch_num_images, pixel_attention_mask).

        Raises:
          UserError: an image that cannot be read or is of an extreme shape, placeholders that do not fit the
            images, a video, or a tokenizer that lacks the family's tokens.
        """
        return self.encode(self.place(text, images, tokenizer), tokenizer, special_tokens=special_tokens)

    def place(self, text: str, images: Sequence[ImageSource], tokenizer: Tokenizer) -> Placed:
        """The text in which what stands for images has as many tokens as they have, and the images.

        Raises:
          UserError: as for a call.
        """
        text = self._marked(text, len(images), tokenizer)
        return self._expanded(text, [self.one(source, len(images) == 1) for source in images], tokenizer)

    def place_ones(self, text: str, ones: Sequence[One], tokenizer: Tokenizer) -> Placed:
        """As `place`, of images that are ready for the tower.

        Raises:
          UserError: placeholders that do not fit the images, a video, or a tokenizer that lacks the family's
            tokens.
        """
        return self._expanded(self._marked(text, len(ones), tokenizer), ones, tokenizer)

    def one(self, source: ImageSource, alone: bool) -> One:
        """An image, ready for the tower.

        Args:
          alone: no other image is in the prompt.

        Raises:
          UserError: it cannot be read, or is of an extreme shape.
        """
        try:
            return self.images.one(read_image(source, self.convert), alone=alone)
        except UserError as error:
            name = "" if isinstance(source, Image.Image) or str(source) in str(error) else f"{source}: "
            raise UserError(f"{name}{error}") from error

    def _marked(self, text: str, count: int, tokenizer: Tokenizer) -> str:
        """The prompt with what stands for an image for each of them."""
        words = {name: self._word(token, tokenizer) for name, token in self.text.tokens.items()}
        self.refuse_videos(text, tokenizer)
        mark = self.text.plain_mark or words[self.text.mark]
        if mark not in text:
            text = self.text.lead(count, words) + text
        text = self.text.finish(text, words)
        if text.count(mark) != count:
            raise UserError(
                f"the prompt holds {text.count(mark)} {mark} for {count} images; write one for each, or none"
            )
        return text

    def _expanded(self, text: str, ones: Sequence[One], tokenizer: Tokenizer) -> Placed:
        """The prompt with as many tokens as the images have in place of each mark."""
        words = {name: self._word(token, tokenizer) for name, token in self.text.tokens.items()}
        first, *rest = text.split(self.text.plain_mark or words[self.text.mark])
        expanded = [self.text.expand(one, words) for one in ones]
        pieces = [first]
        for image, after in zip(expanded, rest, strict=True):
            pieces += [image, after]
        return Placed(self.text.join(pieces, words), tuple(ones))

    def encode(
        self, placed: Placed, tokenizer: Tokenizer, *, special_tokens: bool | None = None
    ) -> dict[str, np.ndarray]:
        """The batch of a prompt whose images are placed; see a call.

        Raises:
          UserError: the tokenizer splits the tokens of images.
        """
        text, ones = placed.text, placed.ones
        words = {name: self._word(token, tokenizer) for name, token in self.text.tokens.items()}
        special = self.text.special_tokens if special_tokens is None else special_tokens
        tokens = encode(text, tokenizer, special=special, where="the prompt")
        self._check_count(tokens, text.count(words["image"]), words["image"], tokenizer)
        batch = {"tokens": np.asarray([tokens], np.int32)}
        if not ones:
            return batch
        number = tokenizer.token_to_id(words["image"])
        assert number is not None  # such tokens were counted
        of_tokens = self.text.of_tokens(tokens, number, ones)
        return {**batch, **self.images.together(ones), **of_tokens}

    def refuse_videos(self, text: str, tokenizer: Tokenizer) -> None:
        """Whether a prompt holds what stands for a video, by its id in config.json or by its usual name.

        Raises:
          UserError: it does.
        """
        if (token := self.text.video) is None:
            return
        number = self.model.maybe_whole(*token.ids, least=0) if token.ids else None
        for word in (token.text, None if number is None else tokenizer.id_to_token(number)):
            if word and word in text:
                raise UserError(f"the prompt holds {word}: videos are not read; give frames of it as images")

    def _word(self, token: Token, tokenizer: Tokenizer) -> str:
        """A token of the family as the tokenizer has it: by its id in config.json, else by its usual name."""
        ids, usual = token
        number = self.model.maybe_whole(*ids, least=0) if ids else None
        if number is None and tokenizer.token_to_id(usual) is None:
            raise UserError(
                f"{self.folder}: the tokenizer has no token {usual}, which the family puts at images"
            )
        word = usual if number is None else tokenizer.id_to_token(number)
        if not word:
            raise UserError(f"{self.model.find(*ids)[1]} is {number}, which the tokenizer does not have")
        return word

    def _check_count(self, tokens: list[int], wanted: int, word: str, tokenizer: Tokenizer) -> None:
        number = tokenizer.token_to_id(word)
        got = sum(token == number for token in tokens)
        if got != wanted:
            raise UserError(
                f"{self.folder}: {wanted} image tokens {word} became {got} in the tokenizer; "
                "it has to be one of the tokenizer's added tokens"
            )


def load_processor(
    folder: str | os.PathLike[str],
    kinds: Sequence[ProcessorKind],
    *,
    config: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Processor:
    """The processor of a Hugging Face folder, from its processor files and config.json.

    As in transformers, the class that the files of processor or tokenizer name has precedence over the type
    of the model.

    Args:
      kinds: that of the model's family, and after it those of other families.
      config: its config.json, if that has been read already.
      overrides: settings of the image processor by their names in those files, over what the files say,
        like do_pan_and_scan=True.

    Raises:
      UserError: no such files, values that do not fit, or a class of processor that is not known.
    """
    folder = Path(folder)
    model = read_json(folder / CONFIG) if config is None else config
    around = read_json(folder / PROCESSOR)
    # Newer folders have the image processor inside the processor's file.
    nested = around.get("image_processor")
    place, pixels = folder / PROCESSOR, nested
    if nested is None:
        place, pixels = folder / PREPROCESSOR, read_json(folder / PREPROCESSOR)
        if not place.is_file() and not isinstance(kinds[0].images, ImageKind):
            raise UserError(
                f"{folder}: no {PREPROCESSOR}, nor an image_processor in {PROCESSOR}: it reads no images"
            )
    if not isinstance(pixels, Mapping):
        raise UserError(f"{place}: image_processor must be an object")
    described = ((str(folder / CONFIG), model), (f"{folder / CONFIG}: text_config", inner(model)))
    settings = ProcessorSettings(described)
    files = ((str(folder / PROCESSOR), around), (str(place), pixels))
    naming: tuple[tuple[str, Mapping[str, Any]], ...] = files
    if ProcessorSettings(files).find("processor_class")[0] is None:
        naming = (*files, (str(folder / TOKENIZER), read_json(folder / TOKENIZER)))
    kind = _named(ProcessorSettings(naming), kinds)
    images = find_image_kind(ProcessorSettings((files[1],)), kind)
    asked = ("the overrides", overrides)
    standard = ("its defaults", images.defaults)
    told = (
        kind.processor_class,
        {} if kind.told is None else kind.told(ProcessorSettings((files[0],)), settings),
    )
    layers = ProcessorSettings((asked, (kind.processor_class, kind.always), told, files[1], standard))
    text = ProcessorSettings((asked, *files, standard))
    return Processor(
        folder, layers.flag("do_convert_rgb"), images.read(layers), kind.read(text, settings), settings
    )


def _named(files: ProcessorSettings, kinds: Sequence[ProcessorKind]) -> ProcessorKind:
    """The kind whose class the files name; the first one where they name none."""
    name, where = files.find("processor_class")
    for kind in kinds:
        if name in (None, kind.processor_class):
            return kind
    known = ", ".join(dict.fromkeys(kind.processor_class for kind in kinds))
    raise UserError(f"{where} {shown(name)} is not supported; supported are {known}")


def inner(model: Mapping[str, Any]) -> Mapping[str, Any]:
    text = model.get("text_config")
    return text if isinstance(text, Mapping) else {}
