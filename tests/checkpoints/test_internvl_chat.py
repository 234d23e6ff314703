"""InternVL in its authors' layout and InternLM2: models of the golden cases under other names."""

import json

import jax
import numpy as np
import pytest

from jaxlab.checkpoints import families, open_model, save_model
from jaxlab.errors import UserError
from jaxlab.models import forward, prepare_batch
from tests.checkpoints import folders
from tests.checkpoints.test_vlm_families import batch_of
from tests.models.tiny import run_model
from tests.processing.folders import write_tokenizer

TOWER = {
    "vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "vision_tower.embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
    "vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "vision_tower.encoder.layer": "vision_model.encoder.layers",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
}
TEXT = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
PARTS = ("q_proj", "k_proj", "v_proj")


def replaced(name, table):
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def internlm2(tensors, prefix=""):
    """Llama's tensors as InternLM2 has them: by key/value head, its queries, its key, its value."""
    found = {}
    for name, value in tensors.items():
        end = next((part for part in PARTS if f"self_attn.{part}." in name), None)
        if end is None:
            found[prefix + replaced(name, TEXT)] = value
        elif end == "q_proj":
            q, k, v = (tensors[name.replace("q_proj", part)] for part in PARTS)
            groups = k.shape[0] // 8  # heads of 8
            rows = [x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)]
            joined = np.concatenate(rows, axis=1)
            place = name.replace("self_attn.q_proj", "attention.wqkv")
            found[prefix + place] = joined.reshape(-1, *joined.shape[2:])
    return found


def chat_tensors(case, text):
    """The tensors of a case of InternVL in the authors' layout."""
    inside, found = {}, {}
    tensors = folders.weights(case)
    for name, value in tensors.items():
        if name.startswith("language_model."):
            inside[name.removeprefix("language_model.")] = value
        elif ".attention.q_proj." in name:
            parts = [tensors[name.replace("q_proj", part)] for part in PARTS]
            place = replaced(name, TOWER).replace("attention.q_proj", "attn.qkv")
            found[place] = np.concatenate(parts)
        elif not any(f".attention.{part}." in name for part in PARTS):
            found[replaced(name, TOWER)] = value
    if text == "internlm2":
        inside = internlm2(inside)
        of_output = [name for name in inside if name.endswith("attention.wo.weight")]
        inside |= {name.replace("weight", "bias"): np.zeros(32, np.float32) for name in of_output}
    return found | {f"language_model.{name}": value for name, value in inside.items()}


def chat_config(case, text):
    told = folders.config(case)
    vision, inner = told["vision_config"], told["text_config"]
    llm = {
        **{key: value for key, value in inner.items() if key != "head_dim"},
        "architectures": ["InternLM2ForCausalLM" if text == "internlm2" else "Qwen2ForCausalLM"],
        "tie_word_embeddings": told["tie_word_embeddings"],
    }
    if text == "internlm2":
        own = ("layer_types", "max_window_layers", "use_sliding_window")
        llm = {key: value for key, value in llm.items() if key not in own}
        llm |= {"model_type": "internlm2", "bias": True}
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "torch_dtype": "float32",
        "dynamic_image_size": True,
        "force_image_size": 24,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "llm_config": llm,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "drop_path_rate": 0.1,
            "hidden_act": vision["hidden_act"],
            "hidden_size": vision["hidden_size"],
            "image_size": 24,
            "initializer_factor": 1.0,
            "intermediate_size": vision["intermediate_size"],
            "layer_norm_eps": vision["layer_norm_eps"],
            "norm_type": vision["norm_type"],
            "num_attention_heads": vision["num_attention_heads"],
            "num_channels": 3,
            "num_experts": 8,
            "num_hidden_layers": vision["num_hidden_layers"],
            "patch_size": 4,
            "qk_normalization": vision["use_qk_norm"],
            "qkv_bias": vision["attention_bias"],
            "use_flash_attn": True,
            "use_moe": False,
        },
    }


def make(path, text="qwen2", **changes):
    """A folder in the authors' layout, and a tokenizer that has <IMG_CONTEXT> where the case has it."""
    folders.write(path, chat_config("internvl", text) | changes, chat_tensors("internvl", text))
    write_tokenizer(path, {75: "<img>", 76: "</img>", 77: "<IMG_CONTEXT>"})
    return path


