"""A VLM put together of a language model and a tower: what is new, what is taken; it reads images."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from jaxlab.checkpoints import load_model, open_model
from jaxlab.errors import UserError
from jaxlab.evaluation import read_prompt, render_prompts
from jaxlab.processing import Prompt
from jaxlab.tasks import main
from tests.checkpoints import folders
from tests.models.tiny import run_model
from tests.processing.folders import write_tokenizer

TOWER = "--tower.image_size 8 --tower.patch_size 4 --tower.num_layers 1 --tower.width 12 --tower.num_heads 2"


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = folders.make(tmp_path_factory.mktemp("base") / "lm", "llama_tied")
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    write_tokenizer(folder, {1: "<|im_start|>", 2: "<|im_end|>"}, rows)
    return folder


def build(*words):
    return main(["build-vlm", *map(str, words)])


@pytest.mark.parametrize("family", ["llava", pytest.param("idefics3", marks=pytest.mark.slow)])
def test_a_new_tower(language, tmp_path, family, capsys):
    out = tmp_path / "vlm"
    assert build(language, out, "--family", family, *TOWER.split(), "--tower.mlp_width", 16) == 0
    assert "new tokens: <image>" in capsys.readouterr().out
    config, params, tokenizer = load_model(out)
    before, theirs, old = load_model(language)
    assert config.family == f"{family}+llama"
    assert config.image_token == tokenizer.token_to_id("<image>") == old.get_vocab_size()
    # The language model is as it was, and new rows are the mean of its others.
    table = params["embedding"].pop("table")
    for name in ("layers", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, params[name], theirs[name])
    np.testing.assert_array_equal(table[: before.vocab_size], theirs["embedding"]["table"])
    mean = np.mean(theirs["embedding"]["table"], 0)
    np.testing.assert_allclose(table[before.vocab_size], mean, atol=1e-6)
    params["embedding"]["table"] = table
    # It reads an image by its own processor and chat template.
    Image.new("RGB", (9, 7), "red").save(tmp_path / "red.png")
    opened = open_model(out)
    asked = Prompt("here", "w3 w4", images=(str(tmp_path / "red.png"),))
    (prompt,) = render_prompts([asked], opened.chat_template, opened)
    batch = read_prompt(prompt, opened, chat=True)
    places = 4 if family == "llava" else 1
    assert int(np.sum(batch["tokens"] == config.image_token)) == places
    assert np.isfinite(run_model(params, batch, config).logits).all()


@pytest.mark.slow
def test_the_tower_of_another(language, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    assert build(language, first, *TOWER.split(), "--seed", 1) == 0
    assert build(language, second, "--tower_from", first, "--seed", 2) == 0
    one, two = load_model(first)[1], load_model(second)[1]
    jax.tree.map(np.testing.assert_array_equal, one["vision"], two["vision"])
    assert not np.array_equal(one["projector"]["output"], two["projector"]["output"])
    assert open_model(second).config == open_model(first).config


def test_what_cannot_be(language, tmp_path, capsys):
    assert build(language, tmp_path / "a", "--tower.width", 13, "--tower.num_heads", 2) == 2
    assert "tower.num_heads: width 13 is not divisible" in capsys.readouterr().err
    assert build(language, tmp_path / "a", "--tower_from", language) == 2
    assert "has no vision tower" in capsys.readouterr().err
    assert build(language, language) == 2
    assert "is an input" in capsys.readouterr().err
    with pytest.raises(UserError, match="not a model folder"):
        open_model(tmp_path).config  # noqa: B018
    assert not (tmp_path / "a").exists()
