"""Float8 checkpoints: scales by block, by row and by tensor, by hand; what is not read."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxlab.checkpoints import open_model
from jaxlab.checkpoints.fp8 import dequantized
from jaxlab.checkpoints.safetensors_file import Tensor
from jaxlab.checkpoints.tensor_folder import TensorFolder
from jaxlab.errors import UserError
from tests.checkpoints import folders

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


def folder(config, **arrays):
    def tensor(name, x):
        return Tensor(name, x.dtype, x.shape, lambda start, stop: np.array(x[start:stop] if x.shape else x))

    return TensorFolder(Path("m"), config, {n.replace("__", "."): tensor(n, x) for n, x in arrays.items()})


BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 3]}, "model_type": "x"}
WHOLE = {"quantization_config": {"quant_method": "compressed-tensors"}}
W = np.arange(15, dtype=np.float32).reshape(3, 5).astype(E4M3)


def test_a_scale_for_each_block_with_ragged_edges():
    scales = np.asarray([[1.0, 10.0], [0.5, 2.0]], np.float32)
    norm = np.ones(3, BF16)
    found = dequantized(folder(BLOCKS, a__weight=W, a__weight_scale_inv=scales, norm__weight=norm))
    assert set(found) == {"a.weight", "norm.weight"}
    assert found.config == {"model_type": "x"}
    assert found["a.weight"].dtype == BF16
    expected = [[0, 1, 2, 30, 40], [5, 6, 7, 80, 90], [5, 5.5, 6, 26, 28]]
    np.testing.assert_array_equal(found["a.weight"].read().astype(np.float32), expected)
    np.testing.assert_array_equal(found["a.weight"].read_rows(1, 3).astype(np.float32), expected[1:])
    np.testing.assert_array_equal(found["norm.weight"].read(), norm)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 1)])
def test_a_scale_for_a_tensor_or_each_row(shape):
    scale = (
        np.full(shape, 2.0, np.float32) if np.prod(shape) == 1 else np.asarray([1, 2, 4], BF16).reshape(shape)
    )
    extra = np.float32(3.0).reshape(1)
    of_activations = {"a__input_scale": extra, "a__output_scale": extra, "self_attn__k_scale": extra}
    found = dequantized(folder(WHOLE, a__weight=W, a__weight_scale=scale, **of_activations))
    assert set(found) == {"a.weight"}
    factor = scale.astype(np.float32).reshape(-1, 1)
    expected = (W.astype(np.float32) * factor).astype(BF16)
    np.testing.assert_array_equal(found["a.weight"].read(), expected)
    np.testing.assert_array_equal(found["a.weight"].read_rows(2, 3), expected[2:])


def test_the_dtype_is_the_one_that_the_config_names():
    for config in ({**WHOLE, "torch_dtype": "float32"}, {**WHOLE, "text_config": {"dtype": "float32"}}):
        found = dequantized(folder(config, a__weight=W, a__weight_scale=np.ones(1, np.float32)))
        assert found["a.weight"].read().dtype == np.float32
    plain = folder({}, a__weight=np.ones(2, BF16))
    assert dequantized(plain) is plain


def test_a_folder_as_deepseek_has_it(tmp_path):
    """Blocks of every matrix of a layer, and the layer that predicts a second token: the model of the
    dequantised tensors."""
    rng, stored, plain = np.random.default_rng(0), {}, {}
    for name, x in folders.weights("deepseek_v3").items():
        is_matrix = "layers." in name and x.ndim == 2 and not name.endswith("mlp.gate.weight")
        plain[name] = stored[name] = x if name.endswith("bias") else x.astype(BF16)
        if is_matrix:
            rows, columns = (-(-size // 16) for size in x.shape)
            scale = rng.uniform(0.5, 2.0, (rows, columns)).astype(np.float32)
            whole = np.repeat(np.repeat(scale, 16, 0), 16, 1)[: x.shape[0], : x.shape[1]]
            stored[name] = (x / whole).astype(E4M3)
            stored[f"{name}_scale_inv"] = scale
            plain[name] = (stored[name].astype(np.float32) * whole).astype(BF16)
    stored["model.layers.61.eh_proj.weight"] = np.ones((32, 64), E4M3)
    stored["model.layers.61.eh_proj.weight_scale_inv"] = np.ones((2, 4), np.float32)
    config = {**folders.config("deepseek_v3"), "dtype": "bfloat16", "num_nextn_predict_layers": 1}
    quantized = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    one = folders.write(tmp_path / "one", {**config, "quantization_config": quantized}, stored)
    other = folders.write(tmp_path / "other", config, plain)
    opened = open_model(one)
    assert opened.account.ignored == ("model.layers.61.eh_proj.weight",)
    for a, b in zip(*(jax.tree.leaves(m.read()) for m in (opened, open_model(other))), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert opened.read()["layers"]["moe"]["choice_bias"].dtype == np.float32


one = np.ones(1, np.float32)
BAD = {
    "gptq": ({"quantization_config": {"quant_method": "gptq"}}, {"a__weight": W, "a__weight_scale": one}),
    "no method": ({"quantization_config": []}, {"a__weight": W, "a__weight_scale": one}),
    "no scale": (WHOLE, {"a__weight": W}),
    "two scales": (WHOLE, {"a__weight": W, "a__weight_scale": one, "a__weight_scale_inv": one}),
    "no weight": (WHOLE, {"a__weight_scale": one}),
    "no quantization_config": ({}, {"a__weight": W, "a__weight_scale": one}),
    "a scale of bf16": (WHOLE, {"a__weight": np.ones((3, 5), BF16), "a__weight_scale": one}),
    "a wrong number of rows": (WHOLE, {"a__weight": W, "a__weight_scale": np.ones(4, np.float32)}),
    "wrong blocks": (BLOCKS, {"a__weight": W, "a__weight_scale_inv": np.ones((2, 3), np.float32)}),
    "blocks of a vector": (BLOCKS, {"a__weight": W[0], "a__weight_scale_inv": one}),
    "blocks of nothing": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 3]}},
        {"a__weight": W, "a__weight_scale_inv": one},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_read_is_one_line(name):
    config, arrays = BAD[name]
    with pytest.raises(UserError) as error:
        dequantized(folder(config, **arrays))
    assert "\n" not in str(error.value)
