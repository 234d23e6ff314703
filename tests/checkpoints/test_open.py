"""Any model by its name, from whatever it is stored in."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlab
from jaxlab.checkpoints import load_model, locate, open_model, resolve, save_model
from jaxlab.checkpoints.locate import form_of
from jaxlab.errors import UserError
from jaxlab.tasks import main
from tests.checkpoints import folders, test_llama2c
from tests.models.tiny import draw_params, make_config

STORIES = Path(os.environ.get("JAXLAB_DATA", "../shared/data")) / "stories260k" / "stories260K.bin"


def native(path):
    config = make_config(num_layers=1)
    save_model(path / "model", config, draw_params(config))
    return path / "model"


def hugging_face(path):
    return folders.make(path / "model", "gemma2")


def llama2c(path):
    test_llama2c.made(path / "model.bin")
    return path / "model.bin"


@pytest.mark.parametrize("make", [native, hugging_face, llama2c])
def test_every_kind_is_read_alike(tmp_path, make):
    path = make(tmp_path)
    config, params, tokenizer = jaxlab.load_model(str(path))
    opened = open_model(path)
    assert opened.config == config
    assert tokenizer is None
    assert opened.tokenizer is None
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), opened.shapes) == shapes
    everywhere = jax.sharding.NamedSharding(
        jax.make_mesh((4,), ("all",), axis_types=(jax.sharding.AxisType.Auto,)), jax.P()
    )
    shardings = jax.tree.map(lambda _: everywhere, params)
    _, halves, _ = load_model(path, shardings=shardings, dtype=jnp.bfloat16)
    for half, leaf in zip(*map(jax.tree.leaves, (halves, params)), strict=True):
        assert half.sharding == everywhere
        np.testing.assert_array_equal(half, leaf.astype(jnp.bfloat16))
    assert len(opened.identity) == 64
    assert (opened.source_files is None) == (opened.form != "huggingface")


def test_a_name_that_is_no_path_is_looked_for_on_the_hub(tmp_path, monkeypatch):
    path = hugging_face(tmp_path)
    asked = []
    monkeypatch.setattr(locate, "hub_snapshot", lambda name, **options: asked.append((name, options)) or path)
    assert resolve("owner/name@abc", offline=True) == path
    assert asked == [("owner/name@abc", {"revision": None, "offline": True, "allow_pickle": False})]
    assert open_model("owner/name").config.family == "gemma2"
    for name in (str(tmp_path / "nothing"), "a/b/c", "nothing"):
        with pytest.raises(UserError, match="no such model: a model folder, a run folder"):
            resolve(name)


def test_what_is_no_model_says_so(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("x")
    for name, message in (("adapter", "an adapter, not a model"), ("notes.txt", "name its folder")):
        with pytest.raises(UserError, match=message):
            form_of(tmp_path / name)


def test_ends_of_text_are_those_of_the_model(tmp_path):
    path = hugging_face(tmp_path)
    assert open_model(path).end_tokens == {folders.config("gemma2")["eos_token_id"]}
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 106]}')
    assert open_model(path).end_tokens == {5, 106}
    assert open_model(llama2c(tmp_path)).end_tokens == {1, 2}
    (tmp_path / "own").mkdir()
    assert open_model(native(tmp_path / "own")).end_tokens == frozenset()


def test_a_model_of_words_without_a_tokenizer_is_not_given_bytes(tmp_path, capsys):
    assert main(["generate", str(hugging_face(tmp_path)), "--prompt", "a"]) == 2
    assert "has no tokenizer, and its 127 tokens are not the 256 bytes; put its" in capsys.readouterr().err


@pytest.mark.skipif(not STORIES.exists(), reason=f"needs {STORIES}; set JAXLAB_DATA")
def test_a_real_model_tells_its_story(capsys):
    assert main(["generate", str(STORIES), "--prompt", "", "--max-new-tokens", "24"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time, there was a little girl named Lily")
