"""Qwen2-VL to Qwen3-VL, with experts too: the golden cases, their names and their config.json."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlab.checkpoints import families, open_model
from jaxlab.checkpoints.tensor_map import entries, host_tensors
from jaxlab.errors import UserError
from jaxlab.models import abstract_params, forward, generate, prepare_batch
from tests.checkpoints import folders

CASES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


def read(config):
    return families.find_by_model_type(config["model_type"]).read_config(config)


def load(tensors, config, family):
    template = abstract_params(config)
    stacked = {e.pattern: np.stack([tensors[name] for name in e.names]) for e in entries(template, family)}
    return folders.from_hf_tensors(stacked, template, family)


def batch_of(golden, prefix=""):
    return {
        "tokens": golden["prompt" if prefix else "tokens"],
        "images": golden[f"{prefix}pixel_values"],
        "image_grid_thw": golden[f"{prefix}image_grid_thw"],
    }


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    config, golden = read(folders.config(case)), folders.golden(case)
    params = load(folders.weights(case), config, config.family)
    batch = prepare_batch(batch_of(golden), config)
    logits = jax.jit(forward, static_argnames="config")(params, batch, config)[0]
    error = np.abs(logits - golden["logits"]).max() / np.abs(golden["logits"]).max()
    assert error < 1e-4


@pytest.mark.parametrize(
    "case", ["qwen2_vl", "qwen3_vl_moe", *(pytest.param(c, marks=pytest.mark.slow) for c in CASES[1:3])]
)
def test_greedy_tokens_are_those_of_transformers(case):
    """The prompt with padding at its end, above a longer one that is all text."""
    config, golden = read(folders.config(case)), folders.golden(case)
    params = load(folders.weights(case), config, config.family)
    prompt = batch_of(golden, "prompt.")
    tokens = np.pad(prompt["tokens"], ((0, 1), (0, 2)), constant_values=5)
    segments = np.ones_like(tokens)
    segments[0, -2:] = 0
    prompt |= {"tokens": tokens, "segment_ids": segments}
    made = generate(params, prompt, config, max_new_tokens=12)
    np.testing.assert_array_equal(made[:1], golden["greedy"])


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_returns_bit_for_bit_under_every_name(case):
    config, weights = read(folders.config(case)), folders.weights(case)
    params = load(weights, config, config.family)
    back = dict(host_tensors(params, config.family))
    assert back.keys() == weights.keys()
    assert all(back[name].tobytes() == weights[name].tobytes() for name in weights)
    assert all(back[name].shape == weights[name].shape for name in weights)
    for layout in folders.layouts(case):
        assert {name for name, _ in host_tensors(params, f"{config.family}/memory")} == set(
            folders.laid_out(weights, layout)
        )


@pytest.mark.parametrize("expert_width", [20, 24])
def test_experts_are_read_whichever_way_they_lie(tmp_path, expert_width):
    """Under the same names; with a width of 24 gate and up, 2 x 24 by 48, have one shape both ways."""
    settings = folders.config("qwen3_vl_moe")
    settings["text_config"]["moe_intermediate_size"] = expert_width
    rng = np.random.default_rng(0)
    draw = lambda name: rng.standard_normal(
        {"gate_up_proj": (5, 48, 2 * expert_width), "down_proj": (5, expert_width, 48)}[name], np.float32
    )
    hub = {
        name: draw(name.rpartition(".")[2]) if ".experts." in name else x
        for name, x in folders.weights("qwen3_vl_moe").items()
    }
    memory = {
        name: np.ascontiguousarray(x.swapaxes(1, 2)) if ".experts." in name else x for name, x in hub.items()
    }
    read = {}
    for word, tensors in (("", hub), ("/memory", memory)):
        path = folders.write(tmp_path / f"in{word[1:]}", settings, tensors)
        checkpoint = open_model(path)
        config, read[word] = checkpoint.config, checkpoint.read()
        assert config.family == f"qwen3_vl_moe+qwen3_moe{word}"
        folders.save(tmp_path / f"out{word[1:]}", config, read[word], source_files=checkpoint.source_files)
        written = folders.read_all(tmp_path / f"out{word[1:]}")
        assert written.keys() == tensors.keys()
        assert all(written[name].tobytes() == tensors[name].tobytes() for name in tensors)
    jax.tree.map(np.testing.assert_array_equal, read[""], read["/memory"])
    experts = read[""]["layers"]["moe"]
    first = hub["model.language_model.layers.1.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(experts["gate"][0], first[..., :expert_width])
    np.testing.assert_array_equal(experts["up"][0], first[..., expert_width:])


@pytest.mark.parametrize("case", CASES)
def test_both_spellings_of_config_are_one_model_and_it_is_written_as_it_was_read(case):
    config = read(folders.config(case))
    assert read(folders.config(case, 4)) == config
    written = families.find(config.family).write_config(config)
    assert read(written) == config
    # transformers 5 reads the text model from text_config, or from the top if there is none
    assert ("text_config" in written) == case.startswith("qwen3")
    untied = dataclasses.replace(config, tie_embeddings=not config.tie_embeddings)
    assert read(families.find(config.family).write_config(untied)) == untied


def test_a_config_as_on_the_hub():
    """Qwen2.5-VL-7B's, shortened to what matters."""
    config = read(
        {
            "model_type": "qwen2_5_vl",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 128000,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 152064,
            "vision_token_id": 151654,
            "image_token_id": 151655,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {
                "depth": 32,
                "hidden_act": "silu",
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "in_chans": 3,
                "out_hidden_size": 3584,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2,
                "temporal_patch_size": 2,
            },
        }
    )
    assert config.rope.sections == (16, 24, 24)
    assert (config.rope.theta, config.kinds, config.max_length) == (1e6, ("full",) * 28, 128000)
    assert config.vision.window_side == 4
    assert config.vision.width == 1280


