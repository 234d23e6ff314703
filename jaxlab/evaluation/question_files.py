"""Questions from a file of JSON Lines: what is asked, with which images, and what is right."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxlab.errors import UserError
from jaxlab.evaluation.rules import Rule, check_rule
from jaxlab.processing import Prompt, read_json_lines

Measure = Literal["exact_match", "multiple_choice", "perplexity", "token_f1", "rules"]


@dataclass(frozen=True)
class Question:
    """One line of a file."""

    prompt: Prompt
    answers: tuple[str, ...] = ()
    """Those that are right; of perplexity the text that is measured."""
    choices: tuple[str, ...] = ()
    right: int = -1
    """The index of the right choice."""
    rules: tuple[Rule, ...] = ()

    @property
    def asked(self) -> str:
        """What is asked, for people to read."""
        messages = self.prompt.messages
        return self.prompt.text or " ".join(str(message.get("content")) for message in messages)

    @property
    def expected(self) -> str:
        """What is right, for people to read."""
        if self.rules:
            return "; ".join(
                ", ".join(f"{name} {value}" for name, value in rule.items()) for rule in self.rules
            )
        return self.choices[self.right] if self.choices else " | ".join(self.answers)

    @property
    def where(self) -> str:
        """Where it stands, for messages."""
        return self.prompt.where


def read_questions(path: str | Path, measure: Measure) -> list[Question]:
    """The questions of a file: each line an object.

        {"prompt": "What is this?", "image": "cat.png", "answer": "a cat"}
        {"prompt": "Is this a cat?", "choices": ["yes", "no"], "answer": "yes"}
        {"prompt": "Tell me of the sun in capitals.", "rules": [{"kind": "upper"}]}
        {"text": "Some text whose perplexity is measured."}

    `images` is a list of files instead of one `image`, as seen from the folder of the file; `messages` are a
    conversation instead of the prompt; `answer` may be a list of texts that are all right, and of choices an
    index. Other keys are left to their readers.

    Raises:
      UserError: the file cannot be read, holds nothing, or lines that the measure cannot use.
    """
    path = Path(path)
    found = [_question(value, where, path, measure) for where, value in read_json_lines(path)]
    if not found:
        raise UserError(f"{path}: holds no question")
    return found


def _question(value: Any, where: str, path: Path, measure: Measure) -> Question:
    if not isinstance(value, Mapping):
        raise UserError(f'{where}: not an object like {{"prompt": ..., "answer": ...}}')
    prompt = _prompt(value, where, path, measure)
    answers = _texts(value.get("answer", value.get("text")), where, "answer")
    if measure == "multiple_choice":
        choices = _texts(value.get("choices"), where, "choices")
        if len(choices) < 2:
            raise UserError(f"{where}: multiple_choice needs choices, at least two")
        return Question(prompt, choices=choices, right=_right(value.get("answer"), choices, where))
    if measure == "rules":
        rules = value.get("rules")
        if not isinstance(rules, list) or not rules:
            raise UserError(f'{where}: needs rules, a list like [{{"kind": "json"}}]')
        for rule in rules:
            check_rule(rule, where)
        return Question(prompt, rules=tuple(rules))
    if not answers or not all(answers):
        raise UserError(f"{where}: needs an answer, a text that is not empty")
    if measure == "perplexity" and len(answers) > 1:
        raise UserError(f"{where}: perplexity is of one text, not of {len(answers)}")
    return Question(prompt, answers=answers)


def _prompt(value: Mapping[str, Any], where: str, path: Path, measure: Measure) -> Prompt:
    names = value.get("images", value.get("image"))
    images = tuple(str(path.parent / name) for name in _texts(names, where, "images"))
    for name in images:
        if not Path(name).is_file():
            raise UserError(f"{where}: {name}: no such image file")
    if "messages" in value:
        return Prompt(where, messages=tuple(value["messages"]), images=images)
    text = value.get("prompt", "" if measure == "perplexity" else None)
    if not isinstance(text, str) or not (text or images or measure == "perplexity"):
        raise UserError(f"{where}: needs a prompt, a text")
    return Prompt(where, text, images=images)


def _texts(value: Any, where: str, name: str) -> tuple[str, ...]:
    if value is None or isinstance(value, int):
        return ()
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: {name} is neither a text nor a list of texts")
    return tuple(texts)


def _right(answer: Any, choices: tuple[str, ...], where: str) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    raise UserError(f"{where}: answer is the index of a choice, from 0, or its text; it is {answer!r}")
