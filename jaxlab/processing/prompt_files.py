"""Prompts and conversations from files: lines of text, or JSON Lines."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlab.errors import UserError
from jaxlab.files import read_bounded
from jaxlab.processing.chat import Message, check_messages

MOST_BYTES = 1 << 30
_JSON = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: a text, or the messages of a conversation."""

    where: str
    """Where it stands, for messages to the user."""
    text: str = ""
    messages: tuple[Message, ...] = ()
    """Images in them are parts {"type": "image"}, in the order of `images`."""
    images: tuple[str, ...] = ()
    """Files."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What its template sees besides: tools, documents."""


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file: each line that is not empty; of JSON Lines a string, or {"prompt": text}.

    An object may name image files, as seen from the folder of the file: {"prompt": text, "images": [names]}.

    Raises:
      UserError: the file cannot be read, holds nothing, or something else.
    """
    path = Path(path)
    if path.suffix not in _JSON:
        lines = [(number, line) for number, line in enumerate(_read(path).split("\n"), 1) if line.strip()]
        found = [Prompt(f"{path} line {number}", line.removesuffix("\r")) for number, line in lines]
    else:
        found = [_prompt(value, where, path) for where, value in read_json_lines(path)]
    if not found:
        raise UserError(f"{path}: holds no prompt")
    return found


def read_messages(path: str | Path) -> list[Prompt]:
    """The conversations of a file of JSON Lines.

    Each line is one, as {"messages": [...]} with tools and documents beside it or as a list of messages; or
    each line is a message, {"role": ..., "content": ...}, and all together are one conversation. Images are
    parts of a content, {"type": "image", "path": name}, as seen from the folder of the file.

    Raises:
      UserError: the file cannot be read, holds nothing, or something else.
    """
    path = Path(path)
    values = read_json_lines(path)
    alone = [isinstance(value, dict) and "role" in value for _, value in values]
    if not values:
        raise UserError(f"{path}: holds no message")
    if any(alone) and not all(alone):
        raise UserError(
            f"{values[alone.index(False)][0]}: no message, as other lines are; a line is a message in all of "
            "them, or a conversation"
        )
    if all(alone):
        return [_conversation({"messages": [value for _, value in values]}, str(path), path)]
    return [_conversation(value, where, path) for where, value in values]


def _prompt(value: Any, where: str, path: Path) -> Prompt:
    given = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise UserError(f'{where}: neither a text nor {{"prompt": "..."}}')
    names = given.get("images") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: images is not a list of files")
    return Prompt(where, given["prompt"], images=tuple(_file(name, where, path) for name in names))


def _conversation(value: Any, where: str, path: Path) -> Prompt:
    given = {"messages": value} if isinstance(value, list) else value
    if not isinstance(given, dict) or "messages" not in given:
        raise UserError(f'{where}: neither a list of messages nor {{"messages": [...]}}')
    check_messages(given["messages"], where)
    images: list[str] = []
    messages = tuple(_message(message, images, where, path) for message in given["messages"])
    variables = {name: given[name] for name in ("tools", "documents") if given.get(name)}
    if not all(isinstance(v, list) and all(isinstance(x, dict) for x in v) for v in variables.values()):
        raise UserError(f"{where}: tools and documents are lists of objects")
    return Prompt(where, messages=messages, images=tuple(images), variables=variables)


def _message(message: Message, images: list[str], where: str, path: Path) -> Message:
    content = message.get("content")
    if not isinstance(content, Sequence) or isinstance(content, str):
        return message
    parts = []
    for part in content:
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise UserError(f"{where}: a part of type text has no text")
        if part["type"] in ("video", "video_url"):
            raise UserError(f"{where}: videos are not read; give frames of it as images")
        if part["type"] not in ("image", "image_url"):
            parts.append(part)
            continue
        name = next((part[key] for key in ("path", "image", "url", "image_url") if key in part), None)
        name = name.get("url") if isinstance(name, dict) else name
        if not isinstance(name, str):
            raise UserError(f'{where}: an image names no file; write {{"type": "image", "path": "..."}}')
        images.append(_file(name, where, path))
        parts.append({"type": "image"})
    return {**message, "content": parts}


def _file(name: str, where: str, path: Path) -> str:
    if "://" in name or name.startswith("data:"):
        raise UserError(f"{where}: images are files here; download {name[:60]} and give its path")
    return str(path.parent / name)


def read_json_lines(path: Path) -> list[tuple[str, Any]]:
    """(place, value) of each line of JSON; a file .json that is one list holds one in each entry.

    Raises:
      UserError: the file cannot be read, or a line is not JSON.
    """
    text = _read(path)
    if path.suffix == ".json":
        value = _parse(text, str(path))
        entries = value if isinstance(value, list) else [value]
        return [(f"{path} entry {number}", entry) for number, entry in enumerate(entries, 1)]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(f"{path} line {number}", _parse(line, f"{path} line {number}")) for number, line in lines]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: not JSON that anybody wrote: nested too deep") from None


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: too large for a file of prompts")
        return read_bounded(path, MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 (at its byte {error.start + 1})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
