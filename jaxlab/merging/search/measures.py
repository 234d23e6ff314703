"""What a search measures on batches of tokens, within the program that merges: answers known beforehand, and,
without labels, the answers that a model gives by itself.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from jaxlab.data import Source
from jaxlab.errors import UserError
from jaxlab.losses import exact_match
from jaxlab.merging.in_forward import MergedInForward, forward_merged
from jaxlab.models import Batch, ModelConfig, Output, Params, forward, generate

Model = Params | MergedInForward
"""Parameters, or what `forward_merged` merges as it runs."""

Measure = Callable[[Any, Any], dict[str, Array]]
"""(a model, data) -> arrays by name, of one shape for all models; pure, jitted with the merge."""

Data = dict[str, list[Batch]]
"""By name of the data set: its batches, those of equal shapes stacked on a leading axis."""

SCORE, ENTROPY, ANSWERS = "score", "entropy", "answers"
"""What is measured of a data set, as `SCORE/name`: the share answered right; of the model's own answers the
mean entropy, and a hash of each."""


def predict(model: Model, batch: Batch, config: ModelConfig) -> Output:
    """The output of a model, merged or to be merged."""
    if isinstance(model, MergedInForward):
        return forward_merged(model, batch, config)
    return forward(model, batch, config)


@functools.cache
def token_measure(config: ModelConfig, own_answers: tuple[tuple[str, int, int], ...] = ()) -> Measure:
    """(model, data) -> `SCORE/name` for every data set: the share of sequences all of whose targets are the
    likeliest tokens.

    With the answer given and every target predicted from what stands before it, that is what greedy decoding
    would have answered.

    Args:
      own_answers: (data set, longest answer, token that ends one or -1) of those whose answers the model is
        to give by itself: `ENTROPY/name` and `ANSWERS/name`, a hash for each row.
    """

    def measure(model: Model, data: Data) -> dict[str, Array]:
        matches = lambda batch: exact_match(predict(model, batch, config).logits, batch)
        each = lambda function, name: [jax.lax.map(function, stack) for stack in data[name]]
        joined = lambda parts: jnp.concatenate([part.reshape(-1) for part in parts])
        found = {
            f"{SCORE}/{name}": jnp.mean(joined(each(matches, name)).astype(jnp.float32)) for name in data
        }
        for name, longest, stop in own_answers:
            answer = lambda batch, longest=longest, stop=stop: _hash_answers(
                model, batch, config, longest, stop
            )
            parts = each(answer, name)
            found[f"{ENTROPY}/{name}"] = jnp.mean(joined([p[1] for p in parts]))
            found[f"{ANSWERS}/{name}"] = joined([p[0] for p in parts])
        return found

    return measure


def _hash_answers(
    model: Model, batch: Batch, config: ModelConfig, longest: int, stop: int
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    given, steps = answer_greedily(model, batch, config, longest, stop)
    hashed = jnp.zeros(given.shape[:1], jnp.uint32)
    for i in range(longest):
        hashed = (hashed ^ given[:, i].astype(jnp.uint32)) * jnp.uint32(16777619)
    counted = steps >= 0
    mean = jnp.sum(steps, axis=1, where=counted) / jnp.maximum(
        jnp.sum(counted, axis=1, dtype=jnp.float32), 1.0
    )
    return jax.lax.bitcast_convert_type(hashed, jnp.int32), mean


def answer_greedily(
    model: Model, batch: Batch, config: ModelConfig, longest: int, stop: int
) -> tuple[Int[Array, "B longest"], Float[Array, "B longest"]]:
    """What a model answers by itself to rows of one answer each, whose right answers it does not see.

    Args:
      batch: rows with one answer each, which loss_mask marks.
      longest: tokens that are made.
      stop: the token that ends an answer; -1: none.

    Returns:
      The tokens, -1 after the end; and the entropy of each prediction in nats, -1 there too.
    """
    tokens, starts = batch["tokens"], jnp.argmax(batch["loss_mask"], axis=1)
    place = jnp.arange(tokens.shape[1])[None]
    # Nothing that attention could look at is left of the answers; without segments the padding is text too.
    asked = jnp.where(place < starts[:, None], tokens, tokens[:, :1])
    fixed = {name: x for name, x in batch.items() if name not in ("tokens", "segment_ids", "loss_mask")}
    rows = jnp.arange(tokens.shape[0])

    def step(i: Array, state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        text, made, entropies, ended = state
        logits = predict(model, cast(Batch, {**fixed, "tokens": text}), config).logits
        now = logits[rows, jnp.minimum(starts + i, tokens.shape[1]) - 1]
        token = jnp.argmax(now, axis=-1).astype(jnp.int32)
        log_p = jax.nn.log_softmax(now, axis=-1)
        spread = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        ended = ended | (starts + i >= tokens.shape[1])
        made = made.at[:, i].set(jnp.where(ended, -1, token))
        entropies = entropies.at[:, i].set(jnp.where(ended, -1.0, spread))
        text = jnp.where(place == (starts + i)[:, None], token[:, None], text)
        return text, made, entropies, ended | (token == stop)

    shape = (tokens.shape[0], longest)
    first = (asked, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape), jnp.zeros(shape[:1], bool))
    _, made, entropies, _ = jax.lax.fori_loop(0, longest, step, first)
    return made, entropies


def own_answers(name: str, data: Sequence[Batch]) -> tuple[str, int, int]:
    """(name, longest answer, token that ends one or -1) of a data set, for `token_measure`.

    Raises:
      UserError: its rows do not hold one answer each.
    """
    longest, ends = 0, set()
    for stack in data:
        length = stack["tokens"].shape[-1]
        tokens, mask = (np.asarray(stack[key]).reshape(-1, length) for key in ("tokens", "loss_mask"))
        runs = np.diff(mask.astype(int), axis=1, prepend=0)
        if not ((runs == 1).sum(1) == 1).all() or mask[:, 0].any():
            raise UserError(
                f"evaluate.{name}: a choice without labels needs rows of one answer each; choose_by labels"
            )
        longest = max(longest, int(mask.sum(1).max()))
        last = length - 1 - mask[:, ::-1].argmax(1)
        ends |= set(tokens[np.arange(len(tokens)), last].tolist())
    return name, longest, ends.pop() if len(ends) == 1 else -1


def read_data(sources: Mapping[str, Source], split: str, batch_size: int, batches: int) -> Data:
    """The batches of a held-out split of every data set.

    Raises:
      UserError: a set without any.
    """
    data: Data = {}
    for name, source in sources.items():
        found = list(source.held_out_batches(batch_size, batches, split))
        if not found:
            raise UserError(f"{name}: the {split} split has no batch of {batch_size}; lower batch_size")
        data[name] = stack_batches(found)
    return data


def stack_batches(batches: Sequence[Mapping[str, Any]]) -> list[Batch]:
    """Batches of equal shapes on a new leading axis, one dict for each set of shapes."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for batch in batches:
        shapes = tuple(sorted((name, np.shape(value)) for name, value in batch.items()))
        groups.setdefault(shapes, []).append(batch)
    return [jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *group) for group in groups.values()]


