"""The vocabulary of needles in filler: sentences of filler, and the keys and values of facts."""

import functools

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

UNKNOWN, NOTE, RECALL, STOP = "<unk>", "note", "recall", "."
_ARTICLES = ("the", "a", "this", "that", "my", "our", "her", "his")
_NOUNS = ("clock", "door", "garden", "letter", "table", "road", "window", "lamp")
SENTENCE = (
    _ARTICLES,
    ("old", "small", "quiet", "cold", "bright", "heavy", "plain", "empty"),
    _NOUNS,
    ("waits", "stands", "rests", "stays", "lies", "sits", "leans", "hangs"),
    ("near", "behind", "under", "beside", "above", "before", "past", "against"),
    _ARTICLES,
    _NOUNS,
    (STOP,) * 8,
)
"""The words of each place of a filler sentence."""
COLOURS = (
    "red",
    "blue",
    "green",
    "white",
    "black",
    "brown",
    "grey",
    "pink",
    "gold",
    "silver",
    "purple",
    "orange",
    "crimson",
    "violet",
    "amber",
    "teal",
    "ivory",
    "scarlet",
    "copper",
    "indigo",
)
THINGS = (
    "anchor",
    "basket",
    "candle",
    "drum",
    "engine",
    "feather",
    "glove",
    "harp",
    "kettle",
    "ladder",
    "mirror",
    "needle",
    "oven",
    "pencil",
    "quilt",
    "ribbon",
    "saddle",
    "teapot",
    "umbrella",
    "violin",
)
VALUES = (
    "birch",
    "cedar",
    "elm",
    "fir",
    "hazel",
    "juniper",
    "larch",
    "maple",
    "oak",
    "pine",
    "rowan",
    "spruce",
    "willow",
    "yew",
    "alder",
    "ash",
    "beech",
    "cypress",
    "ebony",
    "laurel",
    "linden",
    "myrtle",
    "olive",
    "poplar",
    "sorrel",
    "tamarind",
    "walnut",
    "acacia",
    "banyan",
    "cherry",
    "hickory",
    "sequoia",
)

_SPOKEN = dict.fromkeys((*(word for words in SENTENCE for word in words), *COLOURS, *THINGS, *VALUES))
WORDS = (UNKNOWN, NOTE, RECALL, *_SPOKEN)
"""Every token; its place is its id."""
NOTE_ID, RECALL_ID, STOP_ID = (WORDS.index(word) for word in (NOTE, RECALL, STOP))
FILLER_IDS = np.array([[WORDS.index(word) for word in words] for words in SENTENCE], np.int32)
COLOUR_IDS, THING_IDS, VALUE_IDS = (
    np.array([WORDS.index(word) for word in words], np.int32) for words in (COLOURS, THINGS, VALUES)
)


@functools.cache
def needle_tokenizer() -> Tokenizer:
    """One token for every word; words are separated by spaces."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer
