"""Rules on what files beside the tensors say: settings, tokenizers, templates, dtypes."""

import math
from collections.abc import Iterator

from jaxlab.checkpoints import HEAD
from jaxlab.merging.diagnosis.facts import SHOWN, Facts, Finding, base_of, more
from jaxlab.merging.diagnosis.measures import Side
from jaxlab.merging.diagnosis.tokens import listed

SAME_TOKENIZER = 0.5
"""Fewer tokens of one id than this share: tokenizers of two models."""

_TURN = "queries and keys were trained to turn by other angles, so averages of them look at wrong places"
_WINDOW = "layers see other stretches of the text"
_MEANT = {
    "rope": ("rope", _TURN),
    "position": ("rope", _TURN),
    "sliding_rope_theta": ("rope", _TURN),
    "sliding_window": ("attention", _WINDOW),
    "layer_kinds": ("attention", _WINDOW),
    "attention": ("attention", _WINDOW),
    "norm_eps": ("norm_eps", "activations are normed otherwise"),
    "activation": ("activation", "MLPs compute another function"),
}
"""By the first word of a setting: the cause it is told as, and what it does."""


def _configs(facts: Facts) -> Iterator[Finding]:
    for d in facts.configs:
        told = f"{d.field} is {d.values[0]} in {d.first} and {d.values[1]} in {d.other}"
        if d.decides_tensors:
            remedy = "merge models of one architecture and size"
            yield Finding("breaks", "architecture", f"{told}: the tensors do not fit", remedy, 10)
            continue
        group = d.field.partition(".")[0]
        cause, why = _MEANT.get(group, (group, "the models compute other functions of the same weights"))
        remedy = f"where {d.first}'s is meant to count, say so in the recipe: differences: {{{d.field}: vlm}}"
        if d.field == "norm_eps" and _factor(d.values) <= 10:
            yield Finding("note", cause, f"{told}: {why}, though by little", remedy)
        else:
            mild = cause in ("attention", "norm_eps")
            yield Finding("harms" if mild else "breaks", cause, f"{told}: {why}", remedy, 5)


def _factor(values: tuple[str, str]) -> float:
    one, two = sorted(float(value) for value in values)
    return two / one if one else math.inf


def _misfits(facts: Facts) -> Iterator[Finding]:
    if facts.misfits:
        said = f"tensors that do not fit: {'; '.join(facts.misfits[:SHOWN])}{more(facts.misfits)}"
        yield Finding("breaks", "tensors", said, "merge models of one architecture and size", 9)


def _tokenizers(facts: Facts) -> Iterator[Finding]:
    for t in facts.tokens:
        names = f"{t.first} and {t.other}"
        if t.problem:
            said = f"whether tokens of {names} have the same ids is unknown: {t.problem}"
            yield Finding("note", "tokenizer_unknown", said, "put tokenizer.json beside the tensors", 1)
            continue
        other = {i for i, _, _ in t.reused}
        if t.agreement < SAME_TOKENIZER:
            said = (
                f"the tokenizers of {names} are of two models: {t.shared - len(t.moved):,} of "
                f"{min(t.sizes):,} tokens have the same id"
            )
            remedy = "merge models of one tokenizer: what one learned about its tokens is lost on the other's"
            yield Finding("breaks", "tokenizer", said, remedy, 7)
            continue
        if t.moved or other:
            swapped = [token for token, _, _ in t.moved] or [token for _, token, _ in t.reused]
            what = (
                f"give {len(t.moved):,} tokens other ids"
                if t.moved
                else f"use {len(other):,} ids for two tokens"
            )
            said = f"the tokenizers of {names} {what} ({listed(swapped)}): rows would be mixed"
            yield Finding("harms", "token_ids", said, "use embeddings: vlm, or merge_common_rows", 3)
        if t.cut:
            said = f"the tokenizers of {names} cut texts otherwise, {t.cut[0]!r} for one"
            remedy = (
                f"the merged model reads by {t.first}'s: expect losses where {t.other} was trained on others"
            )
            yield Finding("harms", "segmentation", said, remedy, 2)


def _special_tokens(facts: Facts) -> Iterator[Finding]:
    for t in facts.tokens:
        if base_of(facts, t.other):
            continue  # a base often ends texts otherwise than what was made of it
        for name, mine, theirs in t.special:
            said = f"{name} is {mine!r} in {t.first} and {theirs!r} in {t.other}"
            yield Finding("note", "special_tokens", said, f"the merged model has {t.first}'s", 1)
        if t.ends[0] and t.ends[1] and not set(t.ends[0]) & set(t.ends[1]):
            said = f"texts end with {list(t.ends[0])} in {t.first} and with {list(t.ends[1])} in {t.other}"
            remedy = "the merged model may not stop: add both to eos_token_id in generation_config.json"
            yield Finding("harms", "end_tokens", said, remedy, 1)


def _templates(facts: Facts) -> Iterator[Finding]:
    for t in facts.tokens:
        if base_of(facts, t.other):
            continue
        if t.templates == "other":
            said = f"{t.first} and {t.other} have two chat templates"
            remedy = f"the merged model gets {t.first}'s; a skill of {t.other} may show only under its own"
            yield Finding("note", "chat_template", said, remedy, 2)
        elif t.templates == "second":
            said = f"{t.other} has a chat template, {t.first} has none"
            yield Finding("note", "chat_template", said, "prompt as each of them was trained, and compare", 2)


def _heads(facts: Facts) -> Iterator[Finding]:
    first = facts.sides[0]
    for side in facts.sides[1:]:
        tied = [one for one in (first, side) if HEAD not in one.holders]
        if len(tied) == 1:
            own = side if tied[0] is first else first
            said = f"the head of {tied[0].name} is its embedding, {own.name} has a head of its own"
            remedy = "with embeddings: vlm nothing is mixed; otherwise a head is merged with an embedding"
            yield Finding("note", "tied_head", said, remedy, 1)
        mine, theirs = (one.model.described.embedding_rows for one in (first, side))
        if theirs > mine and not base_of(facts, side.name):
            said = f"{side.name} has {theirs:,} rows of tokens, {first.name} {mine:,}"
            yield Finding("note", "vocabulary", said, f"tokens that only {side.name} has are lost", 1)


def _dtypes(facts: Facts) -> Iterator[Finding]:
    for side in facts.sides:
        if side.model.dequantized:
            said = f"{side.name} is dequantised from {side.model.dequantized}"
            remedy = "its task vector holds the error of that; take the original weights where there are any"
            yield Finding("note", "dequantised", said, remedy, 2)
    plain = [side for side in facts.sides if not side.model.dequantized]
    kinds = {side.name: _main_dtype(side) for side in plain}
    if {"float16", "bfloat16"} <= set(kinds.values()):
        told = ", ".join(f"{name} is {dtype}" for name, dtype in kinds.items())
        said = f"{told}: the difference of two models of these holds their rounding"
        yield Finding("note", "dtype", said, "take models of one dtype where there are any", 1)


def _main_dtype(side: Side) -> str:
    sizes: dict[str, int] = {}
    for tensor in side.found.tensors.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.size
    return max(sizes, key=sizes.__getitem__)


RULES = (_configs, _misfits, _tokenizers, _special_tokens, _templates, _heads, _dtypes)
