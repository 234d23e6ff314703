"""Task `generate`: stream text from a model."""

import codecs
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import jax
import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from jaxlab.app import model_folder
from jaxlab.checkpoints import OpenModel, open_model
from jaxlab.config import POSITIONAL
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import Batch, ModelConfig, PlainVisionConfig, prepare_batch, stream


@dataclass(frozen=True)
class Arguments:
    """Stream text from a model."""

    model: Annotated[str, POSITIONAL]
    """A model folder, ours or Hugging Face's; a hub id; a .bin file of llama2.c; a run folder, or the config
    of a finished train run."""
    prompt: str
    """The text to go on from."""
    image: tuple[str, ...] = ()
    """Image files for a vision-language model; before the prompt, unless it says where they are."""
    max_new_tokens: int = 200
    """Most tokens to make."""
    temperature: float = 0.0
    """0: always the most likely token; higher: sampled."""
    seed: int = 0
    """Of sampling."""
    stop: str = ""
    """Stop after this token (a word of the model's tokenizer, or one byte)."""
    past_end: bool = False
    """Go on where the model ends its text."""
    prefill_chunk: int | None = None
    """Read the prompt so many tokens at a time: less memory for long ones. Not with images."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"must be at least 1, is {self.max_new_tokens}", key="max_new_tokens")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"must be finite and not negative, is {self.temperature}", key="temperature")
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ConfigError(f"must be at least 1, is {self.prefill_chunk}", key="prefill_chunk")
        if self.prefill_chunk is not None and self.image:
            raise ConfigError("a prompt with images is read at once; leave it out", key="prefill_chunk")


def run(arguments: Arguments) -> None:
    opened = open_model(model_folder(arguments.model))
    folder, config, tokenizer = opened.path, opened.config, opened.tokenizer
    if tokenizer is None and config.family != "jaxlab":
        raise UserError(f"{folder}: has no tokenizer; put its tokenizer.json there")
    if config.attention.kind == "nsa" and config.nsa.selector == "auxiliary":
        raise UserError(f"{folder}: NSA's auxiliary selector keeps no cache to generate from; use evaluate")
    ends = frozenset() if arguments.past_end else opened.end_tokens
    batch = read_prompt(arguments, opened)
    length = batch["tokens"].shape[1]
    budget = min(arguments.max_new_tokens, config.max_length - length)
    if not length or budget < 1:
        raise UserError(f"--prompt holds {length} tokens; the model takes 1 to {config.max_length - 1}")
    stop = encode(arguments.stop, tokenizer, special=False)
    if len(stop) > 1:
        raise UserError(f"--stop {arguments.stop!r} is {len(stop)} tokens; give one")

    params = opened.read()
    decode = _decoder(tokenizer, batch["tokens"][0].tolist())
    for token in stream(
        params,
        batch,
        config,
        max_new_tokens=budget,
        temperature=arguments.temperature,
        key=jax.random.key(arguments.seed),
        prefill_chunk=arguments.prefill_chunk,
    ):
        if int(token[0]) in ends:
            break
        sys.stdout.write(decode(int(token[0])))
        sys.stdout.flush()
        if stop and int(token[0]) == stop[0]:
            break
    sys.stdout.write("\n")


def read_prompt(arguments: Arguments, opened: OpenModel) -> Batch:
    """The batch of prompt and images: for models of other people, by the processor in their folder."""
    files, config, tokenizer = arguments.image, opened.config, opened.tokenizer
    if files and not config.has_vision:
        raise UserError(f"{arguments.model}: a language model without vision cannot read {files[0]}")
    if files and not isinstance(config.vision, PlainVisionConfig):
        if tokenizer is None:
            raise UserError(f"{opened.path}: no tokenizer; images are placed by its tokens")
        batch = opened.processor(arguments.prompt, files, tokenizer)
        try:
            return prepare_batch(batch, config)
        except ValueError as error:
            raise UserError(f"{opened.path}: its processor does not fit its model: {error}") from error
    tokens = encode(arguments.prompt, tokenizer)
    images: dict[str, np.ndarray] = {}
    if files:
        images["images"] = np.stack([read_image(file, config) for file in files])[None]
        missing = len(files) * config.vision_as(PlainVisionConfig).num_patches - tokens.count(
            config.image_token
        )
        tokens = [config.image_token] * missing + tokens
    return cast(Batch, {**images, "tokens": np.asarray([tokens], np.int32)})


def encode(text: str, tokenizer: Tokenizer | None, special: bool = True) -> list[int]:
    """Token ids of `text`: its bytes where the model has no tokenizer.

    `special`: with the tokens that the tokenizer puts around a text.
    """
    if tokenizer is None:
        return list(text.encode())
    ids: list[int] = tokenizer.encode(text, add_special_tokens=special).ids
    return ids


def _decoder(tokenizer: Tokenizer | None, prompt: Sequence[int] = ()) -> Callable[[int], str]:
    """A function from one token to the text that it adds; parts of a letter wait for the rest of it."""
    if tokenizer is None:
        incremental = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: incremental.decode(bytes([token])) if token < 256 else f"<{token}>"
    decoding = DecodeStream(ids=list(prompt), skip_special_tokens=True)

    def decode(token: int) -> str:
        if tokenizer.id_to_token(token) is None:  # a row of the embedding that only fills it up
            return f"<{token}>"
        return decoding.step(tokenizer, token) or ""

    return decode


def read_image(path: str, config: ModelConfig) -> np.ndarray:
    """float32 [height, width, channels] in [0, 1], resized to what the model takes."""
    vision = config.vision_as(PlainVisionConfig)
    if vision.channels not in (1, 3):
        raise UserError(f"the model takes {vision.channels} channels; image files have 1 or 3")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such image file")
    try:
        image = Image.open(path).convert("L" if vision.channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not an image that Pillow reads ({error})") from error
    pixels = np.asarray(image.resize((vision.image_size,) * 2, Image.Resampling.BOX), np.float32) / 255
    return pixels.reshape(vision.image_size, vision.image_size, vision.channels)
