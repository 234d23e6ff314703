"""Renders chat templates in a process of its own, which may take so much time and memory and no more.

Run as a file, it reads one JSON object from its standard input and writes one to its output. A template comes
from a folder that nobody vouches for: the sandbox keeps it from the interpreter, the limits keep it from
hanging. Only this module knows Jinja, with the settings that transformers gives it.
"""

import json
import secrets
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, BYTES, CHARACTERS = 5, 2 << 30, 1 << 24
"""Limits: of computing, of memory, and of the text that comes out."""
_PROBE = "Wn3qX"
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message holds what was thought before it; templates ask for the first, gpt-oss's for
the second."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the model said; it is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Callable[[], str]) -> str:
        begin, end = getattr(self.environment, "said_marks", ("", ""))
        return f"{begin}{caller()}{end}"


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    found.filters["tojson"] = _to_json
    found.globals["raise_exception"] = _raise
    found.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return found


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes of Jinja's own filter, which is for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def render(
    template: str, conversations: list[dict[str, Any]], mark: str | None, variables: dict[str, Any]
) -> Iterator[str]:
    """One conversation after the other as text.

    Args:
      conversations: each with what is its own: messages, tools, documents, ...
      mark: what stands for an image in texts of a template that knows no parts.
      variables: what the template sees besides: special tokens.

    Raises:
      Exception: whatever the template raises.
    """
    compiled = environment().from_string(template)
    takes = _Takes(compiled, variables)
    for own in conversations:
        messages = [_fit(message, mark, takes) for message in own["messages"]]
        yield compiled.render(**{**variables, **own, "messages": messages})


class _Takes:
    """Whether a template takes contents that are a text, or parts."""

    def __init__(self, compiled: jinja2.Template, variables: dict[str, Any]) -> None:
        self._compiled, self._variables = compiled, variables
        self._known: dict[str, bool] = {}

    def __call__(self, kind: str) -> bool:
        if kind not in self._known:
            content: Any = _PROBE if kind == "text" else [{"type": "text", "text": _PROBE}]
            given = {"tools": None, "documents": None, "add_generation_prompt": False, **self._variables}
            try:
                text = self._compiled.render(messages=[{"role": "user", "content": content}], **given)
            except Exception:  # it refuses such a conversation for its own reasons
                text = ""
            self._known[kind] = _PROBE in text and "'type'" not in text and '"type"' not in text
        return self._known[kind]


def render_turns(
    template: str,
    conversations: list[dict[str, Any]],
    variables: dict[str, Any],
    last_only: bool,
) -> Iterator[dict[str, Any]]:
    """Conversations as texts, with where in each the assistant's turns stand.

    A turn begins after what the template puts there for the assistant to go on from, and ends with all that
    it puts after the content. Where the template marks what the model said (`{% generation %}`), it is that.

    Args:
      conversations: each with its messages, which of them are learnt (`learnt`; without it all), and tools.

    Yields:
      {"text": ..., "turns": [[begin, end], ...]}, or {"problem": why there is none}.
    """
    shape = environment()
    plain = shape.from_string(template)
    marked = environment()
    begin, end = (f"\ue000{secrets.token_hex(8)}\ue001" for _ in range(2))
    setattr(marked, "said_marks", (begin, end))  # noqa: B010 (an attribute of ours)
    takes = _Takes(plain, variables)
    says = any(name.value == "generation" for name in shape.lexer.tokenize(template) if name.type == "name")
    reads_tools = "tools" in jinja2.meta.find_undeclared_variables(shape.parse(template))
    for own in conversations:
        fitted = [_fit(message, None, takes) for message in own["messages"]]
        learnt = own.get("learnt") or [True] * len(fitted)
        said = [number for number, message in enumerate(fitted) if message.get("role") == "assistant"]
        given = {**variables, "tools": own.get("tools")}
        try:
            if given["tools"] and not reads_tools:
                raise jinja2.TemplateError("it knows no tools, and the conversation has some")
            text = plain.render(**{**given, "messages": fitted, "add_generation_prompt": False})
            if len(text) > CHARACTERS:
                raise jinja2.TemplateError(f"it makes a text of {len(text):,} characters")
            if says:
                found = marked.from_string(template).render(
                    **{**given, "messages": fitted, "add_generation_prompt": False}
                )
                turns = _marked_turns(found, begin, end)
                if found.replace(begin, "").replace(end, "") != text:
                    raise jinja2.TemplateError("what it marks as generation changes the text")
                if not all(learnt[number] for number in said):
                    if len(turns) != len(said):
                        raise jinja2.TemplateError(
                            f"it marks {len(turns)} turns of {len(said)}: which of them are not to be learnt "
                            "cannot be told"
                        )
                    turns = [turn for turn, number in zip(turns, said, strict=True) if learnt[number]]
            else:
                if said and said[0] == 0:
                    raise jinja2.TemplateError("the conversation begins with the assistant")
                said = [number for number in said if learnt[number]]
                turns = _turns_by_prefix(plain, fitted, text, given, said[-1:] if last_only else said)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            yield {"problem": str(getattr(error, "message", None) or error) or type(error).__name__}
        else:
            yield {"text": text, "turns": turns[-1:] if last_only else turns}


