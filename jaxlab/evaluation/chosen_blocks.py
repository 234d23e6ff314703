"""What Native Sparse Attention chose to read in one sequence, in numbers that a page can draw."""

from typing import Any

import numpy as np
from jaxtyping import Int

from jaxlab.models import ModelConfig, NSAConfig
from kernels_pallas.nsa import bytes_per_decoded_token

QUERIES = 32
"""So many queries, evenly spaced, are listed."""


def describe_chosen_blocks(chosen: Int[np.ndarray, "L Hkv T n"], nsa: NSAConfig) -> dict[str, Any]:
    """The blocks of a sequence's queries, listed for some queries, and how alike they are for neighbours.

    "layers" has an entry for each layer and key/value group: "queries", positions T / 32 apart, and "chosen",
    the blocks of each of them in ascending order. "neighbour_overlap" has a number for each layer: the share
    of a query's freely chosen blocks that the query before it reads too, averaged over groups and over the
    queries that had a choice, None where none had one. "chance_overlap" is the same for a choice by lot.
    """
    layers, groups, length, _ = chosen.shape
    queries = list(range(0, length, max(1, length // QUERIES)))
    listed = [
        {
            "layer": layer,
            "group": group,
            "queries": queries,
            "chosen": [sorted(int(j) for j in chosen[layer, group, t] if j >= 0) for t in queries],
        }
        for layer in range(layers)
        for group in range(groups)
    ]
    overlaps = [_overlap(chosen[layer], nsa) for layer in range(layers)]
    return {
        "length": length,
        "block_size": nsa.block_size,
        "layers": listed,
        "neighbour_overlap": [seen for seen, _ in overlaps],
        "chance_overlap": [chance for _, chance in overlaps],
    }


def decoding_reads(config: ModelConfig, length: int) -> list[dict[str, int]]:
    """Tokens and bytes that a decoded token reads of its cache, all layers together, beside dense attention:
    after `length` tokens, and after 2, 4 ... 32 times as many."""
    n = config.nsa
    rows = []
    for tokens in (length << i for i in range(6)):
        traffic = bytes_per_decoded_token(
            tokens,
            kv_heads=config.kv_heads,
            key_dim=config.key_dim,
            value_dim=config.value_dim,
            itemsize=np.dtype(config.compute_dtype).itemsize,
            stride=n.stride,
            block_size=n.block_size,
            num_blocks=n.num_blocks,
            window=n.window,
            branches=n.branches,
        )
        of_layer = traffic._asdict()
        all_layers = {k: v * config.num_layers if k.endswith("bytes") else v for k, v in of_layer.items()}
        rows.append({"length": tokens, **all_layers})
    return rows


def _overlap(chosen: Int[np.ndarray, "Hkv T n"], nsa: NSAConfig) -> tuple[float | None, float | None]:
    """The mean share of free blocks that the query before reads too, and what it would be by lot."""
    seen, chance = [], []
    for t in range(1, chosen.shape[1]):
        own = t // nsa.block_size
        candidates = range(nsa.num_init, own - nsa.num_local + 1)
        if own + 1 <= nsa.num_blocks:  # everything before it fits: there is nothing to choose
            continue
        for blocks, before in zip(chosen[:, t], chosen[:, t - 1], strict=True):
            free = set(blocks.tolist()) & set(candidates)
            if free:
                seen.append(len(free & set(before.tolist())) / len(free))
                chance.append(len(free) / len(candidates))
    return (float(np.mean(seen)), float(np.mean(chance))) if seen else (None, None)
