"""Renders chat templates in a process of its own, which may take so much time and memory and no more.

Run as a file, it reads one JSON object from its standard input and writes one to its output. A template comes
from a folder that nobody vouches for: the sandbox keeps it from the interpreter, the limits keep it from
hanging. Only this module knows Jinja, with the settings that transformers gives it.
"""

import json
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
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
        return caller()


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
    known: dict[str, bool] = {}

    def takes(kind: str) -> bool:
        if kind not in known:
            content: Any = _PROBE if kind == "text" else [{"type": "text", "text": _PROBE}]
            try:
                text = compiled.render(
                    messages=[{"role": "user", "content": content}],
                    **{"tools": None, "documents": None, "add_generation_prompt": False, **variables},
                )
            except Exception:  # it refuses such a conversation for its own reasons
                text = ""
            known[kind] = _PROBE in text and "'type'" not in text and '"type"' not in text
        return known[kind]

    for own in conversations:
        messages = [_fit(message, mark, takes) for message in own["messages"]]
        yield compiled.render(**{**variables, **own, "messages": messages})


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
    """What is written for a request: the texts, or what went wrong at which conversation."""
    texts: list[str] = []
    try:
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
