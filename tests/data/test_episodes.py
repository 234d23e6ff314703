"""Episodes: determinism, the curriculum, targets that can be known, disjoint splits, token classes."""

import dataclasses

import numpy as np
import pytest

from jaxlab.data.episode_words import (
    ANSWER_ID,
    FILLER_IDS,
    LABEL_IDS,
    TOPIC_IDS,
    WORDS,
    episode_tokenizer,
)
from jaxlab.data.episodes import SPLITS, EpisodesConfig, EpisodesSource, make_batch, stage_at
from jaxlab.errors import ConfigError, UserError

CONFIG = EpisodesConfig()
END = 10**6
"""A step after the curriculum."""
TOPIC_OF = {int(word): topic for topic, words in enumerate(TOPIC_IDS) for word in words}


def demonstrations(tokens, answer=True):
    """(item, label) pairs of a sequence, in plain Python; an item cut off at the end is left out."""
    item, pairs = [], []
    for token in tokens.tolist():
        if token in LABEL_IDS:
            if answer:
                assert item.pop() == ANSWER_ID
            pairs.append((item, token))
            item = []
        else:
            item.append(token)
    return pairs


def majority(item):
    """The topic that most of the item's words are of."""
    topics = [TOPIC_OF[word] for word in item if word in TOPIC_OF]
    return max(set(topics), key=topics.count)


