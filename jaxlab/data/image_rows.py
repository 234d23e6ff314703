"""Conversations about images from JSON Lines: LLaVA's form and OpenAI's, the images inside one folder."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlab.errors import UserError
from jaxlab.processing import Conversation, as_conversation, read_json_lines

MARK = "<image>"
"""What stands for an image in texts of a data set, whatever the model has for it."""
_PLACES = ("path", "image", "url", "image_url")


class ImageRow(NamedTuple):
    """One conversation."""

    where: str
    """Where it stands, for messages to the user."""
    conversation: Conversation
    """The contents are lists of parts: {"type": "text", "text": ...} and {"type": "image"}."""
    images: tuple[Path, ...]
    """Of the parts that are images, in their order."""


def read_image_rows(path: Path, folder: Path) -> tuple[list[ImageRow], list[str]]:
    """The conversations of a file, and a line on each row that is none.

        {"image": "cat.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...]}
        {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": "<image> or <image>?"}, ...]}
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "cat.png"}, ...]}, ...]}

    Images that no text has a place for stand before the first message of the user.

    Args:
      folder: what the names of images are seen from, and what they never leave.

    Raises:
      UserError: the file cannot be read, or is no JSON Lines.
    """
    rows, bad = [], []
    for where, value in read_json_lines(path):
        try:
            rows.append(_row(value, where, folder.resolve()))
        except UserError as error:
            bad.append(str(error))
    return rows, bad


def _row(value: Any, where: str, folder: Path) -> ImageRow:
    if not isinstance(value, Mapping):
        raise UserError(f'{where}: not an object like {{"image": ..., "conversations": [...]}}')
    given = value.get("messages", value.get("conversations"))
    if given is None:
        raise UserError(f"{where}: has neither messages nor conversations")
    conversation = as_conversation(given, where, value.get("tools"))
    names = _names(value, where)
    messages, inside, marks = [], list[str](), 0
    for message in conversation.messages:
        parts = []
        for part in _parts(message.get("content"), where):
            if part["type"] == "image" and "name" in part:
                inside.append(part["name"])
            marks += part["type"] == "image"
            parts.append({"type": "image"} if part["type"] == "image" else part)
        messages.append({**message, "content": parts})
    if names and inside:
        raise UserError(f"{where}: names images beside its messages and in them; take one of the two")
    named = names or inside
    if not marks and named:
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
        content = [{"type": "image"}] * len(named) + list(messages[first]["content"])
        messages[first] = {**messages[first], "content": content}
        marks = len(named)
    if marks != len(named):
        raise UserError(f"{where}: has {marks} places for {len(named)} images; write {MARK} once for each")
    if not any(conversation.learnt):
        raise UserError(f"{where}: the assistant says nothing that is to be learnt")
    return ImageRow(
        where, conversation._replace(messages=messages), tuple(_inside(name, where, folder) for name in named)
    )


def _names(row: Mapping[str, Any], where: str) -> list[str]:
    given = row.get("images", row.get("image"))
    names = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: images is neither a file nor a list of files")
    return names


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    """A content as parts: the text around each <image>, without the line breaks next to it."""
    parts: list[dict[str, Any]] = []
    for part in [{"type": "text", "text": content or ""}] if isinstance(content, str | None) else content:
        if part["type"] in ("image", "image_url"):
            name = next((part[key] for key in _PLACES if part.get(key) is not None), None)
            name = name.get("url") if isinstance(name, Mapping) else name
            if name is not None and not isinstance(name, str):
                raise UserError(f'{where}: an image names no file; write {{"type": "image", "path": "..."}}')
            parts.append({"type": "image"} if name is None else {"type": "image", "name": name})
        elif part["type"] != "text":
            raise UserError(f"{where}: a part of type {part['type']!r}; texts and images are read")
        elif not isinstance(part.get("text"), str):
            raise UserError(f"{where}: a part of type text has no text")
        else:
            for number, text in enumerate(part["text"].split(MARK)):
                if number:
                    parts.append({"type": "image"})
                    text = text.removeprefix("\n")
                if text:
                    parts.append({"type": "text", "text": text})
    for before, after in itertools.pairwise(parts):
        if after["type"] == "image" and before["type"] == "text":
            before["text"] = before["text"].removesuffix("\n")
    return [part for part in parts if part.get("text") != ""]


def _inside(name: str, where: str, folder: Path) -> Path:
    """The file of an image, which lies in the folder, wherever links lead."""
    if "://" in name or name.startswith("data:"):
        raise UserError(f"{where}: images are files here; download {name[:60]} and give its path")
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder) or Path(name).is_absolute():
            raise UserError(f"{where}: {name[:200]} leads out of {folder}")
        there = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        raise UserError(f"{where}: {name[:200]}: no such image file in {folder}")
    return path
