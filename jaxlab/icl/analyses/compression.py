"""Anchor-only context compression and what it is set against (Wang et al. 2023, section 3.2, tables 2 and 3;
claim I7)."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from jaxlab.errors import ConfigError, UserError
from jaxlab.icl.analyses.answers import single_class
from jaxlab.icl.analyses.base import Analysis, Records, Study, deviation, mean
from jaxlab.icl.blocking import label_predictions, word_loyalty
from jaxlab.icl.compression import (
    Split,
    anchor_text,
    check_compression,
    chosen_places,
    compressed_logits,
    continued_logits,
    keep_tokens,
    last_logits,
    random_instead,
    read_context,
    split_prompts,
)
from jaxlab.icl.prompts import Prompts
from jaxlab.icl.roles import Part

METHODS = ("full", "hidden_anchor", "text_anchor", "hidden_random")
CLOCKS = ("whole_prompt", "full_cache", "anchor_cache", "anchors_text")


class Work(NamedTuple):
    """A batch, and whether it is timed too."""

    prompts: Prompts
    timed: bool


@dataclass(frozen=True)
class Compression(Analysis[Work]):
    """Of the demonstrations, the cache keeps label words and format alone; the query goes on from that."""

    random_sets: int = 20
    """Sets of random words for Hidden_random; the best of a seed, by label loyalty, is Hidden_random-top."""
    top_words: int = 5
    """Word loyalty compares so many of the most likely next words."""
    repeats: int = 5
    """How often the first batch of each seed is timed, after once to compile; the median counts."""

    name: ClassVar[str] = "compression"

    def __post_init__(self) -> None:
        for name in ("random_sets", "top_words", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)

    def check(self, study: Study) -> None:
        check_compression(study.config, study.longest)
        if any("images" in chunk.batch for chunk in self._batches(study, study.seeds[0])):
            raise UserError("compression keeps text; these prompts hold images")
        if self.top_words > study.config.vocab_size:
            words = study.config.vocab_size
            raise UserError(f"compression.top_words: the vocabulary has {words} words, not {self.top_words}")

    def chunks(self, study: Study, seed: int) -> Sequence[Work]:
        return [Work(chunk, number == 0) for number, chunk in enumerate(self._batches(study, seed))]

    def measure(self, study: Study, chunk: Work, rng: np.random.Generator) -> Records:
        prompts, model, params = chunk.prompts, study.config, study.params
        tokens, offset = prompts.batch["tokens"], self._offset(study)
        split = split_prompts(tokens, prompts.starts, prompts.positions)
        rows = 1 if split.shared else len(tokens)
        cache = read_context(params, split.context[:rows], split.context_lengths[:rows], model)
        kept = self._kept(study, prompts, split, rng)
        full = np.arange(split.context.shape[1]) < split.context_lengths[:, None]
        logits = [
            np.asarray(
                compressed_logits(params, cache, chosen_places(x), split.query, split.last, model, offset)
            )
            for x in (full[None], kept)
        ]
        text, ends = _text(prompts, split)
        found = np.concatenate(
            [
                logits[0],
                logits[1][:1],
                np.asarray(last_logits(params, text, ends, model))[None],
                logits[1][1:],
            ]
        )
        predicted = label_predictions(found, prompts.label_tokens)
        loyal = np.stack([word_loyalty(x, found[0], self.top_words) for x in found])
        real = prompts.real
        times = np.full((0, len(CLOCKS)), np.nan)
        if chunk.timed:
            times = self._times(study, prompts, split, kept[0], (text, ends))
        lengths = np.stack([split.context_lengths, kept[0].sum(-1), split.last + 1], 1)
        return {
            "predicted": predicted.T[real].astype(np.int32),
            "word_loyalty": loyal.T[real],
            "label": prompts.labels[real],
            "lengths": lengths[real],
            "seconds": times,
        }

    def summarize(self, study: Study, records: Mapping[int, Records]) -> dict[str, Any]:
        seeds = [_of_seed(seed) for seed in records.values()]
        table = []
        for name in (*METHODS, "hidden_random_top"):
            row: dict[str, Any] = {"method": name}
            for measure in ("label_loyalty", "word_loyalty", "accuracy"):
                values = np.array([seed[name][measure] for seed in seeds])
                row |= {measure: mean(values), f"{measure}_std": deviation(values)}
            table.append(row)
        plain = np.concatenate([seed["predicted"][:, 0] for seed in records.values()])
        alone = single_class(plain, study.source.label_names)
        lengths = np.concatenate([seed["lengths"] for seed in records.values()]).mean(0)
        times = np.concatenate([seed["seconds"] for seed in records.values()])
        seconds = dict(zip(CLOCKS, np.median(times, axis=0).tolist(), strict=True))
        return {
            "top_words": self.top_words,
            "random_sets": self.random_sets,
            "undefined": ["accuracy", "label_loyalty"] if alone is not None else [],
            "single_class": alone,
            "table": table,
            "tokens": dict(zip(("demonstrations", "kept", "query"), lengths.tolist(), strict=True)),
            "seconds": seconds,
            "times_measured": len(times),
            "batch": study.batch_size,
            "speed_up": {
                "against_the_whole_prompt": seconds["whole_prompt"] / seconds["anchor_cache"],
                "against_a_full_cache": seconds["full_cache"] / seconds["anchor_cache"],
            },
        }

    def _batches(self, study: Study, seed: int) -> Sequence[Prompts]:
        return study.source.fixed().batches(seed, study.examples, study.batch_size)

    def _offset(self, study: Study) -> bool:
        return study.mode == "paper" or study.config.position.kind == "rope"

    def _kept(self, study: Study, prompts: Prompts, split: Split, rng: np.random.Generator) -> np.ndarray:
        """bool[1 + random_sets, B, D]: the anchors, then random words in the place of the label words.

        With the same demonstrations for all prompts of a seed so are the random words. In mode
        `released_code` each is of the demonstration whose label word it replaces, and a set holds those
        before it.
        """
        width = split.context.shape[1]
        inside = np.arange(width) < split.context_lengths[:, None]
        parts, spans = (_of_width(x, width) for x in (prompts.parts, prompts.demonstrations))
        labels = (parts == Part.LABEL) & inside
        anchors = np.isin(parts, (Part.LABEL, Part.FORMAT, Part.FORERUNNER)) & inside
        texts = (parts == Part.TEXT) & inside
        released = study.mode == "released_code"
        seed = int(rng.integers(1 << 31))
        sets = [anchors]
        if split.shared:  # the sets belong to the demonstrations, not to a batch
            labels, texts, spans = labels[:1], texts[:1], spans[:1]
            seed = int(split.context[0].astype(np.int64) @ np.arange(1, width + 1))
        draw = np.random.default_rng(seed)
        before = np.zeros_like(labels)
        for _ in range(self.random_sets):
            chosen = random_instead(draw, labels, texts, spans if released else None)
            before = before | chosen if released else chosen
            sets.append((anchors & ~((parts == Part.LABEL) & inside)) | before)
        return np.stack(sets)

    def _times(
        self, study: Study, prompts: Prompts, split: Split, anchors: np.ndarray, text: tuple[Any, Any]
    ) -> np.ndarray:
        """Seconds [repeats, clocks] of one batch, the four one after the other in turn: the whole prompt;
        the query from a cache of all demonstrations, of the anchors alone; the text of the anchors."""
        params, model, room = study.params, study.config, split.query.shape[1]
        cache = read_context(params, split.context, split.context_lengths, model)
        full = np.arange(split.context.shape[1]) < split.context_lengths[:, None]
        caches = [keep_tokens(cache, chosen_places(x), room) for x in (full, anchors)]
        tokens = prompts.batch["tokens"]
        runs: list[Callable[[], Any]] = [
            lambda: last_logits(params, tokens, prompts.positions, model),
            lambda: continued_logits(params, caches[0], split.query, split.last, model),
            lambda: continued_logits(params, caches[1], split.query, split.last, model),
            lambda: last_logits(params, *text, model),
        ]
        found = np.zeros((self.repeats + 1, len(runs)))
        for repeat in range(len(found)):
            for number, call in enumerate(runs):
                started = time.perf_counter()
                jax.block_until_ready(call())
                found[repeat, number] = time.perf_counter() - started
        return found[1:]


def _of_width(x: np.ndarray, width: int) -> np.ndarray:
    """The first columns, and -1 (no part, no demonstration) where there are not so many."""
    return np.pad(x[:, :width], ((0, 0), (0, max(0, width - x.shape[1]))), constant_values=-1)


def _text(prompts: Prompts, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Text_anchor: the anchors' tokens and the query, as a prompt; and where each ends."""
    column = np.arange(prompts.parts.shape[1])
    anchors = np.isin(prompts.parts, (Part.LABEL, Part.FORMAT, Part.FORERUNNER))
    keep = np.where(column < split.context_lengths[:, None], anchors, column <= prompts.positions[:, None])
    text, ends = anchor_text(prompts.batch["tokens"], keep, prompts.positions)
    width = min(text.shape[1], -(-int(ends.max() + 1) // 8) * 8)
    return text[:, :width], ends


def _of_seed(seed: Records) -> dict[str, dict[str, float]]:
    """The measures of each method; of Hidden_random the mean over its sets, and the best one."""
    predicted, right = seed["predicted"], seed["label"][:, None]
    given = predicted >= 0  # what has no prediction counts nowhere
    loyal = mean(np.where(given & given[:, :1], predicted == predicted[:, :1], np.nan))
    words, exact = mean(seed["word_loyalty"]), mean(np.where(given, predicted == right, np.nan))
    measures = {"label_loyalty": loyal, "word_loyalty": words, "accuracy": exact}
    of = lambda at: {name: float(values[at]) for name, values in measures.items()}
    found = {name: of(at) for at, name in enumerate(METHODS[:3])}
    sets = slice(3, None)
    found["hidden_random"] = {name: float(mean(values[sets])) for name, values in measures.items()}
    return found | {"hidden_random_top": of(3 + int(np.argmax(np.nan_to_num(loyal[sets], nan=-1.0))))}
