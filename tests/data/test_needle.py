"""Needles read back in plain Python: one fact only tells the answer, and it is at the depth that is said."""

import dataclasses

import numpy as np
import pytest

from jaxlab.data.needle import FACT, QUESTION, SPLITS, NeedleConfig, NeedleSource, make_batch
from jaxlab.data.needle_words import COLOURS, SENTENCE, THINGS, VALUES, WORDS, needle_tokenizer
from jaxlab.errors import ConfigError, UserError

CONFIG = NeedleConfig(sequence_length=107, needles=5, min_needles=2, questions=3, depths=4)


def read(tokens):
    """The facts of a row by key, each with the place of its value; and the questions with their answers."""
    words, facts, questions = [WORDS[token] for token in tokens], {}, []
    for i, word in enumerate(words):
        if word == "note":
            key, value = tuple(words[i + 1 : i + 3]), words[i + 3]
            assert words[i + 4] == "."
            assert key not in facts
            facts[key] = (value, i + 3)
        if word == "recall":
            questions.append((tuple(words[i + 1 : i + 3]), words[i + 3], i + 3))
    return facts, questions


@pytest.mark.parametrize("split", SPLITS)
def test_a_batch_is_a_function_of_its_arguments(split):
    first, again = (make_batch(CONFIG, 3, 5, 8, split) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    for seed, step in ((4, 5), (3, 6)):
        assert not np.array_equal(first["tokens"], make_batch(CONFIG, seed, step, 8, split)["tokens"])


@pytest.mark.parametrize(("split", "asked"), [("train", 3), ("validation", 1), ("test", 1)])
def test_the_answer_is_in_one_fact_and_nowhere_else(split, asked):
    batch = make_batch(CONFIG, 0, 0, 64, split)
    assert batch["tokens"].shape == (64, 107)
    assert batch["tokens"].dtype == np.int32
    counts = set()
    for tokens, mask in zip(batch["tokens"].tolist(), batch["loss_mask"], strict=True):
        facts, questions = read(tokens)
        counts.add(len(facts))
        assert len({value for value, _ in facts.values()}) == len(facts)
        assert len(questions) == asked
        for key, answer, _ in questions:
            assert facts[key][0] == answer
            # In the fact and as the answer, however often it is asked for.
            assert tokens.count(WORDS.index(answer)) == 1 + [key for key, _, _ in questions].count(key)
        assert np.flatnonzero(mask).tolist() == [place for _, _, place in questions]
        assert questions[-1][2] == 106
    assert counts == ({2, 3, 4, 5} if split == "train" else {5})


def test_held_out_facts_stand_at_every_depth_in_turn():
    batches = [make_batch(CONFIG, 0, step, 6, "test") for step in range(2)]
    tokens, depths, positions = (
        np.concatenate([b[name] for b in batches]) for name in ("tokens", "needle_depths", "needle_positions")
    )
    assert depths.tolist() == [0, 1, 2, 3] * 3
    for row, position in zip(tokens, positions, strict=True):
        facts, [(key, _, _)] = read(row)
        assert facts[key][1] == position
    # 103 tokens before the question hold 20 places, the first after three spare words: 0, 6.33, 12.67, 19.
    assert positions[:4].tolist() == [3 + place * FACT + 3 for place in (0, 6, 13, 19)]


def test_facts_of_training_keep_to_their_depths_and_go_everywhere_within():
    config = dataclasses.replace(CONFIG, min_depth=0.25, max_depth=0.6, needles=3)
    places = {place for row in make_batch(config, 0, 0, 64)["tokens"] for _, place in read(row)[0].values()}
    # 95 tokens hold 19 places without a rest; of the last, 18, a quarter is 4.5 and 0.6 is 10.8.
    assert places == {place * FACT + 3 for place in range(4, 12)}


def test_no_key_is_in_two_splits_and_every_word_is_trained_on():
    keys = {
        split: {
            key
            for step in range(8)
            for row in make_batch(CONFIG, 0, step, 64, split)["tokens"]
            for key in read(row)[0]
        }
        for split in SPLITS
    }
    assert [len(keys[split]) for split in SPLITS] == [240, 80, 80]
    assert len(set().union(*keys.values())) == 400
    assert {word for key in keys["train"] for word in key} == {*COLOURS, *THINGS}
    values = {v for row in make_batch(CONFIG, 0, 0, 64)["tokens"] for v, _ in read(row)[0].values()}
    assert values == set(VALUES)


def test_filler_is_sentences():
    batch = make_batch(NeedleConfig(sequence_length=107, needles=1, questions=1), 0, 0, 16)
    phases = set()
    for tokens in batch["tokens"]:
        [(_, place)] = read(tokens)[0].values()
        words = [WORDS[token] for token in tokens[:-QUESTION]]
        fits = [
            all(
                word in SENTENCE[(i + phase) % len(SENTENCE)]
                for i, word in enumerate(words)
                if not place - 3 <= i <= place + 1
            )
            for phase in range(len(SENTENCE))
        ]
        assert sum(fits) == 1
        phases.add(fits.index(True))
    assert len(phases) > 3


def test_a_share_of_the_filler_can_be_targets():
    config = dataclasses.replace(CONFIG, filler_targets=0.1)
    some, answers = make_batch(config, 0, 0, 64)["loss_mask"], make_batch(CONFIG, 0, 0, 64)["loss_mask"]
    assert (some[answers]).all()
    assert not some[:, 0].any()
    assert abs(some[~answers].mean() - 0.1) < 0.02
    held_out = make_batch(config, 0, 0, 64, "test")["loss_mask"]
    assert (held_out.sum(axis=1) == 1).all()


def test_the_source_and_its_words():
    source = NeedleSource(CONFIG)
    first, again = (list(source.held_out_batches(4, 3)) for _ in range(2))
    assert len(first) == 3
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
    assert not np.array_equal(first[0]["tokens"], next(source.held_out_batches(4, 1, "test"))["tokens"])
    assert source.identity != NeedleSource(dataclasses.replace(CONFIG, needles=4)).identity
    tokenizer = needle_tokenizer()
    assert tokenizer.get_vocab_size() == len(WORDS) == len(set(WORDS))
    groups = [{word for words in SENTENCE for word in words}, {*COLOURS}, {*THINGS}, {*VALUES}]
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(WORDS) - 3
    tokens = first[0]["tokens"][0].tolist()
    assert tokenizer.encode(tokenizer.decode(tokens)).ids == tokens


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"needles": 0}, "needles"),
        ({"needles": 33}, "needles"),
        ({"questions": 0}, "questions"),
        ({"min_needles": 0}, "min_needles"),
        ({"min_needles": 5}, "min_needles"),
        ({"min_depth": 0.7, "max_depth": 0.6}, "min_depth"),
        ({"max_depth": 1.1}, "min_depth"),
        ({"depths": 0}, "depths"),
        ({"filler_targets": 1.5}, "filler_targets"),
        ({"sequence_length": 51}, "sequence_length"),
        ({"sequence_length": 2}, "sequence_length"),
        ({"min_depth": 0.5, "max_depth": 0.51}, "sequence_length"),
    ],
)
def test_impossible_settings_are_refused(values, key):
    with pytest.raises(ConfigError) as caught:
        NeedleConfig(**values)
    assert caught.value.key == key
    assert NeedleConfig(sequence_length=52)  # four facts of five tokens, eight questions of four


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="no split 'dev'"):
        make_batch(CONFIG, 0, 0, 2, "dev")
