"""What a family's processor is made of: one part for the pixels, one for the text around them."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from jaxlab.processing.settings import ProcessorSettings

if TYPE_CHECKING:  # a family may say what it is made of without Pillow
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
    parts: tuple[tuple[int, int], ...] = ()
    """(height, width) of each of its tiles, of tiles that vary in size and are filled up with zeros."""


class ImagePart:
    """The pixels of a family, by a folder's settings."""

    def one(self, image: "Pixels", alone: bool) -> One:
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
    plain_mark: ClassVar[str] = ""
    """What stands for an image in place of it, of a family whose tokenizer has no token for that."""
    separator: ClassVar[str] = ""
    """What follows a mark that is added."""
    special_tokens: ClassVar[bool] = True
    """Whether the tokenizer adds its own (like a first token of the text)."""
    video: ClassVar[Token | None] = None
    """What stands for a video in a prompt, to refuse it; None: the family has no such token."""

    def lead(self, count: int, words: Mapping[str, str]) -> str:
        """What goes before a prompt that does not say where its images are."""
        return ((self.plain_mark or words[self.mark]) + self.separator) * count

    def finish(self, text: str, words: Mapping[str, str]) -> str:
        """The prompt with marks in it as the family writes it."""
        return text

    def expand(self, one: One, words: Mapping[str, str]) -> str:
        """What replaces an image's mark."""
        raise NotImplementedError

    def join(self, pieces: Sequence[str], words: Mapping[str, str]) -> str:
        """The whole text of its pieces: the prompt's, and between them those of the images."""
        return "".join(pieces)

    def of_tokens(self, tokens: Sequence[int], image: int, ones: Sequence[One]) -> dict[str, np.ndarray]:
        """Further arrays of a batch that follow from where the tokens `image` lie in the text."""
        return {}


class ImageKind(NamedTuple):
    """An image processor of transformers."""

    read: Callable[[ProcessorSettings], ImagePart]
    defaults: Mapping[str, Any]
    """What it does unless a folder says otherwise."""


class ProcessorKind(NamedTuple):
    """The processor of a family of models, which names it (`Family.processor` of jaxlab.checkpoints)."""

    processor_class: str
    """Its class in transformers."""
    images: str | ImageKind
    """The image processor of a folder that names none; a kind itself: whatever the folder says."""
    read: Callable[[ProcessorSettings, ProcessorSettings], TextPart]
    """The text part, from what the folder says of its processor and of its model."""
    always: Mapping[str, Any] = {}
    """Settings of the image processor that the family's processor overrules."""
    told: Callable[[ProcessorSettings, ProcessorSettings], Mapping[str, Any]] | None = None
    """Settings of the image processor that follow from processor_config.json and config.json; they are
    stronger than what the image processor's file says."""


def int32(values: Any) -> np.ndarray:
    return np.asarray(values, np.int32)
