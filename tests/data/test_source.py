"""Whether data fits a model, before a gather past the end of a table goes unnoticed."""

import email
import typing
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from jaxlab.data import DataSet, DocumentsConfig, ImageChatsConfig
from jaxlab.data.source import (
    DataConfig,
    batch_shapes,
    check_all_tokens,
    check_fits,
    check_same_words,
    first_held_out,
    make_source,
)
from jaxlab.errors import UserError
from tests.models.tiny import make_config


def batch(length=4, images=None):
    tokens = {"tokens": jax.ShapeDtypeStruct((2, length), np.int32)}
    shape = None if images is None else jax.ShapeDtypeStruct((2, 1, *images), np.float32)
    return tokens if shape is None else {**tokens, "images": shape}


def test_what_fits():
    check_fits(batch(24), make_config())
    check_fits(batch(images=(4, 4, 2)), make_config("vision"))


@pytest.mark.parametrize(
    ("data", "variant", "message"),
    [
        (batch(25), "rotary", "sequences of 25 tokens exceed the model's max_length 24"),
        (batch(images=(4, 4, 2)), "rotary", "the model has no vision"),
        (batch(images=(8, 8, 1)), "vision", r"images of \(8, 8, 1\), the model takes \(4, 4, 2\)"),
    ],
)
def test_what_does_not_fit(data, variant, message):
    with pytest.raises(UserError, match=message):
        check_fits(data, make_config(variant))


def words(*names):
    return Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))


def test_words_of_a_model_must_mean_the_same_in_the_data():
    check_same_words(None, None, "model")
    check_same_words(words("a", "b"), words("a", "b"), "model")
    check_same_words(words("a", "b"), words("a", "b", "c"), "model")  # the data may know more
    with pytest.raises(UserError, match="model: 'b' is token 1 of the model and 2 of the data"):
        check_same_words(words("a", "b"), words("a", "c", "b"), "model")
    with pytest.raises(UserError, match="'b' is token 1 of the model and None of the data"):
        check_same_words(words("a", "b"), words("a"), "model")
    with pytest.raises(UserError, match="the model reads bytes, the data holds words"):
        check_same_words(None, words("a"), "model")


OF_FILES = (DocumentsConfig, ImageChatsConfig)  # the second is tried in test_image_chats.py
KINDS = [kind() for kind in typing.get_args(DataConfig) if kind not in OF_FILES]
FILES = DocumentsConfig(
    sources=(DataSet(f"{Path(email.__file__).parent}/*.py"),), sequence_length=64, held_out=0.5
)


@pytest.mark.parametrize("config", [*KINDS, FILES], ids=lambda c: c.kind)
def test_every_kind_makes_batches_of_one_form(config, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAXLAB_DATA_CACHE", str(tmp_path_factory.getbasetemp() / "data"))
    source = make_source(config)
    assert len(source.identity) == 64
    training, held_out = source.batch(0, 0, 4), first_held_out(source, 4, "test")
    for found in (training, held_out):
        assert found["tokens"].dtype == np.int32
        assert 0 <= found["tokens"].max() <= source.largest_token
        assert found["tokens"].shape[0] == 4
        assert found["loss_mask"].shape == found["tokens"].shape
        assert found["loss_mask"].any(axis=1).all()
        assert not found["loss_mask"][:, 0].any()
    shapes = lambda found: {name: (x.shape, x.dtype) for name, x in found.items()}
    for split, found in (("train", training), ("test", held_out)):
        assert shapes(batch_shapes(source, 4, split)) == shapes(found)
    assert batch_shapes(source, 10**9)["tokens"].shape[0] == 10**9
    check_all_tokens(source, make_config(vocab_size=source.largest_token + 1))
    with pytest.raises(UserError, match=f"holds token {source.largest_token}.* vocab_size is"):
        check_all_tokens(source, make_config(vocab_size=source.largest_token))
    for name, values in make_source(config).batch(0, 0, 4).items():
        np.testing.assert_array_equal(values, training[name])
    for rows in (slice(0, 1), slice(1, 4)):  # what two processes build
        for whole, part in (
            (training, source.batch(0, 0, 4, rows)),
            (held_out, next(iter(source.held_out_batches(4, 1, "test", rows)))),
        ):
            assert part.keys() == whole.keys()
            for name, values in part.items():
                np.testing.assert_array_equal(values, whole[name][rows])
