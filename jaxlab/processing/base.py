"""What a family's processor is made of: one part for the pixels, one for the text around them."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxlab.processing.pixels import Pixels


class One(NamedTuple):
    """One image of a prompt, ready for the tower."""

    pixels: np.ndarray
    """float32: [tiles, 3, height, width], or flat patches [patches, values]."""
    size: tuple[int, int]
    """(height, width) of the image as it came."""
    grid: tuple[int, int] = (0, 0)
    """(rows, columns) of tiles, or of patches, where the text needs them."""
    alone: bool = True
    """No other image is in the prompt."""


class ImagePart:
    """The pixels of a family, by a folder's settings."""

    def one(self, image: Pixels, alone: bool) -> One:
        """One image: resized, cut, normalised.

        Raises:
          UserError: its shape is beyond what the family takes.
        """
        raise NotImplementedError

    def together(self, ones: Sequence[One]) -> dict[str, np.ndarray]:
        """The images of a prompt as arrays of a batch: "images", and what goes with it."""
        raise NotImplementedError


class Token(NamedTuple):
    """A token that stands around or for images."""

    ids: tuple[str, ...]
    """Names of its id in config.json; where that has none of them, the token is `text`."""
    text: str


class TextPart:
    """The text around images of a family, by a folder's settings.

    As it is here: a mark for each image first, then the prompt unchanged.
    """

    tokens: ClassVar[Mapping[str, Token]]
    """Its tokens by our names; "image" is the one that image tokens of the tower replace."""
    mark: ClassVar[str] = "image"
    """Which of them stands for an image in a prompt."""
    separator: ClassVar[str] = ""
    """What follows a mark that is added."""
    special_tokens: ClassVar[bool] = True
    """Whether the tokenizer adds its own (like a first token of the text)."""

    def lead(self, count: int, words: Mapping[str, str]) -> str:
        """What goes before a prompt that does not say where its images are."""
        return (words[self.mark] + self.separator) * count

    def finish(self, text: str, words: Mapping[str, str]) -> str:
        """The prompt with marks in it as the family writes it."""
        return text

    def expand(self, one: One, words: Mapping[str, str]) -> str:
        """What replaces an image's mark."""
        raise NotImplementedError


def int32(values: Any) -> np.ndarray:
    return np.asarray(values, np.int32)
