"""Questions put to a model: exact match, token F1 and rules of what it answers, and how likely it finds
choices and texts. For every model that the project reads, through its chat template and processor.
"""

import hashlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from jaxlab.checkpoints import OpenModel
from jaxlab.errors import ConfigError, UserError
from jaxlab.evaluation.answers import answer_texts
from jaxlab.evaluation.likelihood import WHOLE, groups, likelihoods, together
from jaxlab.evaluation.prompting import find_ends, read_prompt, render_prompts
from jaxlab.evaluation.question_files import Measure, Question, read_questions
from jaxlab.evaluation.rules import obeys
from jaxlab.models import (
    OF_TOKENS,
    Batch,
    ModelConfig,
    Params,
    continuation_log_probs,
    prepare_batch,
    stack_rows,
    to_host,
)
from jaxlab.processing import check_token_ids, encode


@dataclass(frozen=True)
class QuestionsConfig:
    """Questions in a file of JSON Lines, and what is measured of the answers."""

    kind: Literal["questions"] = "questions"
    path: str = ""
    """The file: {"prompt", "image", "answer" or "choices" or "rules"} a line (docs/evaluation.md)."""
    validation_path: str = ""
    """Those of the validation split; none: a share of `path`."""
    validation_share: float = 0.5
    """Of the questions of `path`, where it holds both splits: chosen by their places in it."""
    measure: Measure = "exact_match"
    """exact_match and token_f1 of what the model answers; multiple_choice: which choice it finds likeliest;
    perplexity of the answer (or text) after the prompt; rules that an answer obeys."""
    normalize: bool = True
    """Answers without case, punctuation and articles; log-likelihoods of choices over their bytes."""
    chat: bool | None = None
    """Ask by the model's chat template; null: where it has one."""
    system: str = ""
    """What the model is told before, in a chat."""
    max_new_tokens: int = 64
    """Most tokens of an answer."""
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends, such as a line break for models that only go on."""
    limit: int = 0
    """At most so many questions of a split; 0: all."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("which questions? give a file of JSON Lines", key="path")
        if not 0 <= self.validation_share < 1:
            raise ConfigError(
                f"must be from 0 to below 1, is {self.validation_share}", key="validation_share"
            )
        if self.max_new_tokens < 1:
            raise ConfigError(f"must be at least 1, is {self.max_new_tokens}", key="max_new_tokens")
        if self.limit < 0:
            raise ConfigError(f"must not be negative, is {self.limit}", key="limit")
        if self.chat is False and self.system:
            raise ConfigError("is for a chat; leave chat out", key="system")

    @property
    def identity(self) -> str:
        """Changes when a file of the questions changes, or one of their images.

        Raises:
          UserError: a mistake in a file.
        """
        digest = hashlib.sha256()
        for path in filter(None, (self.path, self.validation_path)):
            digest.update(Path(path).read_bytes() if Path(path).is_file() else b"")
            for question in read_questions(path, self.measure):
                for image in question.prompt.images:
                    digest.update(hashlib.sha256(Path(image).read_bytes()).digest())
        return digest.hexdigest()

    def questions(self, split: Literal["validation", "test"]) -> list[Question]:
        """Those of a split; without `validation_path` the places of a file are divided, evenly spread.

        Raises:
          UserError: a mistake in the file, or a split without any.
        """
        if split == "validation" and self.validation_path:
            found = read_questions(self.validation_path, self.measure)
        else:
            found = read_questions(self.path, self.measure)
            if not self.validation_path:
                share = self.validation_share
                places = [math.floor((i + 1) * share) > math.floor(i * share) for i in range(len(found))]
                wanted = split == "validation"
                found = [q for q, place in zip(found, places, strict=True) if place == wanted]
        if not found:
            raise UserError(f"{self.path}: no question for the {split} split; change validation_share")
        return found[: self.limit or None]


@dataclass(frozen=True)
class Asked:
    """One question as a model reads it."""

    question: Question
    batch: Batch
    """The prompt, one row."""
    continuations: tuple[np.ndarray, ...] = ()
    """Token ids of the choices, or of the text."""
    right: np.ndarray | None = None
    """Token ids of the right answer; None: rules alone say what is right."""


