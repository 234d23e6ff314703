"""Instructions whose obeying can be checked, in the manner of IFEval (arXiv 2311.07911): a rule is a kind
with values, as data.

    {"kind": "words", "most": 30}     {"kind": "keywords", "all": ["sun", "rain"]}     {"kind": "json"}
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from jaxlab.errors import UserError

Rule = Mapping[str, Any]


def obeys(text: str, rule: Rule) -> bool:
    """Whether an answer obeys a rule that `check_rule` has passed."""
    check, _ = KINDS[rule["kind"]]
    return bool(check(text.strip(), {name: value for name, value in rule.items() if name != "kind"}))


def check_rule(rule: Any, where: str) -> None:
    """Whether this is a rule.

    Raises:
      UserError: it is none, with what there is.
    """
    if not isinstance(rule, Mapping) or rule.get("kind") not in KINDS:
        kind = rule.get("kind") if isinstance(rule, Mapping) else rule
        raise UserError(f"{where}: no such rule, {kind!r}; there are {', '.join(KINDS)}")
    _, known = KINDS[rule["kind"]]
    for name, value in rule.items():
        if name == "kind":
            continue
        if name not in known:
            listed = ", ".join(known) or "nothing"
            raise UserError(f"{where}: the rule {rule['kind']} has no {name!r}; it takes {listed}")
        if not known[name](value):
            raise UserError(f"{where}: {name!r} of the rule {rule['kind']} cannot be {value!r}")
    needed = [name for name in known if name not in ("least", "most")]
    if missing := [name for name in needed if name not in rule]:
        raise UserError(f"{where}: the rule {rule['kind']} needs {missing[0]!r}")
    if known and not needed and len(rule) == 1:
        raise UserError(f"{where}: the rule {rule['kind']} needs least or most")


def _within(count: int, of: Mapping[str, Any]) -> bool:
    least, most = of.get("least", 0), of.get("most", count)
    return bool(least <= count <= most)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’\-]\w+)*", text)


def _is_json(text: str, of: Mapping[str, Any]) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, flags=re.DOTALL | re.IGNORECASE)
    try:
        json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def _has(text: str, word: str) -> bool:
    """As a whole word, whatever its case."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags=re.IGNORECASE) is not None


def _letters_of(text: str, script: str) -> bool:
    """Whether nine letters of ten are of a script, by their names in Unicode."""
    letters = [c for c in text if c.isalpha()]
    own = [c for c in letters if unicodedata.name(c, "").startswith(_SCRIPTS[script])]
    return bool(letters) and len(own) >= 0.9 * len(letters)


_SCRIPTS: dict[str, tuple[str, ...]] = {
    "latin": ("LATIN",),
    "cyrillic": ("CYRILLIC",),
    "greek": ("GREEK",),
    "arabic": ("ARABIC",),
    "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",),
    "bengali": ("BENGALI",),
    "tamil": ("TAMIL",),
    "thai": ("THAI",),
    "han": ("CJK",),
    "japanese": ("HIRAGANA", "KATAKANA", "CJK"),
    "hangul": ("HANGUL",),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_text, value))


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return True


_COUNT: dict[str, Callable[[Any], bool]] = {"least": _is_number, "most": _is_number}

KINDS: dict[str, tuple[Callable[[str, Mapping[str, Any]], bool], dict[str, Callable[[Any], bool]]]] = {
    "json": (_is_json, {}),
    "words": (lambda text, of: _within(len(_words(text)), of), _COUNT),
    "characters": (lambda text, of: _within(len(text), of), _COUNT),
    "sentences": (lambda text, of: _within(len(re.findall(r"[^.!?。！？]+[.!?。！？]*", text)), of), _COUNT),
    "paragraphs": (lambda text, of: _within(len(re.findall(r"\S(?:.|\n(?!\s*\n))*", text)), of), _COUNT),
    "bullets": (
        lambda text, of: _within(len(re.findall(r"^\s*[*\-•]\s+\S", text, re.MULTILINE)), of),
        _COUNT,
    ),
    "keywords": (lambda text, of: all(_has(text, word) for word in of["all"]), {"all": _are_texts}),
    "forbidden": (lambda text, of: not any(_has(text, word) for word in of["words"]), {"words": _are_texts}),
    "times": (
        lambda text, of: _within(len(re.findall(rf"(?<!\w){re.escape(of['word'])}(?!\w)", text, re.I)), of),
        {"word": _is_text, **_COUNT},
    ),
    "upper": (lambda text, of: text == text.upper() and any(map(str.isalpha, text)), {}),
    "lower": (lambda text, of: text == text.lower() and any(map(str.isalpha, text)), {}),
    "starts": (lambda text, of: text.startswith(of["text"]), {"text": _is_text}),
    "ends": (lambda text, of: text.endswith(of["text"]), {"text": _is_text}),
    "no_commas": (lambda text, of: not set(text) & set(",，、،"), {}),
    "quoted": (lambda text, of: len(text) > 1 and text[0] == text[-1] == '"', {}),
    "title": (lambda text, of: re.search(r"<<[^\n<>]+>>", text) is not None, {}),
    "placeholders": (lambda text, of: _within(len(re.findall(r"\[[^\[\]\n]+\]", text)), of), _COUNT),
    "matches": (lambda text, of: re.search(of["pattern"], text) is not None, {"pattern": _is_pattern}),
    "script": (lambda text, of: _letters_of(text, of["name"]), {"name": _SCRIPTS.__contains__}),
}
"""By kind: the check, and the values that it takes with what each may be."""
