"""What two tokenizers, and the chat templates beside them, do not have in common."""

from dataclasses import dataclass, field

from tokenizers import Tokenizer

from jaxlab.checkpoints import OpenModel
from jaxlab.errors import UserError

PROBES = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?",
    "def f(x):\n    return x ** 2  # 3.14159 * 1024\n",
    "  Leading spaces,\ttabs\n\nand UPPER case words.",
    "Où est la bibliothèque ? Größe, naïve, señor.",
    "数学は楽しいです。 Привет, мир! مرحبا",
    "1234567890 + 98765 = 1234666655 \u2248 1.2e9",
)
"""Texts that are cut by both."""
_SHOWN = 8
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class TokenDifferences:
    """Of two models. Where one has no tokenizer only `problem` and the templates are told."""

    first: str
    other: str
    problem: str = ""
    """Why tokens could not be compared; "": they were."""
    sizes: tuple[int, int] = (0, 0)
    shared: int = 0
    """Tokens that both have."""
    moved: tuple[tuple[str, int, int], ...] = ()
    """Of these, those with another id: token, id in the first, in the other."""
    reused: tuple[tuple[int, str, str], ...] = ()
    """Ids that stand for two tokens: id, token in the first, in the other."""
    only_first: tuple[str, ...] = ()
    only_other: tuple[str, ...] = ()
    special: tuple[tuple[str, str, str], ...] = ()
    """Special tokens that differ: name, what the first has, what the other."""
    cut: tuple[str, ...] = ()
    """Texts of PROBES that they cut into other tokens."""
    templates: str = ""
    """same, other, first, second or none: which of the two has a chat template."""
    ends: tuple[tuple[int, ...], tuple[int, ...]] = field(default=((), ()))
    """The ids that end a text."""

    @property
    def agreement(self) -> float:
        """Tokens of one id, as a share of the smaller vocabulary."""
        return (self.shared - len(self.moved)) / max(1, min(self.sizes))


def compare_tokens(first: str, one: OpenModel, other: str, two: OpenModel) -> TokenDifferences:
    """Compares ids, special tokens, how texts are cut, and chat templates."""
    templates = _templates(one, two)
    tables, problem = [], ""
    for name, model in ((first, one), (other, two)):
        try:
            tokenizer = model.tokenizer
        except UserError as error:
            tokenizer, problem = None, str(error)
        if tokenizer is None:
            problem = problem or f"{name} has no tokenizer"
            break
        tables.append(tokenizer)
    if len(tables) < 2:
        return TokenDifferences(first, other, problem, templates=templates)
    mine, theirs = (t.get_vocab(with_added_tokens=True) for t in tables)
    both = mine.keys() & theirs.keys()
    moved = sorted((mine[t], t, theirs[t]) for t in both if mine[t] != theirs[t])
    names = {index: token for token, index in theirs.items()}
    reused = sorted((i, t, names[i]) for t, i in mine.items() if names.get(i, t) != t)
    return TokenDifferences(
        first,
        other,
        sizes=(len(mine), len(theirs)),
        shared=len(both),
        moved=tuple((token, i, j) for i, token, j in moved),
        reused=tuple(reused),
        only_first=tuple(sorted(mine.keys() - both, key=mine.__getitem__)),
        only_other=tuple(sorted(theirs.keys() - both, key=theirs.__getitem__)),
        special=_special(one, two),
        cut=_cut(*tables),
        templates=templates,
        ends=(tuple(sorted(one.end_tokens)), tuple(sorted(two.end_tokens))),
    )


def _templates(one: OpenModel, two: OpenModel) -> str:
    mine, theirs = ((m.chat_template or "").strip() for m in (one, two))
    if mine and theirs:
        return "same" if mine == theirs else "other"
    return "first" if mine else "second" if theirs else "none"


def _special(one: OpenModel, two: OpenModel) -> tuple[tuple[str, str, str], ...]:
    """Special tokens by name that both models have and that are not the same."""
    mine, theirs = one.special_tokens, two.special_tokens
    return tuple(
        (name, mine[name], theirs[name])
        for name in SPECIAL
        if name in mine and name in theirs and mine[name] != theirs[name]
    )


def _cut(one: Tokenizer, two: Tokenizer) -> tuple[str, ...]:
    tokens = lambda tokenizer, text: tokenizer.encode(text, add_special_tokens=False).tokens
    return tuple(text for text in PROBES if tokens(one, text) != tokens(two, text))


def listed(tokens: tuple[str, ...] | list[str]) -> str:
    """The first of them, for people."""
    more = f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else ""
    return ", ".join(repr(token) for token in tokens[:_SHOWN]) + more
