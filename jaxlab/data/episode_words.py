"""The vocabulary of in-context learning episodes: topics that make classes, fillers, and label words."""

import functools

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

UNKNOWN, ANSWER = "<unk>", ":"
TOPICS = {
    "animals": ("horse", "tiger", "rabbit", "eagle", "whale"),
    "food": ("bread", "cheese", "soup", "apple", "rice"),
    "weather": ("rain", "snow", "storm", "cloud", "wind"),
    "music": ("piano", "violin", "drum", "song", "flute"),
    "clothes": ("shirt", "coat", "shoe", "hat", "scarf"),
    "tools": ("hammer", "saw", "drill", "wrench", "nail"),
    "body": ("hand", "knee", "elbow", "shoulder", "nose"),
    "transport": ("train", "ship", "bicycle", "truck", "plane"),
}
FILLERS = ("the", "a", "my", "this", "some", "near", "with", "very", "quite", "old")
LABELS = (
    "blick",
    "dax",
    "wug",
    "toma",
    "zup",
    "fep",
    "kiv",
    "lorp",
    "mib",
    "narg",
    "plim",
    "quon",
    "rask",
    "snib",
    "tave",
    "ulp",
    "vock",
    "wuff",
    "yarb",
    "zelt",
    "gorp",
    "hask",
    "jeb",
    "crun",
)
"""Words without a meaning: what they stand for is drawn anew in every episode."""

WORDS = (UNKNOWN, ANSWER, *(word for words in TOPICS.values() for word in words), *FILLERS, *LABELS)
"""Every token; its place is its id."""
WORDS_PER_TOPIC = len(TOPICS["animals"])
ANSWER_ID = WORDS.index(ANSWER)
TOPIC_IDS = np.array([[WORDS.index(word) for word in words] for words in TOPICS.values()], np.int32)
FILLER_IDS = np.array([WORDS.index(word) for word in FILLERS], np.int32)
LABEL_IDS = np.array([WORDS.index(word) for word in LABELS], np.int32)


@functools.cache
def episode_tokenizer() -> Tokenizer:
    """One token for every word; words are separated by spaces."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer
