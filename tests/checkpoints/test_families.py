"""Every family of language models against transformers: logits, greedy tokens, names, configs, both ways."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxlab.checkpoints import families, load_model, open_model
from jaxlab.checkpoints.compatibility import difference
from jaxlab.errors import UserError
from jaxlab.models import ModelConfig, RopeConfig, SlidingAttentionConfig, forward, generate
from tests.checkpoints import folders

CASES = [case for case in folders.CASES if "vision_config" not in folders.config(case)]
LAYOUTS = [(case, i) for case in CASES for i in range(len(folders.layouts(case)))]
STATEFUL = ("llama_dynamic", "phi3_longrope")
"""Their positions turn by the longest sequence of a batch."""
SLOW = (
    "llama_tied",
    "mistral",
    "qwen3",
    "gpt_neox",
    "olmo3",
    "smollm3_window",
    "phi3",
    "stablelm_parallel",
    "ministral",
    "cohere2",
    "exaone4",
    "qwen2_moe",
    "gptj",
    "llama_dynamic",
    "qwen2_window",
    "qwen3_moe",
)
GENERATED = (
    "gpt2",
    "phi3_longrope",
    "opt",
    "smollm3",
    "gemma2",
    "gemma3_text",
    "mixtral_window",
    "gpt_oss",
    *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW),
)
"""One of each kind of cache, two programs compiled for each; slow are those whose parts others share."""


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Programs that run once are compiled in half the time without optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def load(path, case, **more):
    return load_model(folders.make(path / case, case, **more))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path, case):
    config, params, _ = load(tmp_path, case)
    golden = folders.golden(case)
    tokens = golden["tokens"].astype(np.int32)
    # A third row holds the prompt and what followed; tokens to the right of it change nothing.
    follows = np.concatenate([golden["prompt"], golden["greedy"]], axis=1)[0]
    row = np.zeros((1, tokens.shape[1]), np.int32)
    row[0, : len(follows)] = follows
    run = jax.jit(forward, static_argnames="config")
    logits = np.asarray(run(params, {"tokens": np.concatenate([tokens, row])}, config)[0])
    assert np.abs(logits[:2] - golden["logits"]).max() < 1e-4 * np.abs(golden["logits"]).max()
    if case not in STATEFUL:
        start = golden["prompt"].shape[1]
        np.testing.assert_array_equal(logits[2].argmax(-1)[start - 1 : len(follows) - 1], golden["greedy"][0])


@pytest.mark.parametrize("case", GENERATED)
def test_generation_with_a_cache_makes_the_same_tokens(tmp_path, case):
    config, params, _ = load(tmp_path, case)
    golden = folders.golden(case)
    for suffix in ("", "_long") if case in STATEFUL else ("",):
        batch = {"tokens": golden[f"prompt{suffix}"].astype(np.int32)}
        made = generate(params, batch, config, max_new_tokens=golden[f"greedy{suffix}"].shape[1])
        np.testing.assert_array_equal(made, golden[f"greedy{suffix}"])


@pytest.mark.parametrize("case", CASES)
def test_a_folder_comes_back_bit_for_bit(tmp_path, case):
    path = folders.make(tmp_path / "in", case)
    config, params, _ = load_model(path)
    folders.save(tmp_path / "kept", config, params, source_files=open_model(path).source_files)
    folders.save(tmp_path / "new", config, params)
    for out in ("kept", "new"):
        same_tensors(folders.read_all(tmp_path / out), folders.weights(case))
    assert json.loads((tmp_path / "kept" / "config.json").read_text()) == folders.config(case)
    again = open_model(tmp_path / "new").config  # a config.json of our own
    assert difference(config, again) is None
    assert dataclasses.replace(again, family=config.family) == config


@pytest.mark.parametrize("case", CASES)
def test_both_versions_of_a_config_mean_the_same(case):
    one, other = (families.read_config(folders.config(case, version), case) for version in (4, 5))
    assert one == other


@pytest.mark.parametrize(("case", "index"), LAYOUTS)
def test_other_layouts_hold_the_same_model(tmp_path, case, index):
    layout = folders.layouts(case)[index]
    path = folders.make(tmp_path / "in", case, layout=layout)
    checkpoint = open_model(path)
    config, params = checkpoint.config, checkpoint.read()
    plain = load(tmp_path, case)[1]
    assert jax.tree.structure(params) == jax.tree.structure(plain)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)
    folders.save(tmp_path / "out", config, params, source_files=checkpoint.source_files)
    extra = {name for name, *_ in layout.get("extra", ())}
    assert set(checkpoint.account.ignored) == extra
    folders.save(tmp_path / "plain", config, params)  # with a config.json of our own, and plain names
    same_tensors(folders.read_all(tmp_path / "plain"), folders.weights(case))
    expected = {name: value for name, value in folders.read_all(path).items() if name not in extra}
    same_tensors(folders.read_all(tmp_path / "out"), expected)


def test_written_folders_of_every_case_were_loaded_by_transformers():
    verified = json.loads((folders.GOLDEN / "verified.json").read_text())
    assert set(verified) == set(folders.CASES)
    assert all(line["passed"] and line["max_relative_difference"] < 1e-4 for line in verified.values())


def same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape)
        assert value.tobytes() == expected[name].tobytes()


REFUSED = [
    ("llama2", {"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: .*gpt2.*qwen3_moe"),
    ("llama2", {"model_type": None}, "model_type is missing"),
    ("llama2", {"hidden_size": "32"}, "hidden_size must be a whole number"),
    ("llama2", {"hidden_size": 10**12}, "hidden_size must be a whole number"),
    ("llama2", {"num_hidden_layers": 10**6}, "num_hidden_layers must be a whole number"),
    ("llama2", {"num_attention_heads": 5}, "cannot be split over"),
    ("llama2", {"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
    ("llama2", {"residual_multiplier": 0.5}, "residual_multiplier 0.5 is not known to the family llama"),
    ("llama2", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
    ("llama2", {"tie_word_embeddings": "yes"}, "must be true or false"),
    (
        "llama2",
        {"rope_parameters": {"rope_type": "proportional"}},
        "proportional' is not supported: supported",
    ),
    ("llama2", {"rope_parameters": {"rope_type": "longrope"}}, "short_factor must be a list of positive"),
    (
        "llama2",
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5 is not suppor",
    ),
    ("llama2", {"rope_parameters": {"rope_type": "default", "alpha": 2}}, "rope_parameters.alpha 2 is not k"),
    ("llama2", {"rope_parameters": [3]}, "rope_parameters must be a group of keys"),
    ("llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types .* is not known to the family mistral"),
    ("qwen2_window", {"layer_types": ["full_attention"] * 2}, "layer_types .* there are 3 layers"),
    ("qwen2_window", {"layer_types": ["chunked_attention"] * 3}, "layer_types .* supported: full_attention"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not known"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "all layers scale their scores alike"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not known"),
    ("gptj", {"rotary_dim": None}, "rotary_dim None is not supported"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers .* must be the first ones"),
    ("qwen3_moe_sparse_step", {"num_hidden_layers": 4}, "decoder_sparse_step .* must be the first ones"),
    ("qwen2_moe", {"mlp_only_layers": [2]}, "mlp_only_layers .* must be the first ones"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size must be a whole"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported: queries, keys and values are not clipped"),
    ("granite", {"logits_scaling": 0}, "logits_scaling must be a positive number"),
    ("granite", {"shared_intermediate_size": 1024}, "shared_intermediate_size 1024 is not known"),
    ("ministral", {"layer_types": ["chunked_attention"] * 4}, "layer_types .* supported: full_attention"),
    (
        "cohere",
        {"use_parallel_block": False},
        "use_parallel_block False is not supported: models of this fam",
    ),
    ("cohere2", {"layer_types": ["full_attention"] * 5}, "full layers of this family have no positions"),
    ("cohere2", {"layer_types": None, "layer_switch": 3}, "layer_switch 3 .* sliding_window_pattern says 4"),
    ("exaone4", {"layer_types": ["full_attention"] * 4}, "sliding_window 8 .* no layer slides"),
    (
        "exaone4",
        {"layer_types": None, "sliding_window_pattern": "LLLG"},
        "sliding_window_pattern must be a wh",
    ),
    ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit must be a positive number"),
    ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported: known is sigmoid"),
    ("glm4_moe", {"n_group": 4}, "6 experts cannot form 4 groups"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method 'greedy' is not supported: known is noaux_tc"),
    (
        "deepseek_v3",
        {"moe_layer_freq": 2},
        "moe_layer_freq 2 .* all layers after the first ones have experts",
    ),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads 2 .* each of the 4 heads has a key"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias True is not known"),
    ("deepseek_v3", {"index_topk": 2048}, "index_topk 2048 is not known"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob True is not supported"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' .* known are greedy and group_limi"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok must be at most the 5 experts"),
    (
        "gpt_neox",
        {"rope_theta": 5.0, "rotary_emb_base": 7},
        "rope_theta 5.0 is not supported: rotary_emb_bas",
    ),
    (
        "gpt_neox",
        {"rope_parameters": {"partial_rotary_factor": 0.1}},
        "it must give an even number of the 12",
    ),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False is not supported"),
    ("opt", {"word_embed_proj_dim": 20}, "word_embed_proj_dim 20 is not supported"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm True is not supported"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False is not supported"),
    (
        "olmo3",
        {
            "rope_parameters": {
                "full_attention": {},
                "sliding_attention": {"rope_type": "linear", "factor": 2},
            }
        },
        "rope_parameters.sliding_attention .* sliding layers have plain rotary positions",
    ),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must be a list with 1 or 0 for each of 6 layers"),
    ("smollm3", {"no_rope_layers": [2] * 6}, "no_rope_layers must be a list with 1 or 0"),
    ("smollm3_window", {"use_sliding_window": False}, "layer_types .* use_sliding_window is false"),
    ("phi", {"tie_word_embeddings": True}, "a tied head has no bias"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias True is not supported"),
    (
        "phi3_longrope",
        {"rope_parameters": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}},
        "position.short_factors: there must be one for each of 6 pairs",
    ),
    ("stablelm", {"partial_rotary_factor": 1.5, "rope_parameters": None}, "it must give an even number"),
]


@pytest.mark.parametrize(("case", "changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_would_change_the_function_is_refused(case, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        families.read_config({**folders.config(case), **changes}, "folder")
    assert str(raised.value).startswith("folder: ")


def test_defaults_are_those_of_transformers():
    """A text_config tells only what differs from them: LLaVA-1.5's says nothing of Llama 2's sizes."""
    found = families.read_config({"model_type": "llama", "vocab_size": 32064}, "")
    assert (found.width, found.num_layers, found.mlp_width, found.kv_heads) == (4096, 32, 11008, 32)
    assert families.read_config({"model_type": "mistral"}, "").sliding.window == 4096
    gemma = families.read_config({"model_type": "gemma3_text", "num_hidden_layers": 12}, "")
    assert gemma.kinds == ("sliding",) * 5 + ("full",) + ("sliding",) * 5 + ("full",)
    assert (gemma.rope.theta, gemma.sliding.rope_theta, gemma.tie_embeddings) == (1e6, 1e4, True)


def test_positions_that_are_told_otherwise_are_the_same():
    plain = ModelConfig(num_layers=4, head_dim=8)
    told = lambda **more: dataclasses.replace(plain, position=RopeConfig(**more))
    assert difference(plain, told(layers=(True,), dim=8)) is None
    assert difference(told(layers=(True, False)), told(layers=(True, False, True, False))) is None
    for other in (told(layers=(True, False)), told(layers=(False, True)), told(dim=4)):
        assert difference(plain, other) is not None
        assert difference(told(layers=(True, True, False)), other) is not None


@pytest.mark.parametrize("grown", [None, 0.707, 1.0, 0.123456789])
def test_latent_attention_is_written_with_the_scale_that_it_had(grown):
    config = folders.config("deepseek_v3")
    scaling = {**config["rope_parameters"], "mscale_all_dim": grown}
    before = families.read_config({**config, "rope_parameters": scaling}, "")
    assert (before.attention_scale is None) == (grown is None)
    family = families.find("deepseek_v3")
    written = family.write_config(before)
    assert written["rope_scaling"].get("mscale_all_dim") == grown
    assert difference(before, families.read_config(written, "")) is None
    with pytest.raises(UserError, match="scales scores by stretched positions alone"):
        family.write_config(dataclasses.replace(before, position=RopeConfig(dim=4), attention_scale=0.3))


def test_a_model_that_no_family_can_describe_is_not_written(tmp_path):
    config, params, _ = load(tmp_path, "llama2")
    sliding = SlidingAttentionConfig(pattern=("full", "sliding"))
    for changes in ({"embedding_scale": 2.0}, {"attention_softcap": 3.0}, {"attention": sliding}):
        with pytest.raises(UserError, match="llama cannot describe this model"):
            folders.save(tmp_path / "out", dataclasses.replace(config, **changes), params)
    changed = dataclasses.replace(config, norm_eps=0.5)
    files = open_model(tmp_path / "llama2").source_files
    with pytest.raises(UserError, match=r"not this model any more: norm_eps is 0\.5 and 1e-05"):
        folders.save(tmp_path / "out", changed, params, source_files=files)
    assert not (tmp_path / "out").exists()
    own = dataclasses.replace(config, family="jaxlab")
    folders.save(tmp_path / "own", own, params)  # one of ours that is as Llama is
    same_tensors(folders.read_all(tmp_path / "own"), folders.weights("llama2"))
