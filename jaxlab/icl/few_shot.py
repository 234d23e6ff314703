"""Few-shot prompts of a text task in the tokens of a model, and which token is what, by where it stands.

Source: Wang et al. 2023 (arXiv 2305.14160), sections 2.1 and 5 (setting). Positions of label words follow
from the letters that each token stands for, never from looking for tokens.
"""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from jaxlab.checkpoints import OpenModel
from jaxlab.errors import UserError
from jaxlab.icl.prompts import Prompts, bucket, in_batches
from jaxlab.icl.roles import Part, TokenClasses
from jaxlab.icl.text_tasks import PLACEHOLDER, ClassificationConfig, Example, Split, read_examples
from jaxlab.processing import Encoded, check_token_ids, encode_with_spans, render_chat

Mode = Literal["paper", "released_code"]
LabelPosition = Literal["first", "last", "mean"]


class Piece(NamedTuple):
    """A part of a prompt's text."""

    text: str
    part: Part
    demonstration: int
    label: int = -1


class Annotated(NamedTuple):
    """The tokens of one prompt, and of each what it is: int32[T]."""

    tokens: np.ndarray
    parts: np.ndarray
    label_words: np.ndarray
    demonstrations: np.ndarray


class FewShotPrompts:
    """Prompts of demonstrations and a query; demonstrations and their order are drawn by the seed.

    Mode `paper`: a seed has one set of demonstrations, in one order, for all queries. `released_code`: they
    are drawn anew for each query, with replacement, in an order of the classes that a seed has.

    Split `validation`: a seed asks one half of each class of `train`, and draws demonstrations and lessons
    from the other. So queries are the same for any number of shots, and never shown or learned from.
    """

    def __init__(
        self,
        config: ClassificationConfig,
        opened: OpenModel,
        *,
        split: Split = "test",
        mode: Mode = "paper",
        classes: TokenClasses | None = None,
        label_position: LabelPosition = "first",
    ) -> None:
        """
        Raises:
          UserError: the files are not as the config says, or the model has no tokenizer or one that is not
            its own, or two label words begin with the same token.
        """
        self.config, self.split, self.mode = config, split, mode
        self.label_position, self.classes = label_position, classes or TokenClasses()
        self.tokenizer = _own_tokenizer(opened)
        self.model = opened.config
        self.length = self.limit = min(config.max_tokens or self.model.max_length, self.model.max_length)
        self.label_names = config.label_words
        self.examples = read_examples(config, split)
        self._check_placeholders()
        self._chat = _Chat(config.system, opened) if config.chat else None
        self._lead, self._tail = _label_affixes(config.template)
        self._facts = {"dropped_demonstrations": 0, "shortened_texts": 0}
        self._made: dict[tuple[int, int, int], list[Prompts]] = {}
        self._check_shots(config.shots)
        if not self.count(1):
            raise UserError("data: no label word has two examples, one of them to be asked")
        self.label_ids = self._label_ids()
        self.roles = self.classes.roles(self.label_names, len(self.label_names) * config.shots)

    def count(self, examples: int) -> int:
        if self.split == "test":
            return min(examples, len(self.examples.test))
        return min(examples, sum(len(same) - self._shown(len(same)) for same in self._by_class()))

    def _by_class(self) -> list[list[Example]]:
        classes = range(len(self.label_names))
        return [[e for e in self.examples.train if e.label == number] for number in classes]

    def _shown(self, count: int) -> int:
        """How many of a class of `train` are there for demonstrations and lessons: but for those asked."""
        return count if self.split == "test" else count - count // 2

    def _check_shots(self, shots: int, lessons: int = 0) -> None:
        """
        Raises:
          UserError: a class has too few examples for so many demonstrations and lessons.
        """
        for word, same in zip(self.label_names, self._by_class(), strict=True):
            have = self._shown(len(same))
            if have < shots + lessons:
                half = "" if self.split == "test" else f", of {len(same)} of which the others are queries"
                wanted = f"{shots} demonstrations and {lessons} to learn from" if lessons else f"{shots}"
                raise UserError(f"data: {have} demonstrations of {word}{half}, and {wanted} are asked for")

    def with_shots(self, shots: int) -> "FewShotPrompts":
        self._check_shots(shots)
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, shots=shots)
        other._facts, other._made = dict.fromkeys(self._facts, 0), {}
        other.roles = other.classes.roles(other.label_names, len(other.label_names) * shots)
        return other

    def facts(self) -> dict[str, Any]:
        return {name: number for name, number in self._facts.items() if number}

    def texts(self, seed: int, examples: int) -> list[str]:
        """The prompts of a seed as text, in their order."""
        asked, shown = self._drawn(seed, examples)
        return [self._text(self._pieces(d, q)) for d, q in zip(shown, asked, strict=True)]

    def batches(self, seed: int, examples: int, batch_size: int) -> list[Prompts]:
        key = (seed, examples, batch_size)
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]

    def _make(self, seed: int, examples: int, batch_size: int) -> list[Prompts]:
        asked, shown = self._drawn(seed, examples)
        prompts = self._annotated(asked, shown)
        found = []
        for chosen, length in in_batches([len(p.tokens) for p in prompts], batch_size, self.limit):
            rows = np.full(batch_size, -1, np.int32)
            rows[: len(chosen)] = chosen
            filled = [*chosen, *[chosen[-1]] * (batch_size - len(chosen))]
            labels = np.array([asked[n].label for n in filled], np.int32)
            found.append(self._batch([prompts[n] for n in filled], labels, length, rows))
        return found

    def fixed(self) -> "FewShotPrompts":
        if self.mode == "paper":
            return self
        other = copy.copy(self)
        other.mode, other._facts, other._made = "paper", dict.fromkeys(self._facts, 0), {}
        return other

    def lessons(self, seed: int, per_class: int) -> Prompts:
        shots = self.config.shots
        self._check_shots(shots, per_class)
        rng = np.random.default_rng((seed, 0))
        asked = []
        for same in self._by_class():
            asked += [same[n] for n in rng.permutation(len(same))[shots : shots + per_class]]
        shown = self.fixed()._drawn(seed, 1)[1][0]
        prompts = self._annotated(asked, [shown] * len(asked))
        labels = np.array([example.label for example in asked], np.int32)
        length = min(self.limit, bucket(max(len(prompt.tokens) for prompt in prompts)))
        return self._batch(prompts, labels, length, np.arange(len(asked), dtype=np.int32))

    def _drawn(self, seed: int, examples: int) -> tuple[list[Example], list[list[Example]]]:
        """Queries of a seed, and the demonstrations of each."""
        rng = np.random.default_rng((seed, 0))
        by_class, shots = self._by_class(), self.config.shots
        drawn = [[same[n] for n in rng.permutation(len(same))] for same in by_class]
        chosen = [example for same in drawn for example in same[:shots]]
        order = rng.permutation(len(by_class))
        demonstrations = [chosen[n] for n in rng.permutation(len(chosen))]
        pool = self.examples.test
        if self.split == "validation":
            pool = [example for same in drawn for example in same[self._shown(len(same)) :]]
            by_class = [same[: self._shown(len(same))] for same in drawn]
        queries = np.random.default_rng((seed, 2)).permutation(len(pool))[: self.count(examples)]
        asked = [pool[n] for n in queries]
        if self.mode == "paper":
            return asked, [demonstrations] * len(asked)
        draw = lambda same: [same[n] for n in rng.integers(0, len(same), shots)]
        return asked, [[e for c in order for e in draw(by_class[c])] for _ in asked]

    def _pieces(
        self, demonstrations: Sequence[Example], query: Example, longest: int | None = None
    ) -> list[Piece]:
        """A prompt in its parts. `longest`: of each text only so many letters are taken."""
        if self._chat is not None:
            return self._chat.pieces(
                [self._asked(e, n, longest) for n, e in enumerate([*demonstrations, query])],
                [self._answer(example.label, n) for n, example in enumerate(demonstrations)],
            )
        pieces = []
        for number, example in enumerate(demonstrations):
            pieces += self._asked(example, number, longest)
            pieces.append(self._answer(example.label, number))
            pieces.append(Piece(self._tail + self.config.separator, Part.FORMAT, number))
        return pieces + self._asked(query, len(demonstrations), longest)

    def _answer(self, label: int, number: int) -> Piece:
        """A label word, and before it the space of the template or of the word itself: the tokens that the
        model is to answer, of which the space may be one of its own."""
        given = self.label_names[label]
        word = given.strip()
        lead = self._lead or given[: len(given) - len(given.lstrip())]
        return Piece(word if self._chat else lead + word, Part.LABEL, number, label)

    def _asked(self, example: Example, number: int, longest: int | None) -> list[Piece]:
        """The template with an example's text, up to the label word and the space before it."""
        before = self.config.template.partition("{label}")[0].rstrip(" ")
        pieces, at = [], 0
        for match in PLACEHOLDER.finditer(before):
            name = match.group(1)
            text = example.text if name == "text" else example.fields[self.examples.columns.index(name)]
            pieces.append(Piece(before[at : match.start()], Part.FORMAT, number))
            pieces.append(Piece(text[:longest].strip() if longest is not None else text, Part.TEXT, number))
            at = match.end()
        return [*pieces, Piece(before[at:], Part.FORMAT, number)]

    def _text(self, pieces: Sequence[Piece]) -> str:
        return "".join(piece.text for piece in pieces)

    def _annotated(self, asked: Sequence[Example], shown: Sequence[Sequence[Example]]) -> list[Annotated]:
        laid_out = [self._pieces(d, query) for d, query in zip(shown, asked, strict=True)]
        encoded = self._encode(laid_out)
        for number, one in enumerate(encoded):
            if len(one.ids) > self.limit:
                laid_out[number], encoded[number] = self._shortened(
                    shown[number], asked[number], len(one.ids)
                )
        return [self._annotate(p, e, q) for p, e, q in zip(laid_out, encoded, asked, strict=True)]

    def _encode(self, laid_out: Sequence[Sequence[Piece]]) -> list[Encoded]:
        texts = [self._text(pieces) for pieces in laid_out]
        return encode_with_spans(texts, self.tokenizer, special=self._chat is None, where="data: the prompts")

    def _shortened(
        self, shown: Sequence[Example], query: Example, length: int
    ) -> tuple[list[Piece], Encoded]:
        """The parts and tokens of a prompt that is too long, by the rule of the config."""
        told = f"{query.where}: its prompt has {length} tokens, at most {self.limit} are read"
        rule = self.config.too_long
        if rule == "drop_demonstrations":
            for dropped in range(1, len(shown) + 1):
                pieces = self._pieces(shown[dropped:], query)
                encoded = self._encode([pieces])[0]
                if len(encoded.ids) <= self.limit:
                    self._facts["dropped_demonstrations"] += dropped
                    return pieces, encoded
        elif rule == "truncate_text":
            texts = [piece.text for piece in self._pieces(shown, query) if piece.part == Part.TEXT]
            best, least, most = None, 1, max(map(len, texts))
            while least <= most:
                middle = (least + most) // 2
                pieces = self._pieces(shown, query, middle)
                encoded = self._encode([pieces])[0]
                if len(encoded.ids) <= self.limit:
                    best, least = (pieces, encoded, middle), middle + 1
                else:
                    most = middle - 1
            if best is not None:
                self._facts["shortened_texts"] += sum(len(text) > best[2] for text in texts)
                return best[:2]
        else:
            raise UserError(
                f"{told}; set data.too_long to drop_demonstrations or truncate_text, or lower data.shots"
            )
        raise UserError(f"{told}, and {rule} is not enough; lower data.shots or raise data.max_tokens")

    def _annotate(self, pieces: Sequence[Piece], encoded: Encoded, query: Example) -> Annotated:
        """What each token is, by the first letter of it that is no space.

        Raises:
          UserError: a token is of a label word and of something else, or a label word has other tokens than
            after a query.
        """
        ids, spans, special = (x[: encoded.text_end] for x in encoded)
        text = self._text(pieces)
        piece_of = np.repeat(np.arange(len(pieces)), [len(piece.text) for piece in pieces])
        parts = np.full(len(ids), Part.FORMAT, np.int32)
        labels, shown = (np.full(len(ids), -1, np.int32) for _ in range(2))
        for token, (first, end) in enumerate(spans.tolist()):
            if special[token] or first == end:
                continue
            written = [at for at in range(first, end) if not text[at].isspace()] or [first]
            covered = {int(piece_of[at]) for at in written}
            piece = pieces[piece_of[written[0]]]
            if len(covered) > 1 and any(pieces[n].part == Part.LABEL for n in covered):
                raise UserError(
                    f"data.template: the token {text[first:end]!r} holds a label word and more; put a "
                    "space or a line break around {label}"
                )
            parts[token], labels[token], shown[token] = piece.part, piece.label, piece.demonstration
        parts = self._mark_labels(ids, parts, labels, shown)
        parts[-1] = Part.LAST
        labels = np.where(parts == Part.LABEL, labels, -1)
        return Annotated(ids.astype(np.int32), parts, labels, shown)

    def _mark_labels(
        self, ids: np.ndarray, parts: np.ndarray, labels: np.ndarray, shown: np.ndarray
    ) -> np.ndarray:
        """Label words by `label_position`, checked against the tokens they should have; forerunners."""
        marked = parts.copy()
        of_label = parts == Part.LABEL
        for number in np.unique(shown[of_label]).tolist():
            where = np.flatnonzero(of_label & (shown == number))
            label = int(labels[where[0]])
            if ids[where].tolist() != self.label_ids[label]:
                raise UserError(
                    f"data.template: the label word {self.label_names[label]} has other tokens in a "
                    "demonstration than after a query; put a space or a line break around {label}"
                )
            if self.label_position != "mean":
                marked[where] = Part.FORMAT
                marked[where[0 if self.label_position == "first" else -1]] = Part.LABEL
            if where[0] > 0:
                marked[where[0] - 1] = Part.FORERUNNER
        return marked

    def _batch(
        self, prompts: Sequence[Annotated], labels: np.ndarray, length: int, rows: np.ndarray
    ) -> Prompts:
        def padded(name: str, fill: int) -> np.ndarray:
            out = np.full((len(prompts), length), fill, np.int32)
            for row, prompt in zip(out, prompts, strict=True):
                row[: len(prompt.tokens)] = getattr(prompt, name)
            return out

        tokens, parts = padded("tokens", 0), padded("parts", Part.PADDING)
        words, shown = padded("label_words", -1), padded("demonstrations", -1)
        check_token_ids(tokens, self.model, self.tokenizer, where="data: one of the prompts")
        first = np.array([ids[0] for ids in self.label_ids], np.int32)
        return Prompts(
            batch={"tokens": tokens},
            classes=self.classes.assign(self.roles, parts, words, shown),
            positions=np.array([len(p.tokens) - 1 for p in prompts], np.int32),
            label_tokens=np.tile(first, (len(prompts), 1)),
            labels=labels,
            parts=parts,
            label_words=words,
            demonstrations=shown,
            rows=rows,
        )

    def _label_ids(self) -> list[list[int]]:
        """The tokens of each label word, as they follow a query.

        Raises:
          UserError: two of them begin with the same token, or the label word changes the tokens before it.
        """
        query = Example(tuple("a text" for _ in self.examples.columns), 0, "")
        pieces = self._pieces([], query)
        answers = [self._answer(label, 0) for label in range(len(self.label_names))]
        prompt, *whole = self._encode([pieces, *([*pieces, answer] for answer in answers)])
        start = prompt.text_end
        found: list[list[int]] = []
        for word, one in zip(self.label_names, whole, strict=True):
            answered = one.ids[: one.text_end].tolist()
            if answered[:start] != prompt.ids[:start].tolist() or len(answered) == start:
                raise UserError(
                    f"data.template: followed by {word} the query's last token is another one, so that the "
                    "answer cannot be read off at it; put a space before {label}"
                )
            found.append(answered[start:])
            unknown = getattr(self.tokenizer.model, "unk_token", None)
            if unknown is not None and self.tokenizer.token_to_id(unknown) in found[-1]:
                raise UserError(
                    f"data.label_words: {word} holds {unknown!r}, which stands for words that the model's "
                    "tokenizer does not know; take other words, or a model of such texts"
                )
        check_token_ids(np.concatenate(found), self.model, self.tokenizer, where="data: a label word")
        chosen = {"the first token, by which they are told apart": 0}
        if self.label_position == "last":
            chosen["the last token, by label_position"] = -1
        for what, at in chosen.items():
            for number, ids in enumerate(found):
                for other in range(number):
                    if found[other][at] == ids[at]:
                        pair = f"{self.label_names[other]} and {self.label_names[number]}"
                        token = f"{self.tokenizer.decode([ids[at]])!r} ({ids[at]})"
                        raise UserError(
                            f"data.label_words: {pair} have in common {what}: {token}; take other words"
                        )
        return found

    def _check_placeholders(self) -> None:
        known = ["text", "label", *self.examples.columns]
        for name in PLACEHOLDER.findall(self.config.template):
            if name not in known:
                raise UserError(
                    f"data.template: {{{name}}} is no column of the text; there are "
                    f"{', '.join(f'{{{word}}}' for word in dict.fromkeys(known))}"
                )


