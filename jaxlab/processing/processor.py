"""A prompt with images as a batch, by the processor files of a Hugging Face folder."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from jaxlab.errors import UserError
from jaxlab.processing.base import ImagePart, TextPart
from jaxlab.processing.pixels import read_image
from jaxlab.processing.registry import find_family, find_image_kind
from jaxlab.processing.settings import ProcessorSettings, read_json
from jaxlab.processing.tokens import encode

PREPROCESSOR, PROCESSOR, CONFIG = "preprocessor_config.json", "processor_config.json", "config.json"

ImageSource = str | os.PathLike[str] | Image.Image


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

    def __call__(
        self, text: str, images: Sequence[ImageSource], tokenizer: Tokenizer
    ) -> dict[str, np.ndarray]:
        """The batch of one prompt.

        Where the prompt holds no placeholder, the images go before it in the family's usual form; otherwise
        it has to hold one for each.

        Returns:
          tokens int32[1, T]; images, float32, as the family's processor has its pixel_values; and what the
          family needs besides (image_grid_thw, image_sizes, batch_num_images, pixel_attention_mask).

        Raises:
          UserError: an image that cannot be read or is of an extreme shape, placeholders that do not fit the
            images, or a tokenizer that lacks the family's tokens.
        """
        words = {name: self._word(name, tokenizer) for name in self.text.tokens}
        mark = words[self.text.mark]
        if mark not in text:
            text = self.text.lead(len(images), words) + text
        text = self.text.finish(text, words)
        if text.count(mark) != len(images):
            raise UserError(
                f"the prompt holds {text.count(mark)} {mark} for {len(images)} images; write one for each, "
                "or none"
            )
        ones = []
        for source in images:
            try:
                pixels = read_image(source, self.convert)
                ones.append(self.images.one(pixels, alone=len(images) == 1))
            except UserError as error:
                name = "" if isinstance(source, Image.Image) or str(source) in str(error) else f"{source}: "
                raise UserError(f"{name}{error}") from error
        first, *rest = text.split(mark)
        expanded = [self.text.expand(one, words) for one in ones]
        text = first + "".join(image + after for image, after in zip(expanded, rest, strict=True))
        tokens = encode(text, tokenizer, special=self.text.special_tokens, where="the prompt")
        self._check_count(tokens, text.count(words["image"]), words["image"], tokenizer)
        batch = {"tokens": np.asarray([tokens], np.int32)}
        return {**batch, **self.images.together(ones)} if ones else batch

    def _word(self, name: str, tokenizer: Tokenizer) -> str:
        """A token of the family as the tokenizer has it: by its id in config.json, else by its usual name."""
        ids, usual = self.text.tokens[name]
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
    folder: str | os.PathLike[str], *, config: Mapping[str, Any] | None = None, **overrides: Any
) -> Processor:
    """The processor of a Hugging Face folder, from its processor files and config.json.

    Args:
      config: its config.json, if that has been read already.
      overrides: settings of the image processor by their names in those files, over what the files say,
        like do_pan_and_scan=True.

    Raises:
      UserError: no such files, values that do not fit, or a family that is not supported.
    """
    folder = Path(folder)
    model = read_json(folder / CONFIG) if config is None else config
    around = read_json(folder / PROCESSOR)
    # Newer folders have the image processor inside the processor's file.
    nested = around.get("image_processor")
    place, pixels = folder / PROCESSOR, nested
    if nested is None:
        place, pixels = folder / PREPROCESSOR, read_json(folder / PREPROCESSOR)
        if not place.is_file():
            raise UserError(
                f"{folder}: no {PREPROCESSOR}, nor an image_processor in {PROCESSOR}: it reads no images"
            )
    if not isinstance(pixels, Mapping):
        raise UserError(f"{place}: image_processor must be an object")
    described = ((str(folder / CONFIG), model), (f"{folder / CONFIG}: text_config", inner(model)))
    settings = ProcessorSettings(described)
    files = ((str(folder / PROCESSOR), around), (str(place), pixels))
    family = find_family(ProcessorSettings(files), settings)
    kind = find_image_kind(ProcessorSettings((files[1],)), family)
    asked = ("the overrides", overrides)
    standard = ("its defaults", kind.defaults)
    images = ProcessorSettings((asked, (family.processor_class, family.always), files[1], standard))
    text = ProcessorSettings((asked, *files, standard))
    return Processor(
        folder, images.flag("do_convert_rgb"), kind.read(images), family.read(text, settings), settings
    )


def inner(model: Mapping[str, Any]) -> Mapping[str, Any]:
    text = model.get("text_config")
    return text if isinstance(text, Mapping) else {}