def text_only(data: Data) -> Data:
    """The data sets without images."""
    return {name: stacks for name, stacks in data.items() if not any("images" in stack for stack in stacks)}


def score_tokens(params: Params, config: ModelConfig, data: Data) -> dict[str, float]:
    """The score of one model on every data set."""
    if not data:
        return {}
    found = _measured(token_measure(config), params, data)
    return {name.removeprefix(f"{SCORE}/"): float(value) for name, value in found.items()}


@functools.partial(jax.jit, static_argnames="measure")
def _measured(measure: Measure, params: Params, data: Data) -> dict[str, Array]:
    return measure(params, data)


def answered(
    models: Mapping[str, Params],
    batch: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    count: int,
) -> list[dict[str, Any]]:
    """The first `count` rows of a batch, answered greedily by every model.

    Args:
      models: parameters by name, all of one config.
      batch: rows with one answer each, which loss_mask marks; it ends the row.

    Returns:
      For each row the question, the expected answer, answers by model, and its image, float [height, width]
      in [0, 1], where it has one of a single channel.
    """
    rows = {name: np.asarray(value)[:count] for name, value in batch.items()}
    starts = rows["loss_mask"].argmax(1)
    ends = rows["loss_mask"].shape[1] - rows["loss_mask"][:, ::-1].argmax(1)
    expected = [row[start:end] for row, start, end in zip(rows["tokens"], starts, ends, strict=True)]
    before = np.arange(rows["tokens"].shape[1])[None] < starts[:, None]
    prompts = cast(
        Batch,
        {  # padded with the first token: the answer must not even stand where it is not read
            "tokens": jnp.asarray(np.where(before, rows["tokens"], rows["tokens"][:, :1])[:, : starts.max()]),
            "segment_ids": jnp.asarray(before.astype(np.int32)[:, : starts.max()]),
        }
        | ({"images": jnp.asarray(rows["images"])} if "images" in rows else {}),
    )
    last = {int(answer[-1]) for answer in expected}
    stop = last.pop() if len(last) == 1 else None  # the mark of an end, if answers have one
    longest = max(len(answer) for answer in expected)
    said = {
        name: generate(params, prompts, config, max_new_tokens=longest, stop_token=stop)
        for name, params in models.items()
    }
    examples = []
    for i, answer in enumerate(expected):
        example: dict[str, Any] = {
            "question": tokenizer.decode(rows["tokens"][i, : starts[i]].tolist()),
            "expected": tokenizer.decode(answer.tolist()),
            "answers": {name: tokenizer.decode(_until(tokens[i], stop)) for name, tokens in said.items()},
        }
        if "images" in rows and rows["images"].shape[1] == rows["images"].shape[-1] == 1:
            example["image"] = rows["images"][i, 0, :, :, 0].round(3)
        examples.append(example)
    return examples


def _until(tokens: np.ndarray, stop: int | None) -> list[int]:
    """Tokens before the first `stop`."""
    ids = tokens.tolist()
    return ids[: ids.index(stop)] if stop in ids else ids