def test_what_older_versions_repeat_at_the_top_gives_way_to_text_config():
    config = folders.config("qwen2_5_vl")
    repeated = {**config, "hidden_size": 48, "sliding_window": 32768, "rope_scaling": {"type": "mrope"}}
    assert read(repeated) == read(config)
    # Positions of a longer text, as Qwen2.5-VL's model card gives them.
    config["text_config"] |= {
        "rope_parameters": None,
        "rope_scaling": {"type": "yarn", "mrope_section": [2, 2, 2], "factor": 4.0},
    }
    stretched = read(config)
    assert (stretched.rope.scaling, stretched.rope.sections) == ("yarn", (2, 2, 2))
    assert (stretched.rope.original_length, stretched.max_length) == (256, 1024)
    assert read(families.find(stretched.family).write_config(stretched)) == stretched


@pytest.mark.parametrize("case", CASES)
def test_the_head_is_tied_if_either_level_says_so(case):
    config = folders.config(case)
    for top, text, tied in (
        (True, None, True),
        (None, True, True),
        (None, None, False),
        (False, None, False),
    ):
        levels = {**config, "text_config": {**config["text_config"]}}
        for level in (levels, levels["text_config"]):
            level.pop("tie_word_embeddings", None)
        for level, value in ((levels, top), (levels["text_config"], text)):
            if value is not None:
                level["tie_word_embeddings"] = value
        assert read(levels).tie_embeddings == tied


@pytest.mark.parametrize(
    ("case", "level", "key", "value", "message"),
    [
        ("qwen2_vl", "vision_config", "hidden_size", 40, "hidden_size 40 .*text model's hidden_size is 48"),
        ("qwen2_vl", "vision_config", "in_chans", 1, "in_chans 1 .*differs from in_channels"),
        ("qwen2_vl", "vision_config", "embed_dim", 20, "heads of 10 dimensions; it must be a multiple of 4"),
        ("qwen2_vl", "vision_config", "rope_parameters", {"rope_theta": 5.0}, "rope_theta 5.0"),
        ("qwen2_vl", "text_config", "novelty", 3, "config.json: text_config.novelty 3 is not known"),
        ("qwen2_vl", "text_config", "head_dim", 16, "head_dim 16 .*cuts hidden_size 48 into 4 heads"),
        ("qwen2_vl", "text_config", "rope_parameters", {"mrope_interleaved": True}, "do not alternate"),
        ("qwen2_5_vl", "vision_config", "window_size", 7, "7 pixels hold no token"),
        ("qwen2_5_vl", "vision_config", "fullatt_block_indexes", [4], "4 is none of 4 layers"),
        ("qwen2_5_vl", "text_config", "model_type", "llama", "model_type 'llama' is not supported"),
        ("qwen3_vl", "vision_config", "num_position_embeddings", 24, "must be a square number"),
        ("qwen3_vl", "vision_config", "deepstack_visual_indexes", [1, 1], "names a layer twice"),
        ("qwen3_vl", "text_config", "use_sliding_window", True, "do not slide"),
        ("qwen3_vl_moe", "text_config", "norm_topk_prob", False, "weights of the chosen experts sum to one"),
        ("qwen3_vl_moe", "text_config", "num_experts_per_tok", 9, "at most the 5 experts"),
        ("qwen3_vl_moe", "text_config", "mlp_only_layers", [1], "must be the first ones"),
    ],
)
def test_what_is_not_supported_is_refused_with_a_line(case, level, key, value, message):
    config = folders.config(case)
    config[level][key] = value
    with pytest.raises(UserError, match=message) as error:
        read(config)
    assert "\n" not in str(error.value)
