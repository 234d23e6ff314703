"""Tensors as they are found: wrapped names, strays, overlays, packed forms, NaN."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxlab.checkpoints import inspect_model, load_model, open_model
from jaxlab.checkpoints.formats.base import is_finite
from jaxlab.checkpoints.tensor_folder import open_folder
from jaxlab.errors import UserError, UserNote
from jaxlab.tasks import main
from tests.checkpoints import folders

CASE = "llama_tied"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def write(path: Path, tensors: dict[str, np.ndarray], **more) -> Path:
    return folders.write(path, {**folders.config(CASE), **more}, tensors)


def values(path: Path, **options) -> dict[str, np.ndarray]:
    return {"embedding": np.asarray(open_model(path, **options).read()["embedding"]["table"])}


WRAPPED = {
    "DistributedDataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "torch.compile of the inner model": lambda name: name.replace("model.", "model._orig_mod.", 1),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(
        "layers.0.", "layers.0._fsdp_wrapped_module."
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_of_wrapped_models_are_read(tmp_path, wrapper):
    tensors = {WRAPPED[wrapper](name): value for name, value in folders.weights(CASE).items()}
    opened = open_model(write(tmp_path / "in", tensors))
    with pytest.warns(UserNote, match="have a wrapper's names; .* is read as "):
        found = opened.read()
    assert np.array_equal(found["embedding"]["table"], folders.weights(CASE)[EMBEDDING])


def test_a_wrapped_name_beside_the_plain_one_is_refused(tmp_path):
    tensors = {**folders.weights(CASE), f"_orig_mod.{NORM}": folders.weights(CASE)[NORM]}
    with pytest.raises(UserError, match=r"holds model\.norm\.weight under two names"):
        open_model(write(tmp_path / "in", tensors)).read()


def test_a_stray_tensor_is_named_and_ignored_on_request(tmp_path):
    """As in a reward model, which has a head of its own."""
    tensors = {**folders.weights(CASE), "score.weight": np.zeros((1, 32), np.float32)}
    path = write(tmp_path / "in", tensors)
    with pytest.raises(UserError, match=r"score\.weight; .* pass --ignore-tensors score\.weight"):
        open_model(path).read()
    for pattern in ("score.weight", "score.*"):
        opened = open_model(path, ignore_tensors=[pattern])
        with pytest.warns(UserNote, match="tensors ignored, as you asked"):
            assert "score" not in opened.read()
    with pytest.raises(UserError, match=r"--ignore-tensors v_head\.\*: it holds no such tensor"):
        open_model(path, ignore_tensors=["v_head.*"]).read()
    with pytest.raises(UserError, match=r"1 tensor is missing: model\.norm\.weight"):
        open_model(path, ignore_tensors=["score.*", NORM]).read()
    assert main(["inspect", str(path), "--ignore-tensors", "score.*"]) == 0
    assert main(["inspect", str(path)]) == 2


def test_a_task_that_cannot_leave_a_tensor_out_is_told_who_can(tmp_path, capsys):
    write(tmp_path / "in", {**folders.weights(CASE), "score.weight": np.zeros((1, 32), np.float32)})
    recipe = {"kind": "merge", "operator": "linear", "models": [{"model": str(tmp_path / "in")}] * 2}
    (tmp_path / "m.yaml").write_text(json.dumps(recipe))
    assert main(["merge", str(tmp_path / "m.yaml"), "--out", str(tmp_path / "out"), "--check"]) == 2
    assert "a task without this option takes what convert writes with it" in capsys.readouterr().err


def test_a_head_of_its_own_in_a_tied_model_is_refused_or_left_out(tmp_path):
    table = folders.weights(CASE)[EMBEDDING]
    path = write(tmp_path / "in", {**folders.weights(CASE), "lm_head.weight": table + 1})
    with pytest.raises(UserError, match=r"differs from .* pass --ignore-tensors lm_head\.weight"):
        open_model(path).read()
    opened = open_model(path, ignore_tensors=["lm_head.weight"])
    with pytest.warns(UserNote, match="ignored"):
        assert np.array_equal(opened.read()["embedding"]["table"], table)


def test_an_adapter_that_was_not_merged_is_said(tmp_path):
    tensors = {
        **folders.weights(CASE),
        "model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((2, 32), "f4"),
    }
    with pytest.raises(UserError, match="an adapter that was not merged"):
        open_model(write(tmp_path / "in", tensors)).read()
    # As PEFT's model saves all of itself.
    wrapped = {f"base_model.model.{name}": value for name, value in tensors.items()}
    with pytest.raises(UserError, match=r"^\S+wrapped: not the family .*an adapter that was not merged"):
        open_model(write(tmp_path / "wrapped", wrapped)).read()


def split(path: Path, tensors: dict[str, np.ndarray], overlay: dict[str, np.ndarray], name: str) -> Path:
    """A folder of two shards, the second with tensors of the first one again; the index has the second's."""
    write(path, tensors)
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    write(path / "other", overlay)
    (path / "other/model.safetensors").rename(path / name)
    places = {key: "model-00001-of-00002.safetensors" for key in tensors} | dict.fromkeys(overlay, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def test_an_overlay_shard_counts_where_index_and_order_agree(tmp_path):
    table = folders.weights(CASE)[EMBEDDING]
    good = split(
        tmp_path / "in", folders.weights(CASE), {EMBEDDING: table + 1}, "model-00002-of-00002.safetensors"
    )
    assert np.array_equal(values(good)["embedding"], table + 1)
    bad = split(tmp_path / "bad", folders.weights(CASE), {EMBEDDING: table + 1}, "changed.safetensors")
    with pytest.raises(UserError, match=r"too, which the index has in changed\.safetensors"):
        open_folder(bad)


def test_a_tensor_that_the_index_leaves_out_is_accounted_for(tmp_path):
    path = split(tmp_path / "in", folders.weights(CASE), {}, "model-00002-of-00002.safetensors")
    index = path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    del places[NORM]
    index.write_text(json.dumps({"weight_map": places}))
    assert np.array_equal(open_model(path).read()["final_norm"]["scale"], folders.weights(CASE)[NORM])


PACKED = {
    "GPTQ": ({}, ["qweight", "qzeros", "scales", "g_idx"]),
    "AWQ": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ["qweight", "qzeros", "scales"]),
    "MLX, 4-bit": ({"quantization": {"bits": 4, "group_size": 64}}, ["weight", "scales", "biases"]),
    "NVFP4": (
        {"quantization_config": {"quant_method": "modelopt"}},
        ["weight", "weight_scale", "weight_scale_2"],
    ),
    "bitsandbytes 4-bit": ({}, ["weight", "weight.absmax", "weight.quant_map"]),
    "bitsandbytes 8-bit": ({}, ["weight", "SCB", "weight_format"]),
    "compressed-tensors, packed integers": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        ["weight_packed", "weight_scale", "weight_shape"],
    ),
    "8-bit integers": (
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        ["weight", "weight_scale"],
    ),
}