class _Chat:
    """Demonstrations as turns of a conversation, by the template of the model."""

    def __init__(self, system: str, opened: OpenModel) -> None:
        if opened.chat_template is None:
            raise UserError(f"{opened.path}: has no chat template; set data.chat to false")
        self._system, self._template, self._special = system, opened.chat_template, opened.special_tokens
        self._place = str(opened.path)
        self._rendered = functools.cache(self._render)

    def pieces(self, asked: Sequence[Sequence[Piece]], labels: Sequence[Piece]) -> list[Piece]:
        """The parts of a conversation: questions, each but the last with its answer."""
        pieces = []
        turns = [
            piece for pair in zip(asked, [[label] for label in labels] + [[]], strict=True) for piece in pair
        ]
        around = self._rendered(len(labels))
        for number, fixed in enumerate(around):
            pieces.append(Piece(fixed, Part.FORMAT, min(number // 2, len(labels))))
            if number < len(around) - 1:
                pieces += turns[number]
        return pieces

    def _render(self, demonstrations: int) -> list[str]:
        """What the template puts around the contents, which stand in it as marks that no text holds."""
        marks = [f"\ue000{number}\ue001" for number in range(2 * demonstrations + 1)]
        messages = [{"role": ("user", "assistant")[n % 2], "content": mark} for n, mark in enumerate(marks)]
        if self._system:
            messages.insert(0, {"role": "system", "content": self._system})
        text = render_chat(
            messages, self._template, special_tokens=self._special, place=f"{self._place}: chat template"
        )
        found = []
        for mark in marks:
            before, mark, text = text.partition(mark)
            if not mark:
                raise UserError(
                    f"{self._place}: the chat template does not keep all turns of {demonstrations} "
                    "demonstrations; set data.chat to false"
                )
            found.append(before)
        return [*found, text]


def _own_tokenizer(opened: OpenModel) -> Tokenizer:
    """The tokenizer of a model, if it is its own as far as can be known.

    Raises:
      UserError: there is none, or it cannot be this model's.
    """
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise UserError(
            f"{opened.path}: has no tokenizer (it reads bytes, or its files came without one), and texts are "
            "read in the model's own tokens; put its tokenizer.json there, or take another model"
        )
    words, rows = tokenizer.get_vocab_size(), opened.config.vocab_size
    if words < 0.75 * rows:
        raise UserError(
            f"{opened.path}: its tokenizer has {words} tokens, the model {rows}: it is another model's; put "
            "the model's own tokenizer.json there"
        )
    for token in sorted(opened.end_tokens):
        if token >= opened.config.embedding_rows or tokenizer.id_to_token(token) is None:
            raise UserError(
                f"{opened.path}: texts end with token {token} by its files, which its tokenizer or its "
                f"embedding does not have ({words} tokens, {opened.config.embedding_rows} rows): they are of "
                "two models"
            )
    return tokenizer


def _label_affixes(template: str) -> tuple[str, str]:
    """What stands right before a label word, and after it."""
    before, _, after = template.partition("{label}")
    return before[len(before.rstrip(" ")) :], after
