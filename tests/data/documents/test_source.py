"""Batches of documents: what they hold, where they come from, in which order, and that nothing is lost."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.data import BatchReader, DataSet, DocumentsConfig, DocumentsSource, batch_shapes, make_source
from jaxlab.data.documents import preparing
from jaxlab.data.documents.stand_in import StandIn
from jaxlab.errors import UserError
from jaxlab.losses import target_mask
from tests.data.documents.small import documents, find_model, source, write_lines


def some_texts(count=60, seed=0, mark="a"):
    rng = np.random.default_rng(seed)
    return [
        f"{mark}{i}:" + "".join(map(chr, rng.integers(97, 123, rng.integers(1, 40)))) for i in range(count)
    ]


def one_pass(found, split="train"):
    """The rows of one pass over the first data set."""
    rows = found._open_parts(split)[0].pieces.row_ends.size
    return found.batch(0, 0, rows)


def pieces(batch):
    """(tokens of a piece, whether it begins the row) of all rows."""
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for number in range(1, segments.max() + 1):
            yield tokens[segments == number].tolist()


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_a_pass_holds_every_token_of_every_document_once(tmp_path, packing):
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in some_texts()])
    found = source(path, packing=packing)
    batch = one_pass(found)
    kept = documents(found)
    assert len(kept) == 60
    joined = sorted(token for tokens in kept for token in tokens)
    assert sorted(batch["tokens"][batch["segment_ids"] > 0].tolist()) == joined
    # Pieces are stretches of documents, and short documents are whole under best fit.
    there = list(pieces(batch))
    as_text = ["".join(map(chr, tokens)) for tokens in kept]
    assert all(any("".join(map(chr, piece)) in text for text in as_text) for piece in there)
    if packing == "best_fit":
        assert all(tokens in there for tokens in kept if len(tokens) <= 16)
    # The targets are all tokens of a piece but its first, and nothing beside.
    segments = batch["segment_ids"]
    first = np.diff(segments, axis=1, prepend=0) != 0
    np.testing.assert_array_equal(batch["loss_mask"], (segments > 0) & ~first)
    np.testing.assert_array_equal(target_mask(jax.tree.map(jnp.asarray, batch)), batch["loss_mask"][:, 1:])
    assert (batch["tokens"][segments == 0] == 0).all()
    assert batch["source_ids"].tolist() == [0] * len(segments)


def test_attending_across_documents_is_one_text(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in some_texts()])
    found = source(path, packing="concatenate", attend_across=True)
    batch = one_pass(found)
    assert "segment_ids" not in batch
    text = [token for tokens in documents(found) for token in tokens]
    expected = np.asarray(text[: len(text) // 16 * 16]).reshape(-1, 16)
    assert sorted(map(bytes, batch["tokens"].astype(np.uint8))) == sorted(
        map(bytes, expected.astype(np.uint8))
    )
    assert batch["loss_mask"][:, 1:].all()
    assert not batch["loss_mask"][:, 0].any()
    assert found.describe()["train"]["a.jsonl"]["tokens_left_over"] == len(text) % 16


def mixture(tmp_path, **changes):
    sets = []
    for number, (name, weight) in enumerate((("a", 0.7), ("b", 0.3))):
        rows = [{"text": text} for text in some_texts(80, number, name)]
        path = write_lines(tmp_path / f"{name}.jsonl", rows)
        sets.append(DataSet(str(path), weight=weight, name=name))
    config = DocumentsConfig(sources=tuple(sets), sequence_length=16, **{"held_out": 0.3, **changes})
    return DocumentsSource(config, find_model)


def test_a_batch_is_a_function_of_seed_and_step_whoever_builds_its_rows(tmp_path):
    found, again = mixture(tmp_path), mixture(tmp_path)
    assert again.prepared is False
    for step in (0, 1, 17, 10_000):
        whole = found.batch(3, step, 10)
        parts = [again.batch(3, step, 10, rows) for rows in (slice(0, 5), slice(5, 10))]  # two processes
        for name, values in whole.items():
            np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))
        assert np.bincount(whole["source_ids"]).tolist() == [7, 3]
    assert again.prepared
    assert (found.batch(4, 0, 10)["tokens"] != found.batch(3, 0, 10)["tokens"]).any()
    first, second = (
        mixture(tmp_path).batch(3, step, 10)["tokens"].tolist() for step in (0, 1)
    )  # no step before is needed
    assert first == found.batch(3, 0, 10)["tokens"].tolist()
    assert first != second


def test_reading_ahead_gives_the_same_batches(tmp_path):
    found = mixture(tmp_path)
    for ahead in (0, 3):
        reader = BatchReader(found, 5, 4, rows=slice(1, 3), ahead=ahead)
        for step in (0, 1, 2, 9, 10, 1):  # batches passed by, and back
            for name, values in reader.read(step).items():
                np.testing.assert_array_equal(values, found.batch(5, step, 4)[name][1:3])
        reader.close()


def test_reading_ahead_says_what_the_source_says(tmp_path):
    found = mixture(tmp_path, held_out=0.999)
    reader = BatchReader(found, 5, 4)
    with pytest.raises(UserError, match="0 rows of 16 tokens to train on"):
        reader.read(0)
    reader.close()


def texts_of(batches):
    return {bytes(piece).decode() for batch in batches for piece in pieces(batch)}


def test_held_out_documents_are_never_trained_on(tmp_path):
    rows = [{"text": text[:12]} for text in some_texts(200)]
    path = write_lines(tmp_path / "a.jsonl", [*rows, *rows])  # every document twice: on one side both
    found = source(path, held_out=0.4)
    train = texts_of([one_pass(found)])
    held = {split: texts_of(found.held_out_batches(1, 10**6, split)) for split in ("validation", "test")}
    assert not train & (held["validation"] | held["test"])
    assert not held["validation"] & held["test"]
    assert train | held["validation"] | held["test"] == {row["text"] + "\0" for row in rows}
    assert 20 < len(held["validation"]) < 60
    assert 20 < len(held["test"]) < 60
    assert found.held_out_rows(4, "test") == 4
    assert found.held_out_rows(10**6, "test") == 0
    once, twice = ([b["tokens"].tolist() for b in found.held_out_batches(2, 9)] for _ in range(2))
    assert once == twice


def test_splits_from_files_of_their_own(tmp_path):
    write_lines(tmp_path / "v.jsonl", [{"text": f"v{i}"} for i in range(9)])
    write_lines(tmp_path / "a.jsonl", [{"text": text[:12]} for text in some_texts(100)])
    found = source(tmp_path / "a.jsonl", validation=(DataSet(str(tmp_path / "v.jsonl")),), held_out=0.4)
    assert found.source_names == ("a.jsonl", "v.jsonl")
    validation = list(found.held_out_batches(1, 100))
    assert texts_of(validation) == {f"v{i}\0" for i in range(9)}
    assert {int(b["source_ids"][0]) for b in validation} == {1}
    facts = found.describe()
    assert facts["train"]["a.jsonl"]["documents"] + facts["test"]["a.jsonl"]["documents"] == 100
    assert facts["test"]["a.jsonl"]["documents"] < 40  # half of what is held out
    both = source(
        tmp_path / "a.jsonl", validation=found.config.validation, test=found.config.validation, held_out=0.4
    )
    assert both.describe()["train"]["a.jsonl"]["documents"] == 100


def test_tokens_are_made_once_for_equal_content(tmp_path, cache, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "de"}])
    first = source(path)
    first.prepare()
    made = sorted(cache.glob("tokens/*/*.safetensors"))
    other = tmp_path / "moved" / "b.jsonl"
    other.parent.mkdir()
    path.rename(other)
    monkeypatch.setattr(preparing, "_write", lambda *_: pytest.fail("tokenised again"))
    moved = source(other, sequence_length=8, packing="concatenate")
    moved.prepare()
    assert documents(moved) == documents(first)
    assert sorted(cache.glob("tokens/*/*.safetensors")) == made
    assert source(other).identity != source(other, on={"column": "other"}).identity


def test_changed_content_is_another_identity(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "abc"}])
    first = source(path).identity
    assert source(path).identity == first
    write_lines(path, [{"text": "abd"}])
    assert source(path).identity != first


def test_shards_follow_each_other_and_a_cut_off_run_goes_on(tmp_path, monkeypatch):
    """Stopped after any shard, preparing ends with the same tokens as in one go."""
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in some_texts()])
    monkeypatch.setattr(preparing, "BATCH_ROWS", 7)

    def prepared(stop_after=None):
        found = source(path)
        [[unit]] = found._units.values()
        for old in unit.shards():
            old.unlink()
        flush, made = preparing._flush, []

        def stopping(*arguments, **options):
            flush(*arguments, **options)
            made.append(1)
            if len(made) == stop_after:
                raise KeyboardInterrupt

        for stop in (stopping, flush):
            monkeypatch.setattr(preparing, "_flush", stop)
            try:
                preparing.prepare_units([unit], found.config, found._encoders, find_model, shard_tokens=200)
            except KeyboardInterrupt:
                continue
        return found, len(unit.shards())

    whole, shards = prepared()
    assert shards > 4
    expected = documents(whole)
    for stop_after in range(1, shards):
        again, number = prepared(stop_after)
        assert number == shards
        assert documents(again) == expected
        assert again.counts()["a.jsonl"].rows == 60
    batch, other = one_pass(whole), one_pass(again)
    np.testing.assert_array_equal(batch["tokens"], other["tokens"])


def test_a_damaged_cache_is_one_line_that_says_what_to_remove(tmp_path, cache):
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in some_texts()])
    source(path).prepare()
    [shard] = cache.glob("tokens/*/*.safetensors")
    good = shard.read_bytes()
    for raw in (b"", good[:50], good[:-1], b"x" * len(good)):
        shard.write_bytes(raw)
        with pytest.raises(UserError, match=r"00000\.safetensors") as error:
            one_pass(source(path))
        assert "\n" not in str(error.value)
    shard.write_bytes(good)
    one_pass(source(path))


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXLAB_DATA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"JAXLAB_DATA_CACHE|choose another place"):
        source(path)


def test_shapes_are_known_before_anything_is_tokenised(tmp_path, monkeypatch):
    from jaxlab.data.documents import source as module

    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in some_texts()])
    config = source(path, held_out=0.2).config
    monkeypatch.setattr(module, "GLANCE", 0)
    with pytest.warns(UserWarning, match="not tokenised yet"):
        shapes = batch_shapes(make_source(config, find_model, for_shapes=True), 8)
    assert isinstance(make_source(config, find_model), DocumentsSource)
    found = make_source(config, find_model)
    assert batch_shapes(found, 8) == shapes == batch_shapes(found, 8, "validation")
    monkeypatch.setattr(module, "GLANCE", 1 << 20)
    assert not isinstance(make_source(config, find_model, for_shapes=True), StandIn)  # prepared by now


def test_a_tokenizer_puts_its_tokens_around_and_an_end_after(tmp_path, letters):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}])
    found = source(path, tokenizer=str(letters))
    found.prepare()
    words = found.tokenizer()
    assert found.end_of_text == "<|im_end|>"
    assert [[words.id_to_token(t) for t in d] for d in documents(found)] == [["a", "b", "<|im_end|>"]]
    assert found.largest_token == words.token_to_id("<|im_end|>")
    other = source(path, tokenizer=str(letters), end_of_text="<s>")
    other.prepare()
    assert documents(other)[0][-1] == words.token_to_id("<s>")
    with pytest.raises(UserError, match="has no token '<none>'"):
        source(path, tokenizer=str(letters), end_of_text="<none>")
    said = json.loads((letters / "tokenizer_config.json").read_text())
    del said["eos_token"]
    (letters / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"names no token that ends a text; set data\.end_of_text"):
        source(path, tokenizer=str(letters))
    (letters / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        source(path, tokenizer=str(letters))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_several_processes_make_the_same_tokens(tmp_path, monkeypatch):
    from jaxlab.data.documents import cache as module

    monkeypatch.setattr(module, "UNIT_BYTES", 1)  # a unit for each file
    for number in range(3):
        rows = [{"text": text} for text in some_texts(30, number)]
        write_lines(tmp_path / f"{number}.jsonl", rows)
    write_lines(tmp_path / "bad.ndjson", [{"txet": 1}])
    found = source(tmp_path / "?.jsonl")
    found.prepare(processes=2)
    expected = [text for number in range(3) for text in some_texts(30, number)]
    assert [bytes(tokens[:-1]).decode() for tokens in documents(found)] == expected
    with pytest.raises(UserError, match=r"bad.ndjson line 1: no column 'text'"):
        source(tmp_path / "*json*", on={"separator": None}).prepare(processes=2)


def test_configs_are_kept_as_keys():
    assert dataclasses.is_dataclass(DataSet("a"))
    assert hash(DocumentsConfig(sources=(DataSet("a"),)))