@pytest.mark.parametrize("form", PACKED)
def test_packed_weights_are_named_for_what_they_are(tmp_path, form):
    config, parts = PACKED[form]
    tensors = dict(folders.weights(CASE))
    name = "model.layers.0.mlp.up_proj"
    del tensors[f"{name}.weight"]
    tensors |= {f"{name}.{part}": np.zeros((4, 4), np.int8) for part in parts}
    path = write(tmp_path / "in", tensors, **config)
    with pytest.raises(UserError, match=f"quantised: {form}.*; not read; take a checkpoint in bf16"):
        inspect_model(open_model(path), "in")


FILES = {
    "consolidated.safetensors": "Mistral's own form",
    "consolidated.00.pth": "Meta's own form",
    "flax_model.msgpack": "Flax weights",
    "tf_model.h5": "TensorFlow weights",
    "model.onnx": "an ONNX graph",
    "global_step100": "a DeepSpeed checkpoint",
}


@pytest.mark.parametrize("name", FILES)
def test_other_forms_are_named_for_what_they_are(tmp_path, name):
    (tmp_path / name).write_bytes(b"\0" * 16)
    for config in (False, True):
        if config:
            (tmp_path / "config.json").write_text(json.dumps(folders.config(CASE)))
        with pytest.raises(UserError, match=f"it holds {name}: {FILES[name]}"):
            _ = open_model(tmp_path).config


