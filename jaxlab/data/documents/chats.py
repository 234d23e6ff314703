"""Conversations as tokens, with the assistant's turns as what is learnt."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jaxlab.data.documents.document import Counts, Document, content_key, largest_id, words_digest
from jaxlab.data.documents.readers import Row
from jaxlab.errors import UserError
from jaxlab.processing import Conversation, Turns, as_conversation, encode_with_spans, render_turns

NO_ANSWER = "nothing that the assistant says"
NOT_LEARNT = "no turn to learn (weight 0, train: false)"
FORM = 2
"""Of what is read of a row: another number makes the tokens of conversations anew."""
MOST_WORK = 30_000
"""Of one process that renders: squares of numbers of messages, about a second."""


class ChatEncoder:
    """Conversations through a chat template; see `Encoder`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        *,
        special_tokens: Mapping[str, str],
        train_on: str,
        place: str,
    ) -> None:
        self.tokenizer, self.template, self.place = tokenizer, template, place
        self.special_tokens, self.train_on = dict(special_tokens), train_on
        self.largest = largest_id(tokenizer)
        self._special = frozenset(
            number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        given = json.dumps([template, self.special_tokens, train_on], sort_keys=True)
        digest = hashlib.sha256(given.encode()).hexdigest()
        self.identity = json.dumps([f"chat {FORM}", words_digest(tokenizer), digest])

    def encode(self, rows: Sequence[tuple[str, Row]], counts: Counts) -> list[Document]:
        """See `Encoder`.

        Raises:
          UserError: the tokenizer or the template fails.
        """
        conversations, names = [], []
        for where, row in rows:
            counts.rows += 1
            if row.problem:
                counts.note_bad(row.problem)
            elif row.value is None:
                counts.null += 1
            elif isinstance(row.value, list) and not row.value:
                counts.empty += 1
            else:
                try:
                    conversation = read_conversation(row.value, where, row.tools)
                except UserError as error:
                    counts.note_bad(str(error))
                    continue
                if any(conversation.learnt):
                    conversations.append(_to_last_learnt(conversation))
                    names.append(where)
                else:
                    answers = any(message["role"] == "assistant" for message in conversation.messages)
                    counts.dropped[NOT_LEARNT if answers else NO_ANSWER] += 1
        if not conversations:
            return []
        rendered = [turns for group in _groups(conversations) for turns in self._render(group)]
        kept: list[Turns] = []
        for turns, name in zip(rendered, names, strict=True):
            if turns.problem:
                counts.note_bad(f"{name}: {turns.problem}")
            elif not turns.spans:
                counts.dropped[NO_ANSWER] += 1
            else:
                kept.append(turns)
        documents = []
        encoded = encode_with_spans([t.text for t in kept], self.tokenizer, special=False, where=self.place)
        for turns, tokens in zip(kept, encoded, strict=True):
            targets = said(turns, tokens.ids, tokens.spans, self._special)
            if targets.any():
                documents.append(Document(tokens.ids, content_key(turns.text), targets))
            else:
                counts.dropped[NO_ANSWER] += 1
        return documents

    def _render(self, conversations: Sequence[Conversation]) -> list[Turns]:
        try:
            return render_turns(
                conversations,
                self.template,
                special_tokens=self.special_tokens,
                last_only=self.train_on == "last",
                place=self.place,
            )
        except UserError as error:
            if len(conversations) > 1:  # one of them, perhaps
                return [turns for one in conversations for turns in self._render([one])]
            if "takes too much" not in str(error):  # the template itself
                raise
            return [Turns("", (), str(error))]


def _to_last_learnt(conversation: Conversation) -> Conversation:
    """Without what comes after its last turn that is learnt."""
    end = max(number for number, learnt in enumerate(conversation.learnt, 1) if learnt)
    return conversation._replace(messages=conversation.messages[:end], learnt=conversation.learnt[:end])


def _groups(conversations: Sequence[Conversation]) -> Iterator[list[Conversation]]:
    """Conversations that are rendered by one process, which may compute for seconds only: the work goes with
    the square of the number of messages."""
    group: list[Conversation] = []
    work = 0
    for conversation in conversations:
        more = len(conversation.messages) ** 2
        if group and work + more > MOST_WORK:
            yield group
            group, work = [], 0
        group.append(conversation)
        work += more
    yield group


def said(turns: Turns, ids: np.ndarray, spans: np.ndarray, special: frozenset[int]) -> np.ndarray:
    """Which tokens the assistant says (bool[T]): those that begin in one of its turns, up to the special
    token that ends it where nothing but blanks follows that.

    Args:
      ids: int[T].
      spans: int[T, 2], the letters of each token.
      special: tokens that templates write.
    """
    targets = np.zeros(len(ids), bool)
    for begin, end in turns.spans:
        inside = np.flatnonzero((spans[:, 0] >= begin) & (spans[:, 0] < end) & (spans[:, 1] > spans[:, 0]))
        ends = [i for i in inside if int(ids[i]) in special and not turns.text[spans[i, 1] : end].strip()]
        targets[inside[inside <= ends[0]] if ends else inside] = True
    return targets


def read_conversation(value: Any, where: str, tools: Any = None) -> Conversation:
    """A conversation of texts; see `as_conversation`.

    Raises:
      UserError: it is none, or holds more than texts.
    """
    found = as_conversation(value, where, tools)
    for number, message in enumerate(found.messages, 1):
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        other = next((part["type"] for part in parts if part["type"] != "text"), None)
        if other is not None:
            raise UserError(f"{where}: message {number} holds a part of type {other!r}; texts alone are read")
    return found
