"""Lists of chosen blocks and how alike those of neighbours are, by hand."""

import dataclasses

import numpy as np
import pytest

from jaxlab.evaluation.chosen_blocks import decoding_reads, describe_chosen_blocks
from jaxlab.models import ModelConfig, NSAConfig

# Blocks of two tokens, three to read: the first, the query's own, and one free.
NSA = NSAConfig(block_len=2, stride=2, block_size=2, num_blocks=3, num_init=1, num_local=1)


def rows(free):
    """[T, 3]: the first block, the query's own and its free one, then -1."""
    found = [sorted({0, t // 2, block} - {-1}) for t, block in enumerate(free)]
    return np.array([(blocks + [-1] * 3)[:3] for blocks in found], np.int32)


def test_lists():
    chosen = np.stack([rows([-1, -1, -1, -1, 1, 1, 1, 2, 3, 1]), rows([-1, -1, -1, -1, 1, 1, 2, 2, 2, 2])])[
        None
    ]
    told = describe_chosen_blocks(chosen, NSA)
    assert (told["length"], told["block_size"]) == (10, 2)
    first, second = told["layers"]
    assert (first["layer"], first["group"], second["group"]) == (0, 0, 1)
    assert first["queries"] == list(range(10))
    assert first["chosen"][0] == [0]
    assert first["chosen"][3] == [0, 1]
    assert first["chosen"][9] == [0, 1, 4]


def test_overlap_counts_free_blocks_of_queries_with_a_choice():
    # Blocks 0..3 can be read whole up to query 5; from query 6 on there is a choice: 1, 2 or (from 8) 3.
    told = describe_chosen_blocks(rows([-1, -1, -1, -1, 1, 1, 1, 2, 3, 1])[None, None], NSA)
    # 6: block 1, which query 5 read; 7: block 2, which 6 did not; 8: block 3, then 7's own; 9: block 1, no.
    assert told["neighbour_overlap"] == [pytest.approx(2 / 4)]
    assert told["chance_overlap"] == [pytest.approx((1 / 2 + 1 / 2 + 1 / 3 + 1 / 3) / 4)]


def test_without_a_choice_there_is_no_overlap():
    told = describe_chosen_blocks(np.zeros((2, 1, 6, 3), np.int32), NSA)
    assert told["neighbour_overlap"] == told["chance_overlap"] == [None, None]


def test_long_sequences_list_some_queries():
    told = describe_chosen_blocks(np.zeros((1, 1, 96, 3), np.int32), NSA)
    assert told["layers"][0]["queries"] == list(range(0, 96, 3))


def test_what_a_decoded_token_reads():
    """Three layers of two key/value heads of 8 and 4 numbers in float32, after 64 and 128 tokens."""
    config = ModelConfig(
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        value_head_dim=4,
        attention=dataclasses.replace(NSA, block_len=8, stride=4, block_size=8, num_blocks=3, window=16),
    )
    first, second, *_, last = decoding_reads(config, 64)
    of_token = 3 * 2 * 12 * 4
    assert first == {
        "length": 64,
        "nsa_tokens": 16 + 24 + 16,
        "dense_tokens": 64,
        "nsa_bytes": 56 * of_token,
        "dense_bytes": 64 * of_token,
    }
    assert (second["length"], second["nsa_tokens"]) == (128, 32 + 24 + 16)
    assert last["length"] == 2048
