"""Conversations as the text that a model was trained on, by the chat template of its folder."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlab.errors import UserError

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."}; the content may be a list of parts instead: {"type": "text", "text":
...} and {"type": "image", ...}. Templates may read further keys, such as tool_calls."""

_WORKER = Path(__file__).with_name("template_worker.py")
_WALL_SECONDS = 60
"""For a machine that is busy; the worker itself counts its computing."""


def render_chat(
    messages: Sequence[Message],
    template: str,
    *,
    special_tokens: Mapping[str, str] | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    image_mark: str | None = None,
    place: str = "chat template",
    **variables: Any,
) -> str:
    """One conversation as text: what transformers' `apply_chat_template(tokenize=False)` gives.

    It is encoded without the tokenizer's own special tokens, which are in the template. A content that the
    template does not take is put in the form that it takes: a text, or a list of parts.

    Args:
      template: in Jinja (`OpenModel.chat_template`).
      special_tokens: bos_token, eos_token and others by name (`OpenModel.special_tokens`).
      add_generation_prompt: end with what begins an answer.
      tools: JSON schemas of functions, for templates that know them.
      documents: texts to read from, for templates that know them.
      image_mark: what stands for an image where the template takes texts only.
      place: whose template it is, for the message.
      variables: what else the template asks for, like enable_thinking=False or date_string="26 Jul 2024".

    Raises:
      UserError: no message, or one that is none; a template that is damaged, refuses the conversation, or
        takes too much time or memory.
    """
    own = {
        "add_generation_prompt": add_generation_prompt,
        "tools": tools,
        "documents": documents,
        **variables,
    }
    return render_chats(
        [messages], template, special_tokens=special_tokens, image_mark=image_mark, place=place, **own
    )[0]


def render_chats(
    conversations: Sequence[Sequence[Message]],
    template: str,
    *,
    special_tokens: Mapping[str, str] | None = None,
    image_mark: str | None = None,
    place: str = "chat template",
    where: Sequence[str] = (),
    each: Sequence[Mapping[str, Any]] = (),
    **variables: Any,
) -> list[str]:
    """Several conversations, in one process of the template's; see `render_chat`.

    Args:
      where: what each conversation is, for messages.
      each: what the template sees for each alone, besides what it sees for all.

    Raises:
      UserError: as `render_chat` does.
    """
    where = where or ["the conversation"] * len(conversations)
    for messages, name in zip(conversations, where, strict=True):
        check_messages(messages, name)
    given = {"add_generation_prompt": True, "tools": None, "documents": None, **variables}
    request = {
        "template": template,
        "conversations": [
            {**own, "messages": list(messages)}
            for messages, own in zip(conversations, each or [{}] * len(conversations), strict=True)
        ],
        "mark": image_mark,
        "variables": {**(special_tokens or {}), **given},
    }
    found = _ask_worker(request, place)
    if "error" in found:
        name = f"{where[found['at']]}: " if len(where) > 1 else ""
        raise UserError(f"{name}{place}: {str(found['error'])[:400]}")
    return [str(text) for text in found["texts"]]


class Conversation(NamedTuple):
    """A conversation to learn from."""

    messages: Sequence[Message]
    learnt: Sequence[bool]
    """Of each message: whether it is the assistant's and is to be learnt."""
    tools: Sequence[Any] | None = None
    """JSON schemas of the functions that the assistant may call."""


