"""Model folders: bit-exact, whole or absent, and one line for whatever is wrong with one."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.checkpoints import load_model, open_model, save_model
from jaxlab.checkpoints.formats import orbax_folder
from jaxlab.config import dump
from jaxlab.data.digits_words import digits_tokenizer
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, cast_floats
from jaxlab.models.sharding import MeshConfig, make_mesh, param_shardings
from tests.models.tiny import draw_params

# After a failed read Orbax calls back into an event loop that it has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = ModelConfig(vocab_size=5, width=4, num_layers=1, num_heads=1, mlp_width=2, norm_eps=1e-6)


def draw(dtype=jnp.float32):
    return cast_floats(draw_params(CONFIG), dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "model"
    save_model(path, CONFIG, draw(), digits_tokenizer())
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip_is_exact(tmp_path, dtype):
    params = draw(dtype)
    save_model(tmp_path / "new" / "model", CONFIG, params)
    config, read, tokenizer = load_model(tmp_path / "new" / "model")
    assert config == CONFIG
    assert tokenizer is None
    assert jax.tree.structure(read) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(params), strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model"]  # nothing is left aside


def test_tensors_are_read_to_where_they_live_in_the_wanted_dtype(saved):
    shardings = param_shardings(CONFIG, make_mesh(MeshConfig(data=1, fsdp=4)))
    _, params, tokenizer = load_model(saved, shardings=shardings, dtype=jnp.bfloat16)
    up = params["layers"]["mlp"]["up"]
    assert up.sharding.shard_shape(up.shape) == (1, 1, 2)
    np.testing.assert_array_equal(up, draw(jnp.bfloat16)["layers"]["mlp"]["up"])
    assert tokenizer.get_vocab() == digits_tokenizer().get_vocab()


def test_an_existing_folder_is_replaced_only_when_asked_and_only_by_a_whole_one(copy, monkeypatch):
    before = open_model(copy).identity
    with pytest.raises(UserError, match="exists already"):
        save_model(copy, CONFIG, draw())

    class Full(Exception):
        pass

    def fail(*_):
        raise Full

    with monkeypatch.context() as patch:
        patch.setattr(orbax_folder.ocp.StandardCheckpointer, "save", fail)
        with pytest.raises(Full):
            save_model(copy, CONFIG, draw(), overwrite=True)
        with pytest.raises(Full):
            save_model(copy.parent / "other", CONFIG, draw())
    assert [p.name for p in copy.parent.iterdir()] == ["model"]
    assert open_model(copy).identity == before
    save_model(copy, CONFIG, jax.tree.map(lambda x: x + 1, draw()), overwrite=True)
    assert open_model(copy).identity != before
    np.testing.assert_array_equal(
        load_model(copy)[1]["final_norm"]["scale"], draw()["final_norm"]["scale"] + 1
    )


def test_identity_changes_with_any_part(copy):
    identities = {open_model(copy).identity}
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    identities.add(open_model(copy).identity)
    (copy / "config.yaml").write_text(dump(dataclasses.replace(CONFIG, norm_eps=0.5)))
    identities.add(open_model(copy).identity)
    assert len(identities) == 3
    assert open_model(copy).identity in identities  # and only then


def break_missing_params(path):
    shutil.rmtree(path / "params")


def break_missing_config(path):
    (path / "config.yaml").unlink()


def break_config(path):
    (path / "config.yaml").write_text("width: twelve\n")


def break_other_config(path):
    text = dump(dataclasses.replace(CONFIG, mlp_width=3))
    (path / "config.yaml").write_text(text)


def break_tokenizer(path):
    (path / "tokenizer.json").write_text("{")


def break_metadata(path):
    (path / "params" / "_METADATA").unlink()


def break_garbled_metadata(path):
    (path / "params" / "_METADATA").write_text("{")


def break_truncated(path):
    files = [f for f in (path / "params").rglob("*") if f.is_file() and f.parent.name == "d"]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such model"),
        (break_missing_params, "not a model folder of ours"),
        (break_missing_config, "not a model folder of ours"),
        (break_config, r"config\.yaml:1: width: expected"),
        (break_other_config, r"layers\.mlp\.down is \(1, 2, 4\), its config says \(1, 3, 4\)"),
        (break_tokenizer, r"tokenizer\.json: not a tokenizer"),
        (break_metadata, "parameters cannot be read"),
        (break_garbled_metadata, "parameters cannot be read"),
        (break_truncated, "parameters cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_is_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message) as raised:
        load_model(copy)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.yaml", "params/more"])
def test_links_out_of_the_folder_are_refused(copy, tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("{}")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(outside)
    for read in (load_model, lambda path: open_model(path).identity):
        with pytest.raises(UserError, match="leads out of the model folder"):
            read(copy)


def test_shapes_are_known_without_reading_tensors(saved):
    shapes = open_model(saved).shapes
    assert shapes["layers"]["mlp"]["up"].shape == (1, 4, 2)
    assert shapes["embedding"]["table"].dtype == jnp.float32