def _marked_turns(text: str, begin: str, end: str) -> list[list[int]]:
    before, *pieces = text.split(begin)
    turns = []
    at = len(before)  # in the text without marks
    for piece in pieces:
        said, found, rest = piece.partition(end)
        if not found:
            raise jinja2.TemplateError("generation inside generation")
        turns.append([at, at + len(said)])
        at += len(said) + len(rest)
    return turns


def _turns_by_prefix(
    compiled: jinja2.Template,
    messages: list[dict[str, Any]],
    text: str,
    variables: dict[str, Any],
    said: list[int],
) -> list[list[int]]:
    """The turns of the messages `said`, by what the template makes of the conversation up to each one, which
    its text must begin with."""

    def of(count: int, prompt: bool) -> str:
        return compiled.render(**{**variables, "messages": messages[:count], "add_generation_prompt": prompt})

    turns: list[list[int]] = []
    closing = None
    for number in reversed(said):
        begin = _beginning(of, number, messages[number], text)
        whole = text if number == len(messages) - 1 else of(number + 1, False)
        content = str(messages[number].get("content") or "").strip()
        if text.startswith(whole) and len(whole) >= begin:
            turns.append([begin, len(whole)])
        elif closing is not None and (size := _shared(content, closing, text[begin:])):
            # What it leaves out of earlier turns, such as thoughts, is not in this one.
            turns.append([begin, begin + size])
        else:
            raise jinja2.TemplateError(_UNTOLD)
        if closing is None:
            last = whole[begin:]
            at = last.rfind(content) if content else -1
            closing = last[at + len(content) :] if at >= 0 else None
    return turns[::-1]


def _beginning(of: Callable[[int, bool], str], number: int, message: dict[str, Any], text: str) -> int:
    """Where the turn of a message begins."""
    asked = of(number, True)
    if text.startswith(asked):
        return len(asked)
    # An answer may be begun in another way than it is written down, as by an opening of thoughts.
    before = of(number, False)
    content = str(message.get("content") or "").strip()
    at = text.find(content, len(before)) if content and text.startswith(before) else -1
    head = text[len(before) : at]
    if at >= 0 and (not head.strip() or asked.startswith(before + head)):
        return at
    raise jinja2.TemplateError(_UNTOLD)


def _shared(content: str, closing: str, text: str) -> int:
    """The length of an earlier turn that `text` begins with: its content, and as much of what closes the last
    turn as stands here too; 0 if it cannot be told."""
    if not text.startswith(content):
        return 0
    here = text[len(content) :]
    if here.startswith(closing):
        return len(content + closing)
    same = next((i for i, (a, b) in enumerate(zip(here, closing, strict=False)) if a != b), 0)
    cut = here[:same].rfind("\n") + 1  # what follows may begin with the same letter
    return len(content) + cut if here[:cut].strip() else 0


_UNTOLD = (
    "where the assistant's turns begin and end cannot be told, as the template writes a conversation "
    "otherwise once it goes on; mark them by {% generation %}, or learn the last turn only"
)


def _fit(message: dict[str, Any], mark: str | None, takes: Callable[[str], bool]) -> dict[str, Any]:
    """A message without what is None, its content in the form that the template takes: a text, or parts."""
    message = {key: value for key, value in message.items() if value is not None}
    thought = next((message[name] for name in _REASONING if name in message), None)
    if thought is not None:
        message = {"thinking": thought, **message, "reasoning_content": thought}
    content = message.get("content")
    if isinstance(content, str) and not takes("text") and takes("parts"):
        message["content"] = [{"type": "text", "text": content}]
    elif isinstance(content, list) and not takes("parts") and takes("text"):
        message["content"] = "".join(_text_of(part, mark) for part in content)
    return message


def _text_of(part: Any, mark: str | None) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        return str(part.get("text", ""))
    if isinstance(part, dict) and part.get("type") == "image" and mark is not None:
        return mark
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise jinja2.TemplateError(f"the template takes texts only, a message holds a part of type {kind!r}")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What is written for a request: the texts, or what went wrong at which conversation.

    With `turns` in it, the texts are those of `render_turns`.
    """
    texts: list[Any] = []
    try:
        if request.pop("turns", False):
            texts.extend(render_turns(**request))
            return {"texts": texts}
        for text in render(**request):
            if len(text) > CHARACTERS:
                raise jinja2.TemplateError(f"it makes a text of {len(text):,} characters")
            texts.append(text)
    except jinja2.TemplateSyntaxError as error:
        wrong = f"line {error.lineno}: {error.message}"
    except jinja2.TemplateError as error:
        wrong = str(error.message or type(error).__name__)
    except RecursionError:
        wrong = "it calls itself without end"
    except MemoryError:
        wrong = f"it takes more than {BYTES >> 30} GiB"
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    else:
        return {"texts": texts}
    return {"error": wrong, "at": len(texts)}


def main() -> None:
    try:
        import resource
    except ImportError:  # not on Windows: there the caller's clock alone limits
        pass
    else:
        for kind, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, BYTES)):
            _, hard = resource.getrlimit(kind)
            limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (limit, hard))
    json.dump(answer(json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()
