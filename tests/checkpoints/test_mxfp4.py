"""MXFP4 as gpt-oss has it: numbers by hand, folders that are the model of the unpacked tensors, refusals."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxlab.checkpoints import load_model, open_model
from jaxlab.checkpoints.fp8 import dequantized
from jaxlab.errors import UserError
from tests.checkpoints import folders
from tests.checkpoints.test_fp8 import folder

CONFIG = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
EXPERT = "model.layers.{}.mlp.experts.{}_proj"


def packed(experts, rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8)
    scales = rng.integers(120, 131, (experts, rows, columns // 32), dtype=np.uint8)
    return blocks, scales


def test_numbers_are_those_of_e2m1_times_a_power_of_two():
    blocks = np.zeros((1, 2, 1, 16), np.uint8)
    blocks[0, 0, 0, :8] = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]  # the lower half first
    blocks[0, 1, 0, 15] = 0x2F
    scales = np.asarray([[[127], [130]]], np.uint8)
    found = dequantized(folder(CONFIG, w_blocks=blocks, w_scales=scales, b=np.ones(2, np.float32)))
    assert set(found) == {"w", "b"}
    assert found.config == {"model_type": "gpt_oss"}
    assert (found["w"].shape, found["w"].dtype) == ((1, 32, 2), ml_dtypes.bfloat16)
    first, second = found["w"].read().astype(np.float32)[0].T
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    np.testing.assert_array_equal(first[:16], [*positive, *(-x for x in positive)])
    assert not first[16:].any()
    np.testing.assert_array_equal(second[30:], [-48, 8])  # times 2 ** 3
    assert not second[:30].any()


def test_a_part_is_read_as_of_the_whole():
    blocks, scales = packed(3, 4, 64)
    tensor = dequantized(folder(CONFIG, w_blocks=blocks, w_scales=scales))["w"]
    assert tensor.shape == (3, 64, 4)
    np.testing.assert_array_equal(tensor.read_rows(1, 3), tensor.read()[1:3])


def test_a_packed_folder_is_the_model_of_its_numbers(tmp_path):
    """And is written as numbers in bf16, under the names that transformers has for them."""
    config = folders.config("gpt_oss") | {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
    config |= {"layer_types": config["layer_types"][:1], "dtype": "bfloat16"}
    rng = np.random.default_rng(1)
    shapes = {
        name: [64 if n == 32 else 32 if n == 20 else 64 if n == 40 else n for n in x.shape]
        for name, x in folders.weights("gpt_oss").items()
        if "layers." not in name or "layers.0." in name
    }
    plain = {name: rng.normal(size=shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    stored = dict(plain)
    for part, rows, columns in (("gate_up", 64, 64), ("down", 64, 32)):
        name = EXPERT.format(0, part)
        del stored[name]
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = packed(6, rows, columns)
        arrays = {"w_blocks": stored[f"{name}_blocks"], "w_scales": stored[f"{name}_scales"]}
        plain[name] = dequantized(folder(CONFIG, **arrays))["w"].read()
    quantized = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    one = folders.write(tmp_path / "one", {**config, "quantization_config": quantized}, stored)
    other = folders.write(tmp_path / "other", config, plain)
    for a, b in zip(*(jax.tree.leaves(load_model(path)[1]) for path in (one, other)), strict=True):
        np.testing.assert_array_equal(a, b)
    opened = open_model(one)
    folders.save(tmp_path / "out", opened.config, opened.read(), source_files=opened.source_files)
    written = folders.read_all(tmp_path / "out")
    assert written.keys() == plain.keys()
    assert all(written[name].tobytes() == plain[name].tobytes() for name in plain)
    assert "quantization_config" not in open_model(tmp_path / "out").config_json


BLOCKS, SCALES = packed(2, 4, 32)
BAD = {
    "no scales": ({"w_blocks": BLOCKS}, "the packed tensor w_blocks has no scales"),
    "no blocks": ({"w_scales": SCALES}, "the scale w_scales has no blocks"),
    "twice": ({"w": np.ones(2), "w_blocks": BLOCKS, "w_scales": SCALES}, "w stands there twice"),
    "shapes": ({"w_blocks": BLOCKS, "w_scales": SCALES[:1]}, r"w_blocks: uint8\[2, 4, 1, 16\] does not fit"),
    "dtypes": ({"w_blocks": BLOCKS.astype(np.int8), "w_scales": SCALES}, "w_blocks: int8.* does not fit"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    arrays, message = BAD[name]
    with pytest.raises(UserError, match=message):
        dequantized(folder(CONFIG, **arrays))


def test_a_scale_that_is_no_number_is_refused():
    tensor = dequantized(folder(CONFIG, w_blocks=BLOCKS, w_scales=np.full_like(SCALES, 255)))["w"]
    with pytest.raises(UserError, match="w_scales holds NaN"):
        tensor.read()
