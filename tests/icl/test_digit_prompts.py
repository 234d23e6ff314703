"""Questions about pictures of digits: where the digit is told, token classes, flows before and after."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxlab.checkpoints import open_model, save_model
from jaxlab.data import DigitsConfig, digits_tokenizer
from jaxlab.errors import UserError
from jaxlab.icl import Faithfulness, cut_logits, make_prompts
from jaxlab.models import ModelConfig, PlainVisionConfig, forward, init_params
from jaxlab.reporting import build_sections, read_runs
from jaxlab.tasks import execute
from jaxlab.tasks import icl as task

MODEL = ModelConfig(
    vocab_size=128,
    width=16,
    num_layers=2,
    num_heads=2,
    mlp_width=16,
    max_length=64,
    initializer_range=0.4,
    tie_embeddings=False,
    vision=PlainVisionConfig(
        num_layers=1, image_size=8, patch_size=4, width=16, num_heads=2, mlp_width=16, image_token=4
    ),
)
DATA = DigitsConfig(mixture={"image_french": 1.0, "image_format": 1.0, "image_words": 1.0})

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("digits") / "model"
        params = jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(seed))
        save_model(folder, MODEL, params, digits_tokenizer())
        found.append(str(folder))
    return found


def test_the_target_names_the_digit(folders):
    source = make_prompts(DATA, open_model(folders[0]))
    assert source.count(1000) == 320
    chunks = source.batches(3, 50, 20)
    assert [int(chunk.real.sum()) for chunk in chunks] == [20, 20, 10]
    decode = digits_tokenizer().decode
    seen = set()
    for chunk in chunks:
        for row in range(20):
            length = int(chunk.lengths[row])
            read = chunk.batch["tokens"][row, :length].tolist()
            words = decode(read, skip_special_tokens=False).split(" ")
            assert words[:3] == ["<bos>", "picture", ":"]
            target = decode([int(chunk.label_tokens[row, 0])])
            answer = " ".join(words[words.index("answer") + 1 :])
            seen.add((" ".join(words[7 : words.index("answer")]), answer))
            assert target.lower() not in ("it", "is", "le", "[", "{", "c'est", "je")
            kinds = chunk.classes[row].tolist()
            assert kinds[:7] == [0, 0, 0, 1, 1, 1, 1]
            asked = words.index("answer") - 7
            assert kinds[7 : 7 + asked] == [2] * asked
            assert set(kinds[7 + asked : length]) == {3}
            assert set(kinds[length:]) <= {-1}
            assert chunk.positions[row] == length - 1
    assert ("nomme ce chiffre .", "le") in seen
    assert ("what digit is this ? as json .", '{ "digit" :') in seen


def test_what_has_no_pictures_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match=r"image_ tasks; leave out text_words"):
        make_prompts(DigitsConfig(mixture={"text_words": 1.0, "image_words": 1.0}), open_model(folders[0]))
    blind = dataclasses.replace(MODEL, vision=None)
    params = jax.jit(init_params, static_argnums=0)(blind, jax.random.key(0))
    save_model(tmp_path / "blind", blind, params, digits_tokenizer())
    with pytest.raises(UserError, match="no vision"):
        make_prompts(DATA, open_model(tmp_path / "blind"))


def test_flows_and_cuts_before_and_after(folders, tmp_path):
    """One command; what cutting edges does to the loss over the vocabulary is what it does by hand."""
    config = task.Config(
        model=folders[0],
        after=folders[1],
        data=DATA,
        analyses=("flows", "faithfulness"),
        examples=8,
        batch_size=8,
        seeds=(1, 2),
        faithfulness=Faithfulness(layers=(1,)),
    )
    done = execute("icl", config, outputs=tmp_path)
    results = json.loads((done.path / "results.json").read_text())
    of = lambda found: np.array(found["flows"]["mean"]["image_to_instruction"])
    assert np.max(of(results)) > 0.0
    assert np.max(np.abs(of(results) - of(results["after"]))) > 0.01 * np.max(of(results))

    opened = open_model(folders[0])
    params = opened.read()
    chunk = make_prompts(DATA, opened).batches(1, 8, 8)[0]
    batch, at = chunk.batch, chunk.positions[:, None]
    plain = forward(params, batch, MODEL, logit_positions=at).logits[:, 0]
    cut = np.zeros((1, 2, 4, 4), bool)
    cut[0, 0, 3, 1] = True  # layer 1, from the image to the answer
    without = cut_logits(params, batch, chunk.positions, chunk.classes[None], cut, MODEL)[0]
    loss = lambda x: -np.take_along_axis(np.asarray(jax.nn.log_softmax(x)), chunk.label_tokens, axis=1)[:, 0]
    with np.load(done.path / "records" / "faithfulness.npz") as file:
        measured = file["effect_1"][:, 0, 3, 1]
    np.testing.assert_allclose(measured, loss(without) - loss(plain), rtol=1e-3, atol=1e-5)
    assert np.abs(measured).max() > 1e-3

    (section,) = build_sections(read_runs([done.path]))
    page = " ".join(map(str, section.body))
    for name in ("cross-modal", "after", "after-difference", "faithfulness"):
        assert f'id="figure-icl-{name}"' in page
    assert page.count(" points</td>") == 8
