"""How likely continuations of prompts are, in batches of like lengths."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxlab.models import Batch, ModelConfig, Params, continuation_log_probs

WHOLE = 32
"""Lengths are padded to a multiple of so many tokens: batches of like lengths share a program."""


class Likelihood(NamedTuple):
    """Of the continuations of one prompt."""

    log_probs: np.ndarray
    """float64[n] (nats), summed over their tokens."""
    greedy: np.ndarray
    """bool[n]: whether every token is the likeliest one where it stands."""


def likelihoods(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Batch],
    continuations: Sequence[Sequence[np.ndarray]],
    *,
    batch_size: int,
) -> list[Likelihood]:
    """How likely the continuations of each prompt are; each prompt is read once.

    Args:
      prompts: one row each.
      continuations: of each prompt at least one, token ids int32[C], C >= 1.
    """
    found: dict[int, Likelihood] = {}
    for members in groups(prompts, batch_size):
        batch, tokens, mask = together(
            [prompts[i] for i in members], [continuations[i] for i in members], batch_size, config
        )
        log_p, likeliest, _ = continuation_log_probs(params, batch, tokens, mask, config)
        sums = np.asarray(log_p, np.float64).sum(2)
        greedy = np.all(np.asarray(likeliest) | ~mask, axis=2)
        for row, i in enumerate(members):
            count = len(continuations[i])
            found[i] = Likelihood(sums[:count, row], greedy[:count, row])
    return [found[i] for i in range(len(prompts))]


def groups(prompts: Sequence[Batch], batch_size: int) -> list[list[int]]:
    """The places of prompts of like lengths; of those with images each alone."""
    texts = [i for i, prompt in enumerate(prompts) if set(prompt) == {"tokens"}]
    texts.sort(key=lambda i: prompts[i]["tokens"].shape[1])
    of_texts = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    return of_texts + [[i] for i, prompt in enumerate(prompts) if set(prompt) != {"tokens"}]


def together(
    prompts: Sequence[Batch], continuations: Sequence[Sequence[np.ndarray]], rows: int, config: ModelConfig
) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Prompts as one batch of `rows`, and their continuations [n, B, C] with a mask; padded to whole
    lengths."""
    count = max(map(len, continuations))
    longest = max(len(ids) for several in continuations for ids in several)
    up = lambda n: -(-n // WHOLE) * WHOLE
    if set(prompts[0]) == {"tokens"}:
        filled = [*range(len(prompts)), *[len(prompts) - 1] * (rows - len(prompts))]
        prompts, continuations = [prompts[i] for i in filled], [continuations[i] for i in filled]
        texts = [prompt["tokens"][0] for prompt in prompts]
        width = max(len(ids) for ids in texts)
        width = max(width, min(up(width), config.max_length - up(longest)))
        tokens = np.zeros((len(texts), width), np.int32)
        segments = np.zeros_like(tokens)
        for row, ids in enumerate(texts):
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        batch: Batch = {"tokens": tokens, "segment_ids": segments}
    else:
        batch = prompts[0]
    width = max(longest, min(up(longest), config.max_length - batch["tokens"].shape[1]))
    made = np.zeros((count, len(prompts), width), np.int32)
    mask = np.zeros(made.shape, bool)
    for row, several in enumerate(continuations):
        for i, ids in enumerate(several):
            made[i, row, : len(ids)], mask[i, row, : len(ids)] = ids, True
    return batch, made, mask