@pytest.mark.parametrize("split", SPLITS)
def test_a_batch_is_a_function_of_its_arguments(split):
    first, again = (make_batch(CONFIG, 3, END, 8, split) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    for seed, step in ((4, END), (3, END + 1)):
        assert not np.array_equal(first["tokens"], make_batch(CONFIG, seed, step, 8, split)["tokens"])


@pytest.mark.parametrize("step", [0, CONFIG.all_words_from, CONFIG.longer_from[2], CONFIG.answer_from, END])
def test_training_sequences_are_full_and_targets_are_labels_seen_before(step):
    batch = make_batch(CONFIG, 0, step, 64)
    assert batch["tokens"].shape == (64, CONFIG.sequence_length)
    assert batch["tokens"].dtype == np.int32
    assert batch["tokens"].min() > 0
    assert batch["tokens"].max() < len(WORDS)
    for tokens, mask in zip(batch["tokens"], batch["loss_mask"], strict=True):
        seen: set[int] = set()
        for token, is_target in zip(tokens.tolist(), mask.tolist(), strict=True):
            assert is_target == (token in LABEL_IDS and token in seen)
            seen.add(token)


def test_label_words_mean_one_topic_in_an_episode_and_another_in_the_next():
    meanings: dict[int, set[int]] = {}
    for tokens in make_batch(CONFIG, 0, END, 64)["tokens"]:
        episode: dict[int, int] = {}
        for item, label in demonstrations(tokens):
            assert episode.setdefault(label, majority(item)) == majority(item)
        assert len(set(episode.values())) == len(episode)  # no two words for one topic
        for label, topic in episode.items():
            meanings.setdefault(label, set()).add(topic)
    assert min(len(topics) for topics in meanings.values()) > 1


def test_the_curriculum_grows_the_task():
    at = lambda step: [
        pair
        for row in make_batch(CONFIG, 0, step, 64)["tokens"]
        for pair in demonstrations(row, stage_at(CONFIG, step).answer)
    ]
    start, words, long, end = (at(s) for s in (0, CONFIG.all_words_from, CONFIG.longer_from[1], END))
    assert {len(item) for item, _ in start} == {1} == {len(item) for item, _ in words}
    assert len({item[0] for item, _ in start}) == len(TOPIC_IDS)
    assert {item[0] for item, _ in words} == set(TOPIC_OF)
    assert {len(item) for item, _ in long} == {1, 2, 3}
    assert {len(item) for item, _ in end} == set(range(1, CONFIG.item_length + 1))
    fillers = lambda pairs: any(word in FILLER_IDS for item, _ in pairs for word in item)
    assert fillers(end)
    assert not fillers(words)


def test_items_hold_a_majority_of_their_topic_and_sometimes_another():
    rows = make_batch(CONFIG, 0, END, 128, "test")["tokens"]
    pairs = [pair for row in rows for pair in demonstrations(row)]
    foreign = 0
    for item, _ in pairs:
        topics = [TOPIC_OF[word] for word in item if word in TOPIC_OF]
        assert len(item) == CONFIG.item_length
        assert topics.count(majority(item)) >= np.ceil(CONFIG.topic_fraction * len(item))
        assert topics.count(majority(item)) >= len(topics) - 1
        foreign += len(set(topics)) > 1
    assert abs(foreign / len(pairs) - CONFIG.mixed) < 0.1


def test_no_item_of_two_topic_words_is_in_two_splits():
    items: dict[str, set] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for step in range(4):
            for tokens in make_batch(CONFIG, step, END, 128, split)["tokens"]:
                for item, _ in demonstrations(tokens):
                    own = [word for word in item if TOPIC_OF.get(word) == majority(item)]
                    if len(own) >= 2:
                        items[split].add(tuple(sorted(own)))
    assert min(len(found) for found in items.values()) > 100
    assert items["train"].isdisjoint(items["test"])
    assert items["train"].isdisjoint(items["validation"])
    assert items["validation"].isdisjoint(items["test"])


@pytest.mark.parametrize(("classes", "shots"), [(2, 1), (4, 1), (3, 4)])
def test_prompts_carry_what_the_analyses_need(classes, shots):
    config = dataclasses.replace(CONFIG, classes=classes, shots=shots)
    batch = make_batch(config, 0, 0, 64, "test")
    rows = np.arange(64)
    assert batch["tokens"].shape == batch["classes"].shape == (64, config.prompt_length)
    np.testing.assert_array_equal(np.sum(batch["loss_mask"], 1), 1)
    np.testing.assert_array_equal(batch["tokens"][rows, batch["positions"]], ANSWER_ID)
    np.testing.assert_array_equal(batch["classes"][rows, batch["positions"]], 2)
    answers = batch["tokens"][rows, batch["positions"] + 1]
    np.testing.assert_array_equal(batch["label_tokens"][rows, batch["labels"]], answers)
    assert np.all(batch["loss_mask"][rows, batch["positions"] + 1])
    for tokens, kinds, names in zip(batch["tokens"], batch["classes"], batch["label_tokens"], strict=True):
        shown = tokens[kinds == 1]
        assert sorted(shown.tolist()) == sorted(names.tolist() * shots)
        assert kinds.tolist()[-2:] == [2, -1]
        pairs = demonstrations(tokens)
        meaning = {label: majority(item) for item, label in pairs[:-1]}
        assert meaning[pairs[-1][1]] == majority(pairs[-1][0])
    assert len(set(batch["labels"].tolist())) == classes


def test_held_out_batches_are_the_same_every_time_and_differ_by_split():
    source = EpisodesSource(CONFIG)
    first, again = (list(source.held_out_batches(4, 3)) for _ in range(2))
    assert len(first) == 3
    assert set(first[0]) == {"tokens", "loss_mask"}
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
    test = next(source.held_out_batches(4, 1, "test"))
    assert not np.array_equal(first[0]["tokens"], test["tokens"])
    assert source.identity != EpisodesSource(dataclasses.replace(CONFIG, mixed=0.4)).identity


def test_the_tokenizer_reads_and_writes_prompts():
    tokenizer = episode_tokenizer()
    assert tokenizer.get_vocab_size() == len(WORDS) == len(set(WORDS))
    tokens = make_batch(CONFIG, 0, 0, 1, "test")["tokens"][0].tolist()
    text = tokenizer.decode(tokens)
    assert text == " ".join(WORDS[token] for token in tokens)
    assert tokenizer.encode(text).ids == tokens
    assert tokenizer.encode("unheard of").ids == [0, 0]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"min_classes": 5}, "min_classes"),
        ({"classes": 1}, "classes"),
        ({"shots": 0}, "shots"),
        ({"mixed": 1.5}, "mixed"),
        ({"longer_from": (5, 4)}, "longer_from"),
        ({"sequence_length": 8}, "sequence_length"),
    ],
)
def test_impossible_settings_are_refused(values, key):
    with pytest.raises(ConfigError) as caught:
        EpisodesConfig(**values)
    assert caught.value.key == key


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="no split 'dev'"):
        make_batch(CONFIG, 0, 0, 2, "dev")