def test_a_file_of_tensors_alone_is_no_model(tmp_path):
    path = write(tmp_path / "in", folders.weights(CASE))
    with pytest.raises(UserError, match=r"tensors without their config\.json; name the folder"):
        open_model(path / "model.safetensors")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "complex64", "nonsense", "float64"])
def test_parameters_have_dtypes_that_models_compute_with(tmp_path, dtype):
    path = write(tmp_path / "in", folders.weights(CASE))
    with pytest.raises(UserError, match="float32, bfloat16 or float16"):
        load_model(path, dtype=dtype)
    with pytest.raises(UserError, match="float32, bfloat16 or float16"):
        open_model(path).read(dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_found(dtype, value):
    made = np.asarray([[0.0, 1.0], [-65504.0, 6e-8]]).astype(getattr(ml_dtypes, dtype, dtype))
    assert is_finite(made)
    made[1, 0] = value
    assert not is_finite(made)
    assert is_finite(np.zeros((0, 3), made.dtype))


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_nan_is_said_by_scan_convert_and_read(tmp_path, capsys, to):
    tensors = dict(folders.weights(CASE))
    tensors[NORM] = tensors[NORM].copy()
    path, out = write(tmp_path / "in", tensors), str(tmp_path / "out")
    assert main(["inspect", str(path), "--scan"]) == 0
    assert "tensors are finite" in capsys.readouterr().out
    tensors[NORM][3] = np.nan
    path = write(tmp_path / "nan", tensors)
    with pytest.warns(UserNote, match=r"model\.norm\.weight holds NaN"):
        main(["convert", str(path), out, "--to", to, "--verify"])
    capsys.readouterr()
    assert main(["inspect", out, "--scan"]) == 0
    assert "NaN or infinities in 1 of" in capsys.readouterr().out
    opened = open_model(out)
    with pytest.warns(UserNote, match=r"norm.* holds NaN"):
        opened.read(not_finite="warn")
    with pytest.raises(UserError, match=r"norm.* holds NaN"):
        opened.read(not_finite="refuse")


PREFIXES = ("student.", "base_model.model.", "llm.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_nobody_knows_is_named(tmp_path, prefix, capsys):
    tensors = {prefix + name: value for name, value in folders.weights(CASE).items()}
    path = write(tmp_path / "in", tensors)
    with pytest.raises(UserError, match=f"names begin with '{prefix}', which the family does not have"):
        open_model(path).read()
    assert main(["inspect", str(path)]) == 2
    assert f"names begin with '{prefix}'" in capsys.readouterr().err


def test_a_reward_model_is_called_one(tmp_path):
    tensors = dict(folders.weights("llama2")) | {"score.weight": np.zeros((1, 32), np.float32)}
    del tensors["lm_head.weight"]
    path = folders.write(tmp_path / "in", folders.config("llama2"), tensors)
    with pytest.raises(UserError, match="a classifier or reward model: it has a head of its own"):
        open_model(path).read()


def test_inspect_sees_sizes_that_are_not_the_configs(tmp_path, capsys):
    path = write(tmp_path / "in", folders.weights(CASE), vocab_size=100)
    assert main(["inspect", str(path)]) == 2
    assert f"{EMBEDDING} is [131, 32], expected [100, 32]" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_pointers_of_git_lfs_are_named(tmp_path, name):
    path = write(tmp_path / "in", folders.weights(CASE))
    (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match="a pointer of Git LFS in place of the file; run git lfs pull"):
        open_model(path).read()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model-00001-of-00002.safetensors", "shards without their model.safetensors.index.json"),
        ("checkpoint-5", "a folder of a trainer"),
        ("pytorch_model_fsdp_0", "shards of FSDP"),
        ("onnx", "ONNX graphs"),
    ],
)
def test_weights_in_another_place_are_told(tmp_path, name, told):
    (tmp_path / "config.json").write_text(json.dumps(folders.config(CASE)))
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"it holds {name}: {told}"):
        _ = open_model(tmp_path).config


def test_float64_is_converted_and_verified(tmp_path, capsys):
    tensors = {name: value.astype(np.float64) for name, value in folders.weights(CASE).items()}
    path = write(tmp_path / "in", tensors)
    words = ["convert", str(path), str(tmp_path / "out"), "--to", "hf", "--dtype", "float32", "--verify"]
    assert main(words) == 0
    assert "verified: logits differ by at most 0 " in capsys.readouterr().out
