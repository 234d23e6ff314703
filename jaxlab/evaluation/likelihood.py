"""How likely continuations of prompts are, in batches of like lengths."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlab.models import Batch, ModelConfig, Params, continuation_log_probs, shapes_of, stack_rows, to_host

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
      prompts: one row each, not prepared.
      continuations: of each prompt at least one, token ids int32[C], C >= 1.
    """
    found: dict[int, Likelihood] = {}
    for members, rows in groups(prompts, batch_size):
        batch, tokens, mask = together(
            [prompts[i] for i in members], [continuations[i] for i in members], rows, config
        )
        log_p, likeliest, _ = continuation_log_probs(params, batch, tokens, mask, config)
        sums = np.asarray(to_host(log_p), np.float64).sum(2)
        greedy = np.all(to_host(likeliest) | ~mask, axis=2)
        for row, i in enumerate(members):
            count = len(continuations[i])
            found[i] = Likelihood(sums[:count, row], greedy[:count, row])
    return [found[i] for i in range(len(prompts))]


class Group(NamedTuple):
    """Prompts that are read together."""

    members: list[int]
    """Their places."""
    rows: int
    """Of their batch: as many as those of other groups like it have."""


def groups(prompts: Sequence[Batch], batch_size: int) -> list[Group]:
    """Prompts of like lengths, with images of one shape.

    Args:
      prompts: one row each, not prepared.
    """
    kinds: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        kinds.setdefault(shapes_of(prompt), []).append(i)
    found = []
    for members in kinds.values():
        members.sort(key=lambda i: prompts[i]["tokens"].shape[1])
        rows = min(batch_size, len(members))
        found += [Group(members[i : i + rows], rows) for i in range(0, len(members), rows)]
    return found


def together(
    prompts: Sequence[Batch], continuations: Sequence[Sequence[np.ndarray]], rows: int, config: ModelConfig
) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Prompts as one batch of `rows`, and their continuations [n, B, C] with a mask; padded to whole
    lengths."""
    count = max(map(len, continuations))
    longest = max(len(ids) for several in continuations for ids in several)
    up = lambda n: -(-n // WHOLE) * WHOLE
    filled = [*range(len(prompts)), *[len(prompts) - 1] * (rows - len(prompts))]
    prompts, continuations = [prompts[i] for i in filled], [continuations[i] for i in filled]
    width = max(prompt["tokens"].shape[1] for prompt in prompts)
    width = max(width, min(up(width), config.max_length - up(longest)))
    batch = stack_rows(prompts, width, config)
    width = max(longest, min(up(longest), config.max_length - batch["tokens"].shape[1]))
    made = np.zeros((count, len(prompts), width), np.int32)
    mask = np.zeros(made.shape, bool)
    for row, several in enumerate(continuations):
        for i, ids in enumerate(several):
            made[i, row, : len(ids)], mask[i, row, : len(ids)] = ids, True
    return batch, made, mask