@dataclass(frozen=True)
class Questions:
    """The questions of one split, ready to be put to models that read as the one they were made for."""

    config: QuestionsConfig
    asked: tuple[Asked, ...]
    opened: OpenModel
    chat: bool
    ends: frozenset[int]
    stops: tuple[str, ...]

    @property
    def has_images(self) -> bool:
        """Whether any question has an image."""
        return any(one.question.prompt.images for one in self.asked)

    def measure(self, params: Params, *, batch_size: int = 8, model: ModelConfig | None = None) -> "Measured":
        """What a model makes of the questions.

        Args:
          params: of a model that reads as the opened one does.
          model: its config, by default the opened one's.
        """
        config = model or self.opened.config
        if self.config.measure in ("multiple_choice", "perplexity"):
            return self._by_likelihood(params, config, batch_size)
        texts = self._generate(params, config, batch_size)
        return self._by_answers(texts)

    def entropy(self, params: Params, *, batch_size: int = 8, model: ModelConfig | None = None) -> float:
        """The mean entropy (nats) of what a model would say first, without a look at what is right."""
        config, found = model or self.opened.config, []
        nothing = (np.zeros(1, np.int32),)
        for members, rows in groups(self._prompts, batch_size):
            prompts = [self._prompts[i] for i in members]
            batch, tokens, mask = together(prompts, [nothing] * len(prompts), rows, config)
            _, _, spread = continuation_log_probs(params, batch, tokens, mask, config)
            found += np.asarray(to_host(spread), np.float64)[: len(members)].tolist()
        return float(np.mean(found))

    def batches(self, batch_size: int = 8) -> list[Batch]:
        """The questions with their right answers, which `loss_mask` marks, for losses and flows: tokens,
        segment_ids and loss_mask [B, T], of like lengths, with images of one shape, prepared. The first
        answer of several; its end belongs to it. Without those that rules alone judge or that are too long.
        """
        model, found = self.opened.config, []
        for members, _ in groups(self._prompts, batch_size):
            rows = [self._with_answer(self.asked[i]) for i in members if self.asked[i].right is not None]
            rows = [row for row in rows if row["tokens"].shape[1] <= model.max_length]
            if not rows:
                continue
            width = max(row["tokens"].shape[1] for row in rows)
            batch = stack_rows(rows, min(-(-width // WHOLE) * WHOLE, model.max_length), model)
            batch.setdefault("segment_ids", np.ones_like(batch["tokens"]))
            found.append(prepare_batch(batch, model))
        return found

    def _with_answer(self, one: Asked) -> Batch:
        """A question and its right answer, which no token of the question sees."""
        assert one.right is not None
        end = np.asarray(sorted(self.ends)[:1], np.int32)
        asked, answer = one.batch["tokens"][0], np.concatenate([one.right, end])
        row: dict[str, Any] = dict(one.batch)
        for name in set(row) & set(OF_TOKENS):
            x = np.asarray(row[name])
            row[name] = np.pad(x, ((0, 0), (0, len(answer)), *[(0, 0)] * (x.ndim - 2)), mode="edge")
        is_answer = np.arange(len(asked) + len(answer))[None] >= len(asked)
        row |= {"tokens": np.concatenate([asked, answer])[None], "loss_mask": is_answer}
        if self.opened.config.has_prefix and "images" in row:
            row["token_type_ids"] = is_answer.astype(np.int32)
        return cast(Batch, row)

    def _generate(self, params: Params, config: ModelConfig, batch_size: int) -> list[str]:
        """An answer to each question, greedily, made in batches of like lengths."""
        return answer_texts(
            self._prompts,
            params,
            config,
            self.opened.tokenizer,
            max_new_tokens=self.config.max_new_tokens,
            ends=self.ends,
            stops=self.stops,
            batch_size=batch_size,
        )

    def _by_answers(self, texts: Sequence[str]) -> "Measured":
        questions = [one.question for one in self.asked]
        pairs = list(zip(texts, questions, strict=True))
        if self.config.measure == "rules":
            obeyed = [[obeys(text, rule) for rule in q.rules] for text, q in pairs]
            all_rules = [rule for rules in obeyed for rule in rules]
            measures = {
                "all_rules": float(np.mean([all(rules) for rules in obeyed])),
                "each_rule": float(np.mean(all_rules)),
            }
            return Measured("all_rules", measures, texts, [float(all(rules)) for rules in obeyed])
        same = [max(exactly(text, right, self.config.normalize) for right in q.answers) for text, q in pairs]
        shared = [max(token_f1(text, right) for right in q.answers) for text, q in pairs]
        measures = {"exact_match": float(np.mean(same)), "token_f1": float(np.mean(shared))}
        name = self.config.measure
        return Measured(
            name, measures, texts, [float(x) for x in (same if name == "exact_match" else shared)]
        )

    def _by_likelihood(self, params: Params, config: ModelConfig, batch_size: int) -> "Measured":
        continuations = [one.continuations for one in self.asked]
        found = likelihoods(params, config, self._prompts, continuations, batch_size=batch_size)
        sums = [one.log_probs for one in found]
        if self.config.measure == "perplexity":
            return _perplexity(self.asked, [float(of_text[0]) for of_text in sums])
        return _choices(self.asked, sums, self.config.normalize)

    @property
    def _prompts(self) -> list[Batch]:
        return [one.batch for one in self.asked]


@dataclass(frozen=True)
class Measured:
    """What was measured of the questions of a split."""

    name: str
    """Of the measure that decides."""
    measures: dict[str, float]
    answers: Sequence[str]
    """For each question what the model said, or the choice that it took."""
    each: Sequence[float]
    """For each question its own score."""

    @property
    def score(self) -> float:
        """The measure that decides, more is better: of perplexity the mean probability of a token, 1 over
        it, and 0 where a model's numbers are none."""
        value = self.measures[self.name]
        if self.name != "perplexity":
            return value
        return 1.0 / value if math.isfinite(value) else 0.0


def prepare_questions(
    config: QuestionsConfig, opened: OpenModel, split: Literal["validation", "test"]
) -> Questions:
    """The questions of a split as a model reads them: rendered, tokenized, images processed.

    Raises:
      UserError: a mistake in the file, a question that the model cannot read, or a prompt that is too long.
    """
    questions = config.questions(split)
    template = opened.chat_template if config.chat in (None, True) else None
    if config.chat and template is None:
        raise UserError(f"{opened.path}: has no chat template; leave chat out")
    if template is None and any(q.prompt.messages for q in questions):
        raise UserError(f"{opened.path}: has no chat template, and {questions[0].where} is a conversation")
    chat = template is not None
    prompts = [question.prompt for question in questions]
    # A text by itself is nobody's turn.
    turns = [i for i, prompt in enumerate(prompts) if prompt.text or prompt.messages or prompt.images]
    if template is not None and turns:
        rendered = render_prompts([prompts[i] for i in turns], template, opened, system=config.system)
        for i, prompt in zip(turns, rendered, strict=True):
            prompts[i] = prompt
    ends, stops = find_ends(opened, chat=chat, stop=config.stop)
    asked = []
    for question, prompt in zip(questions, prompts, strict=True):
        asked.append(_ask(question, prompt, opened, config, chat=chat))
    return Questions(config, tuple(asked), opened, chat, ends, tuple(stops))


def _ask(question: Question, prompt: Any, opened: OpenModel, config: QuestionsConfig, *, chat: bool) -> Asked:
    most, tokenizer = opened.config.max_length, opened.tokenizer
    encoded: Callable[[str], np.ndarray] = lambda text: np.asarray(
        encode(text, tokenizer, special=False, where=question.where), np.int32
    )
    right: np.ndarray | None = None
    if config.measure == "perplexity" and not (prompt.text or prompt.messages or prompt.images):
        ids = np.asarray(encode(question.answers[0], tokenizer, where=question.where), np.int32)
        if len(ids) < 2:
            raise UserError(f"{question.where}: perplexity needs a text of at least two tokens")
        batch: Batch = {"tokens": ids[None, :1]}
        continuations: tuple[np.ndarray, ...] = (ids[1:],)
    else:
        batch = read_prompt(prompt, opened, chat=chat)
        given = question.choices if config.measure == "multiple_choice" else question.answers
        # Without a template a text goes on after a space, unless there is one.
        text = prompt.text
        gap = "" if chat or not text or text[-1].isspace() else " "
        needed = config.measure in ("multiple_choice", "perplexity")
        continuations = tuple(encoded(gap + one) for one in given) if needed else ()
        if not needed and question.answers:
            right = encoded(gap + question.answers[0])
        if any(not len(ids) for ids in continuations):
            raise UserError(f"{question.where}: an empty choice or answer")
    for ids in continuations:
        check_token_ids(ids, opened.config, tokenizer, where=question.where)
    length = batch["tokens"].shape[1]
    needs = max([len(ids) for ids in continuations], default=1)
    if not length or length + needs > most:
        raise UserError(
            f"{question.where}: {length} tokens and {needs} of an answer; the model takes 1 to {most}"
        )
    if continuations:
        right = continuations[question.right if config.measure == "multiple_choice" else 0]
    return Asked(question, batch, continuations, right)


def _perplexity(asked: Sequence[Asked], sums: Sequence[float]) -> Measured:
    counts = [len(one.continuations[0]) for one in asked]
    size = sum(len(one.question.answers[0].encode()) for one in asked)
    mean = -sum(sums) / sum(counts)
    measures = {
        "perplexity": _exp(mean),
        "loss": mean,
        "bits_per_byte": -sum(sums) / math.log(2) / size,
    }
    each = [math.exp(total / count) for total, count in zip(sums, counts, strict=True)]
    return Measured("perplexity", measures, [""] * len(asked), each)


def _exp(x: float) -> float:
    """Infinity where it is beyond a float."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _choices(asked: Sequence[Asked], sums: Sequence[np.ndarray], normalize: bool) -> Measured:
    """Accuracy by the likelihoods of the choices, and by them over the choices' bytes."""
    right, plain, by_length = [], [], []
    for one, log_p in zip(asked, sums, strict=True):
        sizes = np.asarray([len(choice.encode()) for choice in one.question.choices])
        plain.append(_likeliest(log_p))
        by_length.append(_likeliest(log_p / sizes))
        right.append(one.question.right)
    hits = [taken == r for taken, r in zip(by_length if normalize else plain, right, strict=True)]
    measures = {
        "accuracy": float(np.mean([taken == r for taken, r in zip(plain, right, strict=True)])),
        "accuracy_by_length": float(np.mean([t == r for t, r in zip(by_length, right, strict=True)])),
    }
    taken = by_length if normalize else plain
    said = [one.question.choices[i] if i >= 0 else "" for one, i in zip(asked, taken, strict=True)]
    name = "accuracy_by_length" if normalize else "accuracy"
    return Measured(name, measures, said, [float(hit) for hit in hits])


def _likeliest(log_p: np.ndarray) -> int:
    """The first of the largest; -1, which is never right, where one is NaN."""
    return -1 if np.isnan(log_p).any() else int(np.argmax(log_p))


def normalized(text: str) -> list[str]:
    """The words of an answer in lower case, without punctuation and English articles (as SQuAD's evaluation
    has it)."""
    lower = "".join(" " if c in string.punctuation else c for c in text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", lower).split()


def exactly(text: str, right: str, normalize: bool) -> bool:
    """Whether an answer is the right one."""
    if normalize:
        return normalized(text) == normalized(right)
    return text.strip() == right.strip()


def token_f1(text: str, right: str) -> float:
    """The harmonic mean of precision and recall of an answer's words, both normalized (SQuAD,
    arXiv 1606.05250, sec. 6.1)."""
    said, wanted = normalized(text), normalized(right)
    shared = sum((Counter(said) & Counter(wanted)).values())
    if not said or not wanted:
        return float(said == wanted)
    return 2 * shared / (len(said) + len(wanted))