@pytest.mark.parametrize("text", ["qwen2", "internlm2"])
def test_logits_are_those_of_the_layout_of_hugging_face(tmp_path, text):
    golden = folders.golden("internvl")
    opened = open_model(make(tmp_path / "in", text))
    assert (opened.config.family, opened.config.image_token) == (f"internvl_chat+{text}", 77)
    batch = prepare_batch(batch_of(golden), opened.config)
    logits = jax.jit(forward, static_argnames="config")(opened.read(), batch, opened.config)[0]
    assert np.abs(logits - golden["logits"]).max() < 1e-4 * np.abs(golden["logits"]).max()


@pytest.mark.parametrize("text", ["qwen2", "internlm2"])
def test_a_folder_comes_back_bit_for_bit(tmp_path, text):
    opened = open_model(make(tmp_path / "in", text))
    params = opened.read()
    expected = folders.read_all(tmp_path / "in")
    # With its own config.json, which does not tell the placeholder; then with one of ours, which does.
    folders.save(tmp_path / "kept", opened.config, params, opened.tokenizer, source_files=opened.source_files)
    folders.save(tmp_path / "new", opened.config, params)
    for out in ("kept", "new"):
        again = open_model(tmp_path / out)
        assert again.config == opened.config
        found = folders.read_all(tmp_path / out)
        assert found.keys() == expected.keys()
        assert all(found[name].tobytes() == value.tobytes() for name, value in expected.items())
    assert json.loads((tmp_path / "kept/config.json").read_text()) == opened.config_json
    save_model(tmp_path / "ours", opened.config, params, form="orbax", source_files=opened.source_files)
    ours = open_model(tmp_path / "ours")
    folders.save(tmp_path / "back", ours.config, ours.read(), source_files=ours.source_files)
    assert json.loads((tmp_path / "back/config.json").read_text()) == opened.config_json


def test_internlm2_alone_is_llama(tmp_path):
    golden, told = folders.golden("llama2"), folders.config("llama2")
    told |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
    tensors = folders.weights("llama2")
    folder = folders.write(tmp_path / "in", told, internlm2(tensors))
    opened = open_model(folder)
    logits = run_model(opened.read(), {"tokens": golden["tokens"]}, opened.config)[0]
    assert np.abs(logits - golden["logits"]).max() < 1e-4 * np.abs(golden["logits"]).max()
    folders.save(tmp_path / "out", opened.config, opened.read())
    expected, found = folders.read_all(folder), folders.read_all(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == value.tobytes() for name, value in expected.items())
    assert open_model(tmp_path / "out").config == opened.config


def test_a_tokenizer_without_the_placeholder_leaves_it_to_the_processor(tmp_path):
    make(tmp_path / "in")
    (tmp_path / "in/tokenizer.json").unlink()
    assert open_model(tmp_path / "in").config.image_token == 0
    told = chat_config("internvl", "qwen2") | {"image_token_id": 70}
    (tmp_path / "in/config.json").write_text(json.dumps(told))
    assert open_model(tmp_path / "in").config.image_token == 70


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ps_version": "v1"}, "ps_version 'v1' is not supported: it transposes images"),
        ({"force_image_size": 448}, "force_image_size 448 is not supported: positions are those of image_s"),
        ({"select_layer": "last"}, "select_layer must be a whole number"),
        ({"downsample_ratio": 0.4}, "downsample_ratio must be one over a whole number"),
        ({"vision_config": {"use_moe": True}}, "vision_config.use_moe True is not supported"),
        ({"vision_config": {"norm_type": "batch"}}, "norm_type 'batch' is not supported: supported: layer_n"),
        ({"vision_config": {"depth": 3}}, "vision_config.depth 3 is not known to the family internvl_chat"),
        ({"llm_config": {"model_type": "mamba"}}, "'mamba' is not supported"),
        ({"llm_config": {"twist": 1}}, "llm_config.twist 1 is not known to the family qwen2"),
        ({"llm_config": {"model_type": "internlm2", "rope_pos_id_version": "v2pe"}}, "supported: default"),
    ],
)
def test_configs_that_are_wrong_or_not_known(change, message):
    told = chat_config("internvl", "qwen2")
    for key, value in change.items():
        told[key] = {**told[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message) as error:
        families.read_config(told, "")
    assert "\n" not in str(error.value)
