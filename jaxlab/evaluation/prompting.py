"""Prompts on their way to a model: rendered by its chat template, tokenized and joined with their images by
its processor, and what ends an answer to them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from jaxlab.checkpoints import OpenModel, stop_strings
from jaxlab.errors import UserError
from jaxlab.models import Batch, ModelConfig, PlainVisionConfig, prepare_batch
from jaxlab.processing import (
    Message,
    Prompt,
    as_texts,
    check_token_ids,
    encode,
    render_chats,
)


def render_prompts(
    prompts: Sequence[Prompt],
    template: str,
    opened: OpenModel,
    *,
    system: str = "",
    chat_options: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """Prompts whose text is the conversation that they hold, or that they are a part of.

    Args:
      template: of the chat, in Jinja.
      system: what the model is told before.
      chat_options: what the template asks for besides.

    Raises:
      UserError: a conversation that ends with an answer or that the template refuses.
    """
    mark = image_mark(opened)
    conversations = [_conversation(prompt, system, mark) for prompt in prompts]
    lead = mark
    if any(prompt.images for prompt in prompts) and mark is not None and opened.tokenizer is not None:
        lead = opened.processor.lead(1, opened.tokenizer)
    show = lambda chats: render_chats(
        chats,
        template,
        special_tokens=opened.special_tokens,
        image_mark=lead,
        place=f"{opened.path}: its chat template",
        where=[prompt.where for prompt in prompts],
        each=[{**(chat_options or {}), **prompt.variables} for prompt in prompts],
    )
    texts = show(conversations)
    if mark is not None and any(t.count(mark) != len(p.images) for t, p in zip(texts, prompts, strict=True)):
        # A template that reads parts, and leaves images out.
        texts = show([as_texts(messages, lead or mark) for messages in conversations])
    return [replace(prompt, text=text) for prompt, text in zip(prompts, texts, strict=True)]


def _conversation(prompt: Prompt, system: str, mark: str | None) -> list[Message]:
    messages = list(prompt.messages)
    if not messages:
        content: str | list[dict[str, str]] = prompt.text
        if prompt.images and (mark is None or mark not in prompt.text):
            content = [{"type": "image"}] * len(prompt.images) + [{"type": "text", "text": prompt.text}]
        messages = [{"role": "user", "content": content}]
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{prompt.where}: ends with what the assistant said; leave that out, it is made here")
    if system and messages[0]["role"] == "system":
        raise UserError(f"{prompt.where}: begins with a system message; leave --system out")
    return [{"role": "system", "content": system}] * bool(system) + messages


def read_prompt(prompt: Prompt, opened: OpenModel, *, chat: bool) -> Batch:
    """The batch of prompt and images: for models of other people, by the processor in their folder.

    Args:
      chat: its text is a conversation, in which the template has put special tokens.

    Raises:
      UserError: images that the model cannot read, or that do not fit the prompt.
    """
    files, config, tokenizer = prompt.images, opened.config, opened.tokenizer
    if files and not config.has_vision:
        raise UserError(f"{opened.path}: a language model without vision cannot read {files[0]}")
    plain = isinstance(config.vision, PlainVisionConfig)
    # As transformers' tokenizers do; its processors look for the first token, since templates may lack it.
    first = opened.special_tokens.get("bos_token")
    special = not chat or (config.has_vision and not plain and not (first and prompt.text.startswith(first)))
    if files and not plain:
        return _with_images(prompt, opened, chat, special)
    tokens = encode(prompt.text, tokenizer, special=special, where=prompt.where)
    images: dict[str, np.ndarray] = {}
    if files:
        images["images"] = np.stack([read_plain_image(file, config) for file in files])[None]
        missing = len(files) * config.vision_as(PlainVisionConfig).num_patches - tokens.count(
            config.image_token
        )
        tokens = [config.image_token] * missing + tokens
    elif config.has_vision:
        mark = image_mark(opened)
        if config.image_token in tokens or (mark is not None and mark in prompt.text):
            raise UserError(
                f"{prompt.where} holds {mark or config.image_token}, where an image goes, and no image is "
                "given; name its file by --image, or leave that out"
            )
        _refuse_videos(prompt, opened)
    check_token_ids(tokens, config, tokenizer, where=prompt.where)
    return cast(Batch, {**images, "tokens": np.asarray([tokens], np.int32)})


def _with_images(prompt: Prompt, opened: OpenModel, chat: bool, special: bool) -> Batch:
    if opened.tokenizer is None:
        raise UserError(f"{opened.path}: no tokenizer; images are placed by its tokens")
    processor, count = opened.processor, len(prompt.images)
    if chat and (found := prompt.text.count(mark := processor.mark(opened.tokenizer))) != count:
        raise UserError(
            f"{prompt.where}: the chat holds {found} {mark} for {count} images; write one for each in its "
            "texts, or none"
        )
    batch = processor(prompt.text, prompt.images, opened.tokenizer, special_tokens=None if special else False)
    check_token_ids(batch["tokens"], opened.config, opened.tokenizer, where=prompt.where)
    try:
        prepare_batch(batch, opened.config)
    except ValueError as error:
        raise UserError(f"{opened.path}: its processor does not fit its model: {error}") from error
    return cast(Batch, batch)  # as it is: several are stacked before they are prepared


def find_ends(
    opened: OpenModel, *, chat: bool, stop: Sequence[str] = (), past_end: bool = False
) -> tuple[frozenset[int], list[str]]:
    """The tokens that end an answer, and the texts before which it ends.

    Args:
      chat: answers are turns of a chat.
      stop: further texts.
      past_end: go on where the model ends its text.

    Raises:
      UserError: a text that is not UTF-8.
    """
    tokenizer, ends, stops = opened.tokenizer, set[int](), list(stop)
    if not past_end:
        ends |= opened.end_tokens
        stops += stop_strings(opened.generation, f"{opened.path}: generation_config.json")
    if tokenizer is None:
        return frozenset(ends), stops
    if chat and not past_end:  # the end of a turn, where the model's files name that of a text only
        stops.append(opened.special_tokens.get("eos_token", ""))
    for text in stops:
        encode(text, None, where="--stop")  # checks that it is UTF-8
        token = tokenizer.token_to_id(text) if text else None
        if token is not None and token in tokenizer.get_added_tokens_decoder():
            ends.add(token)  # special tokens are not shown, so no text holds them
    return frozenset(ends), stops


def image_mark(opened: OpenModel) -> str | None:
    """What stands for an image in a prompt; None: the model reads none, or its folder does not say."""
    if opened.tokenizer is None or not opened.config.has_vision:
        return None
    if isinstance(opened.config.vision, PlainVisionConfig):
        return None
    try:
        return opened.processor.mark(opened.tokenizer)
    except UserError:  # of a folder without files of a processor; a prompt with images will say so
        word: str | None = opened.tokenizer.id_to_token(opened.config.image_token)
        return word


def _refuse_videos(prompt: Prompt, opened: OpenModel) -> None:
    """Refuses a prompt that asks for a video, of a model whose folder says what stands for one."""
    if opened.tokenizer is None or isinstance(opened.config.vision, PlainVisionConfig):
        return
    try:
        processor = opened.processor
    except UserError:  # a folder without files of a processor: it reads text alone
        return
    processor.refuse_videos(prompt.text, opened.tokenizer)


def read_plain_image(path: str, config: ModelConfig) -> np.ndarray:
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
