"""Conversations about images: forms of rows, what is refused, what is learnt, batches of one shape."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from jaxlab.data import ImageChatsConfig, ImageChatsSource
from jaxlab.data.image_rows import read_image_rows
from jaxlab.errors import ConfigError, UserError, UserNote
from tests.training import vlm_cases

ASKED = {"from": "human", "value": "<image>\nw5"}
SAID = {"from": "gpt", "value": "w30"}


@pytest.fixture
def data(tmp_path):
    return vlm_cases.write_data(tmp_path / "data")


def rows_of(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_image_rows(path, path.parent)


def test_forms_of_rows(data):
    image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    openai = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "0.png"}, text("a")]},
            {"role": "assistant", "content": "b"},
        ]
    }
    rows, bad = rows_of(
        data.parent / "rows.jsonl",
        {"image": "0.png", "conversations": [ASKED, SAID]},
        openai,
        {"images": ["0.png", "1.png"], "conversations": [{"from": "human", "value": "a <image>\nb"}, SAID]},
        {"image": "0.png", "conversations": [{"from": "human", "value": "no place"}, SAID]},
        {"conversations": [{"from": "human", "value": "no image"}, SAID | {"from": "chatgpt"}]},
    )
    assert len(bad) == 1
    assert "1 places for 2 images" in bad[0]
    assert [len(row.images) for row in rows] == [1, 1, 1, 0]
    assert [row.conversation.messages[0]["content"] for row in rows] == [
        [image, text("w5")],
        [image, text("a")],
        [image, text("no place")],
        [text("no image")],
    ]
    assert {row.conversation.messages[1]["role"] for row in rows} == {"assistant"}


def test_bad_rows_are_one_line_each(data, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    (data.parent / "link.png").symlink_to(tmp_path / "outside.png")
    chat = [ASKED, SAID]
    wrong = {
        "leads out of": {"image": "../outside.png", "conversations": chat},
        "link.png leads out of": {"image": "link.png", "conversations": chat},
        f"{tmp_path}/outside.png leads out of": {"image": f"{tmp_path}/outside.png", "conversations": chat},
        "images are files here": {"image": "https://example.org/a.png", "conversations": chat},
        "no such image file": {"image": "none.png", "conversations": chat},
        "neither a file nor a list": {"image": 3, "conversations": chat},
        "has neither messages nor": {"image": "0.png"},
        "not an object like": [1],
        "nothing that is to be learnt": {"image": "0.png", "conversations": [ASKED]},
        "a part of type 'video'": {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        "no messages": {"conversations": []},
        "names images beside": {
            "image": "0.png",
            "messages": [{"role": "user", "content": [{"type": "image", "path": "1.png"}]}],
        },
        "no such image file in": {"image": "x" * 5000, "conversations": chat},
    }
    rows, bad = rows_of(data.parent / "bad.jsonl", *wrong.values())
    assert not rows
    for (line, _), found, number in zip(wrong.items(), bad, range(1, 99), strict=False):
        assert line in found
        assert found.startswith(f"{data.parent / 'bad.jsonl'} line {number}")
        assert "\n" not in found
        assert len(found) < 800


def source(tmp_path, data, case="llava", **changes):
    folder = tmp_path / case
    if not folder.exists():
        vlm_cases.make(folder, case)
    config = {"path": str(data), "model": str(folder), "sequence_length": 64, "holdout_every": 3, **changes}
    return ImageChatsSource(ImageChatsConfig(**config))


@pytest.mark.parametrize("case", ["llava", "qwen2_vl", "idefics3", "paligemma"])
def test_what_the_assistant_says_is_learnt(case, tmp_path, data):
    made = source(tmp_path, data, case)
    batch = made.batch(0, 0, 2)
    words = made.tokenizer()
    for tokens, mask, segments in zip(
        *(batch[n] for n in ("tokens", "loss_mask", "segment_ids")), strict=True
    ):
        told = [words.id_to_token(int(token)) for token in tokens[mask]]
        assert told[0] in ("w30", "w31")
        assert told[1:] == ["<s>" if case == "paligemma" else "<end>"]
        assert segments[mask].all()
        assert not mask[tokens == made.model.image_token].any()
    assert (batch["tokens"] == made.model.image_token).sum() > 0


def test_a_batch_has_images_of_one_shape_and_an_epoch_every_row(tmp_path, data):
    made = source(tmp_path, data, "qwen2_vl")  # two sizes of images are two grids
    assert {row.bucket[1:] for row in made.training} != {made.training[0].bucket[1:]}
    seen, grids = [], set()
    for step in range(len(made.training) // 2):
        batch = made.batch(3, step, 2)
        grids.add(tuple(batch["image_grid_thw"][0].tolist()))
        assert (batch["image_grid_thw"][0] == batch["image_grid_thw"][1]).all()
        seen += [tuple(row) for row in batch["tokens"]]
        again = made.batch(3, step, 2)
        for name, value in batch.items():
            np.testing.assert_array_equal(value, again[name])
    assert len(grids) == 2
    # As many of each as the training rows hold (texts repeat; their counts do not).
    expected = sorted(tuple(np.pad(r.tokens, (0, r.length - len(r.tokens)))) for r in made.training)
    assert sorted(seen) == expected
    one = made.batch(3, 1, 2, slice(1, 2))
    np.testing.assert_array_equal(one["tokens"], made.batch(3, 1, 2)["tokens"][1:2])


def test_short_rows_are_padded_to_no_more_than_the_length(tmp_path, data):
    whole = source(tmp_path, data)
    longest = max(len(row.tokens) for row in whole.training)
    assert longest < 64
    short = source(tmp_path, data, sequence_length=longest)
    batch = short.batch(0, 0, 2)
    assert batch["tokens"].shape[1] == longest
    np.testing.assert_array_equal(batch["tokens"], whole.batch(0, 0, 2)["tokens"][:, :longest])
    with pytest.raises(ConfigError, match="at least 2"):
        source(tmp_path, data, sequence_length=1)


def test_what_is_left_out_is_told(tmp_path, data):
    with data.open("a") as file:
        file.write('{"image": "none.png", "conversations": []}\n{"image": "0.png"}\n')
    with pytest.raises(UserError, match=r"line 25 holds no messages.*1 more bad rows.*on_bad_rows: skip"):
        source(tmp_path, data)
    (data.parent / "0.png").write_bytes(b"no image")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserNote)
        made = source(tmp_path, data, on_bad_rows="skip")
        made.batch(0, 0, 2)
    told = [str(w.message) for w in caught]
    assert sum("left out" in line for line in told) == 3
    assert any("not an image that can be read" in line for line in told)
    with pytest.raises(UserError, match="no 99 conversations have images of one shape"):
        made.batch(0, 0, 99)


def test_one_line_for_what_is_missing(tmp_path, data):
    with pytest.raises(ConfigError, match="which file"):
        ImageChatsConfig(model="x")
    with pytest.raises(UserError, match="no such folder"):
        source(tmp_path, data, images=str(tmp_path / "none"))
    (data.parent / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="0 conversations that can be learnt"):
        source(tmp_path, data.parent / "empty.jsonl")