class Turns(NamedTuple):
    """A conversation as text, and what in it the assistant says."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """The letters [first, end) of each of its turns that is learnt, with what ends the turn."""
    problem: str = ""
    """Why there is no text; nothing where there is one."""


def render_turns(
    conversations: Sequence[Conversation],
    template: str,
    *,
    special_tokens: Mapping[str, str] | None = None,
    last_only: bool = False,
    place: str = "chat template",
) -> list[Turns]:
    """Conversations as text, with what the assistant says in them; see `render_chat`.

    A template says it by `{% generation %}` blocks. Without them a turn begins where the text of the messages
    before it ends (with what begins an answer), and ends where the text up to and with it ends; a template
    that writes earlier turns in another way than the last one is followed where that can be told.

    Args:
      last_only: of each conversation the last turn that is learnt alone.

    Raises:
      UserError: the template is damaged, or takes too much time or memory. What is wrong with one
        conversation alone is told in its `Turns`.
    """
    request = {
        "turns": True,
        "template": template,
        "conversations": [one._asdict() for one in conversations],
        "variables": {"documents": None, **(special_tokens or {})},
        "last_only": last_only,
    }
    found = _ask_worker(request, place)
    if "error" in found:
        raise UserError(f"{place}: {str(found['error'])[:400]}")
    return [
        Turns("", (), f"{place}: {one['problem'][:400]}")
        if "problem" in one
        else Turns(one["text"], tuple((begin, end) for begin, end in one["turns"]))
        for one in found["texts"]
    ]


def _ask_worker(request: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What the process that renders templates answers.

    Raises:
      UserError: it takes too much time or memory, or cannot be started.
    """
    # What JSON cannot hold, like an image, a template only asks to be there.
    text = json.dumps(request, default=lambda value: f"<{type(value).__name__}>")
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_WORKER)],
            input=text,
            capture_output=True,
            text=True,
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{place}: does not end: it takes too much time") from None
    except OSError as error:
        raise UserError(f"{place}: no process to render it in: {error.strerror or error}") from error
    if done.returncode and (done.returncode < 0 or "MemoryError" in done.stderr):  # stopped by a limit
        raise UserError(f"{place}: does not end: it takes too much time or memory")
    if done.returncode:
        raise RuntimeError(f"the process that renders chat templates failed: {done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def as_texts(messages: Sequence[Message], mark: str) -> list[dict[str, Any]]:
    """Messages whose contents are texts: parts joined, `mark` where an image was."""
    flat = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = "".join(mark if p.get("type") == "image" else str(p.get("text", "")) for p in content)
        flat.append({**message, "content": content})
    return flat


_WEIGHTS = {"weight", "train"}
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's words for who speaks, where they differ."""


def as_conversation(value: Any, where: str, tools: Any = None) -> Conversation:
    """A conversation by its messages: OpenAI's role and content, or ShareGPT's from and value.

    A message of the assistant is learnt unless its `weight` is 0 (OpenAI) or its `train` is false (axolotl).

    Args:
      tools: what stands beside the messages: a list of JSON schemas, or JSON of one.

    Raises:
      UserError: it is none, or asks for what is not done: a weight between, another's turn to be learnt.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = [_with_role(message) for message in value]
    check_messages(value, where)
    messages, learnt = [], []
    for number, message in enumerate(value, 1):
        by_assistant = message["role"] == "assistant"
        asked = [
            _is_asked(message[key], f"{where}: message {number}: {key}") for key in _WEIGHTS & message.keys()
        ]
        if any(asked) and not by_assistant:
            raise UserError(
                f"{where}: message {number} is of {message['role']!r} and has a weight; only what the "
                "assistant says is learnt"
            )
        messages.append({key: held for key, held in message.items() if key not in _WEIGHTS})
        learnt.append(by_assistant and all(asked))
    return Conversation(messages, learnt, _read_tools(tools, where))


def _is_asked(weight: Any, where: str) -> bool:
    if weight not in (0, 1):  # True and False are among them
        raise UserError(
            f"{where} is {str(weight)[:60]!r}; a turn is learnt (1, true) or it is not (0, false)"
        )
    return bool(weight)


def _read_tools(tools: Any, where: str) -> list[Any] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: its tools are not JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(
            f'{where}: its tools are no list of functions like {{"name": "...", "parameters": ...}}'
        )
    return tools


def _with_role(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    if "from" in message and "role" not in message:
        role = message["from"]
        named = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        rest = {key: held for key, held in message.items() if key not in ("from", "value")}
        message = {**rest, "role": named, "content": message.get("value")}
    return {key: value for key, value in message.items() if value is not None}


def check_messages(messages: Any, where: str) -> None:
    """Whether these are messages of a conversation.

    Raises:
      UserError: they are not.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f'{where} holds no messages, like {{"role": "user", "content": "..."}}')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f'{where}: message {number} is not like {{"role": "user", "content": "..."}}')
        content = message.get("content")
        parts = content if isinstance(content, Sequence) and not isinstance(content, str) else []
        if content is not None and not isinstance(content, str | Sequence):
            raise UserError(f"{where}: the content of message {number} is neither a text nor a list of parts")
        for part in parts:
            if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                raise UserError(
                    f'{where}: a part of message {number} is not like {{"type": "text", "text": "..."}}'
                )
