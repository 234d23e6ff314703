"""Reading and writing folders: accounts, dtypes, placing on devices, memory."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlab.checkpoints import load_model, open_model
from jaxlab.checkpoints.blocked_copy import aligned_empty, copy_by_blocks
from jaxlab.checkpoints.tensor_table import parse
from jaxlab.errors import UserError
from jaxlab.models.sharding import MeshConfig, make_mesh, param_shardings
from tests.checkpoints import folders


def made(path, case="llama_tied", dtype=np.float32, changes=None, config=None):
    """A folder with some tensors changed; None takes one out."""
    tensors = {name: value.astype(dtype) for name, value in folders.weights(case).items()} | (changes or {})
    left = {name: value for name, value in tensors.items() if value is not None}
    return folders.write(path / "model", {**folders.config(case), **(config or {})}, left)


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def test_one_error_lists_all_that_is_missing_unknown_or_wrong(tmp_path):
    changes = {
        NORM: None,
        UP: np.zeros((44, 31), np.float32),
        "model.layers.2.mlp.up_proj.weight": np.zeros((2, 2)),
        "model.layers.0.mlp.up_proj.weight": np.zeros((44, 32), np.int32),
        "extra": np.zeros(3),
    }
    with pytest.raises(UserError) as raised:
        load_model(made(tmp_path, changes=changes))
    assert str(raised.value) == (
        f"{tmp_path / 'model'}: not the family llama: 1 tensor is missing: {NORM}; "
        "2 tensors are not known: model.layers.2.mlp.up_proj.weight, extra; "
        "model.layers.0.mlp.up_proj.weight is int32, expected a floating-point dtype, "
        f"{UP} is [44, 31], expected [44, 32]"
    )


@pytest.mark.parametrize(
    ("case", "changes", "config", "message"),
    [
        ("llama2", {HEAD: None}, {}, f"missing: {HEAD} .{HEAD} may be absent only where .* tie_word_emb"),
        ("llama_tied", {HEAD: np.zeros((131, 32), np.float32)}, {}, f"{HEAD} differs from {TABLE}"),
        ("llama_tied", {HEAD: np.zeros((130, 32), np.float32)}, {}, r"\[130, 32\], but .* is the embedding"),
        ("llama_tied", {}, {"vocab_size": 128}, r"embed_tokens.weight is \[131, 32\], expected \[128, 32\]"),
        ("llama_tied", {}, {"num_hidden_layers": 4000}, "says 4000 layers of 1 experts, the folder holds 20"),
        ("gpt2", {"h.0.attn.bias": np.zeros(3)}, {"n_layer": 2}, "not known: transformer.h.2.attn"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, case, changes, config, message):
    with pytest.raises(UserError, match=message):
        load_model(made(tmp_path, case, changes=changes, config=config))


def test_a_tied_head_that_is_written_out_counts_as_used(tmp_path):
    path = made(tmp_path, changes={HEAD: folders.weights("llama_tied")[TABLE]})
    checkpoint = open_model(path)
    assert checkpoint.account.copies == (HEAD,)
    assert "head" not in checkpoint.read()


@pytest.mark.parametrize(
    ("stored", "wanted", "computes"),
    [
        (np.float16, None, "float32"),
        (ml_dtypes.bfloat16, None, "bfloat16"),
        (ml_dtypes.bfloat16, "float32", "float32"),
        (np.float64, "bfloat16", "bfloat16"),
    ],
)
def test_dtypes_are_kept_or_cast(tmp_path, stored, wanted, computes):
    path = made(tmp_path, dtype=stored)
    config, params, _ = load_model(path, dtype=wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(wanted or stored)}
    assert config.compute_dtype == computes
    expected = folders.weights("llama_tied")[UP].astype(stored).astype(wanted or stored)
    np.testing.assert_array_equal(params["layers"]["mlp"]["up"][1], expected.T)
    folders.save(tmp_path / "out", config, params)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"]
        == np.dtype(wanted or stored).name
    )


@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.bfloat16])
def test_dtypes_that_no_leaf_can_hold_ask_for_one(tmp_path, dtype):
    """float64, which jax has not, or layers of different dtypes."""
    changes = {UP: folders.weights("llama_tied")[UP].astype(dtype)}
    with pytest.raises(UserError, match=r"up_proj.weight is stored in .*convert the model with --dtype"):
        load_model(made(tmp_path, changes=changes))


@pytest.mark.parametrize(("dtype", "number"), [(np.float32, np.nan), (ml_dtypes.bfloat16, np.inf)])
def test_numbers_that_are_not_finite_are_refused_if_asked(tmp_path, dtype, number):
    path = made(tmp_path, dtype=dtype, changes={UP: np.full((44, 32), number, dtype)})
    assert not np.isfinite(load_model(path)[1]["layers"]["mlp"]["up"][1]).any()
    with pytest.raises(UserError, match=f"{UP} holds NaN or infinities"):
        open_model(path).read(not_finite="refuse")


@pytest.mark.parametrize("case", ["qwen3_moe", "gpt2"])
def test_each_tensor_is_read_once_and_straight_to_its_devices(tmp_path, case):
    path = folders.make(tmp_path / "in", case, layout=folders.layouts(case)[0])
    checkpoint = open_model(path)
    read = []

    def counting(tensor):
        rows = lambda i, j: (read.append(tensor.name), tensor.read_rows(i, j))[1]
        return dataclasses.replace(tensor, read_rows=rows)

    counted = {name: counting(tensor) for name, tensor in checkpoint.tensors.items()}
    watched = open_model(path)
    watched.tensors = dataclasses.replace(checkpoint.tensors, tensors=counted)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4))
    config = dataclasses.replace(checkpoint.config, family="jaxlab")
    shardings = param_shardings(config, mesh)
    params = watched.read(shardings=shardings)
    assert sorted(read) == sorted(set(read)) == sorted(set(counted) - set(checkpoint.account.ignored))
    whole = checkpoint.read()
    for leaf, where, expected in zip(*map(jax.tree.leaves, (params, shardings, whole)), strict=True):
        assert leaf.sharding == where
        np.testing.assert_array_equal(leaf, expected)
    assert params["embedding"]["table"].addressable_shards[1].data.shape == (
        whole["embedding"]["table"].shape[0],
        config.width // 4,
    )


def test_the_host_holds_the_model_and_one_tensor(tmp_path):
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "intermediate_size": 512}
    config = {**folders.config("llama_tied"), **sizes, "vocab_size": 1024, "num_hidden_layers": 6}
    from jaxlab.checkpoints import families
    from jaxlab.checkpoints.tensor_map import entries
    from jaxlab.models import abstract_params

    template = abstract_params(families.read_config(config, ""))
    tensors = {
        name: np.ones(entry.shape(template), ml_dtypes.bfloat16)
        for entry in entries(template, "llama")
        for name in entry.names
    }
    path = folders.write(tmp_path / "model", config, tensors, shard_bytes=1 << 20)
    total, largest = (f(t.nbytes for t in tensors.values()) for f in (sum, max))
    del tensors
    load_model(path)  # modules are imported, threads started
    tracemalloc.start()
    try:
        _, params, _ = load_model(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == total
    assert total < peak < total + largest + (1 << 20)


LAYOUTS = [
    ("(h k) d -> d h k", (700, 3, 200)),
    ("d (h k) -> h k d", (3, 200, 700)),
    ("v d -> v d", (7, 3)),
    ("d c y x -> c y x d", (3, 14, 14, 600)),
    ("e f d -> e d f", (3, 600, 500)),
    ("d -> d", (5,)),
    ("() () d -> d", (9,)),
]


@pytest.mark.parametrize(("text", "own"), LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_copies_by_blocks_are_transposes(text, own, dtype):
    layout = parse(text)
    values = np.random.default_rng(0).integers(0, 100, layout.shape(own)).astype(dtype)
    ours, back = aligned_empty(own, np.dtype(dtype)), np.empty_like(values)
    copy_by_blocks(ours, layout.to_ours(values, own))
    np.testing.assert_array_equal(ours, np.ascontiguousarray(layout.to_ours(values, own)))
    copy_by_blocks(*layout.pair(back, ours))
    np.testing.assert_array_equal(back, values)
    part = tuple(slice(1, None) for _ in own)  # of a shard
    shard = aligned_empty(ours[part].shape, np.dtype(dtype))
    copy_by_blocks(shard, layout.to_ours(values, own)[part])
    np.testing.assert_array_equal(shard, ours[part])
    assert shard.ctypes.data % 64 == 0


def test_a_buffer_becomes_an_array_without_a_copy():
    buffer = aligned_empty((1000, 3), np.dtype(ml_dtypes.bfloat16))
    array = jax.device_put(buffer, jax.devices()[0])
    assert array.unsafe_buffer_pointer() == buffer.ctypes.data
    assert array.dtype == jnp.bfloat16
