"""Which token plays which role in a few-shot prompt, and the classes and edge sets that follow from it."""

import enum
from dataclasses import dataclass
from typing import Literal

import numpy as np

LabelWordClasses = Literal["together", "each", "per_demonstration"]


class Part(enum.IntEnum):
    """What a token of a prompt is part of."""

    PADDING = -1
    TEXT = 0
    """The texts of the demonstrations and of the query."""
    LABEL = 1
    """A token of a label word that carries it, by `label_position`."""
    LAST = 2
    """The last token (q), where the answer is read off."""
    FORMAT = 3
    """What the template puts around text and label word; so are further tokens of a label word."""
    FORERUNNER = 4
    """The token right before a label word of a demonstration."""


@dataclass(frozen=True)
class Roles:
    """What the token classes mean. Static; the edge sets of the paper follow from it."""

    labels: tuple[int, ...] = (Part.LABEL.value,)
    """Label words of the demonstrations (p_1 ... p_C); one class for all of them, or one each. None: the
    classes are kinds of tokens, as of a VLM, and their pairs are the edge sets."""
    query: int = Part.LAST.value
    """The last position of the prompt (q)."""
    sink: int | None = None
    """The first token, if its edges are to be in no set but its own: it gathers attention that goes
    nowhere."""
    classes: int = 3
    """Token classes in all (K)."""
    first: int | None = None
    """The first token, where it has a class; S_ww is told with and without it."""
    forerunner: int | None = None
    """Tokens right before label words, where they have a class."""
    texts: tuple[int, ...] = ()
    """The words of each demonstration beside its label word, where each has its class."""
    names: tuple[str, ...] = ()
    """What each class is called."""

    @property
    def shared(self) -> tuple[str, ...]:
        """The edge sets whose means are set against each other, as shares."""
        return ("wp", "pq", "ww") if self.labels else tuple(self.edge_sets())

    def edge_sets(self) -> dict[str, np.ndarray]:
        """bool[K, K] by name, [class of i, class of j] of the edges j -> i (section 2.1 of the paper).

        wp: from any word before it to a label word. pq: from a label word to q. ww: all other edges. sink:
        edges from and to the sink, if there is one; they are in none of the three, and ww_with_first says
        what S_ww would be with them. Where the first token has a class and is no sink, ww_without_first
        leaves it out. wf and fq: from any word to a forerunner, from a forerunner to q; they are in ww too.

        Without label words: every pair of classes, named like image_to_answer.
        """
        row, column = np.indices((self.classes, self.classes))
        if not self.labels:
            names = self.names or tuple(map(str, range(self.classes)))
            pairs = [(i, j) for i in range(self.classes) for j in range(self.classes)]
            return {f"{names[j]}_to_{names[i]}": (row == i) & (column == j) for i, j in pairs}
        label = [np.isin(side, self.labels) for side in (row, column)]
        sets = {"wp": label[0], "pq": (row == self.query) & label[1]}
        sets["ww"] = ~sets["wp"] & ~sets["pq"]
        if self.forerunner is not None:
            sets["wf"] = row == self.forerunner
            sets["fq"] = (row == self.query) & (column == self.forerunner)
        if self.sink is not None:
            sink = (row == self.sink) | (column == self.sink)
            everything = sets["ww"]
            sets = {name: edges & ~sink for name, edges in sets.items()} | {"sink": sink}
            if self.first is not None:
                sets["ww_with_first"] = everything
        elif self.first is not None:
            sets["ww_without_first"] = sets["ww"] & (row != self.first) & (column != self.first)
        return sets


@dataclass(frozen=True)
class TokenClasses:
    """Which tokens have a class of their own."""

    label_words: LabelWordClasses = "together"
    """Label words: one class for all, one for each label, or one for each demonstration, whose other words
    then have one too."""
    sink: bool = False
    """Whether the edges of the first token are left out of S_wp, S_pq and S_ww."""
    forerunners: bool = False
    """Whether the tokens right before label words have a class."""

    def roles(self, labels: tuple[str, ...], demonstrations: int) -> Roles:
        """The roles in prompts of so many demonstrations with these label words."""
        match self.label_words:
            case "together":
                words = ["label words"]
            case "each":
                words = [f"label {name}" for name in labels]
            case "per_demonstration":
                words = [f"label of demonstration {n}" for n in range(1, demonstrations + 1)]
        names = ["text", *words, "last", "first"]
        last = len(words) + 1
        forerunner = None
        if self.forerunners:
            forerunner = len(names)
            names.append("forerunners")
        texts: tuple[int, ...] = ()
        if self.label_words == "per_demonstration":
            texts = tuple(range(len(names), len(names) + demonstrations))
            names += [f"text of demonstration {n}" for n in range(1, demonstrations + 1)]
        return Roles(
            labels=tuple(range(1, last)),
            query=last,
            sink=last + 1 if self.sink else None,
            classes=len(names),
            first=last + 1,
            forerunner=forerunner,
            texts=texts,
            names=tuple(names),
        )

    def assign(
        self, roles: Roles, parts: np.ndarray, label_words: np.ndarray, demonstrations: np.ndarray
    ) -> np.ndarray:
        """Token classes int32[B, T] from what the tokens are, each int32[B, T]; -1 in padding.

        Args:
          parts: a `Part` each.
          label_words: which label a token of Part.LABEL is of.
          demonstrations: which demonstration a token is of; as many as there are for the query's.
        """
        classes = np.zeros_like(parts)
        if roles.texts:
            inside = (demonstrations >= 0) & (demonstrations < len(roles.texts))
            classes = np.where(inside, roles.texts[0] + demonstrations, classes)
        if roles.forerunner is not None:
            classes = np.where(parts == Part.FORERUNNER, roles.forerunner, classes)
        which = {"together": np.zeros_like(parts), "each": label_words, "per_demonstration": demonstrations}
        classes = np.where(parts == Part.LABEL, 1 + which[self.label_words], classes)
        if roles.first is not None:
            classes[:, 0] = roles.first
        classes = np.where(parts == Part.LAST, roles.query, classes)
        return np.where(parts == Part.PADDING, -1, classes).astype(np.int32)
