"""Vision-language families with plain vision transformers: configs both ways, names, layers in between."""

import json
import re

import jax
import numpy as np
import pytest

from jaxlab.checkpoints import families
from jaxlab.checkpoints import tensor_map as names
from jaxlab.errors import UserError
from jaxlab.models import abstract_params, forward, generate, prepare_batch
from tests.checkpoints import folders

FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "paligemma",
    "gemma3",
    "idefics3",
    "smolvlm",
    "idefics2",
    "mistral3",
    "mllama",
)

CASES = [case for case in folders.CASES if folders.config(case)["model_type"] in FAMILIES]


def read(config):
    return families.find_by_model_type(config["model_type"]).read_config(config)


def load(case):
    """The model of a case, by the names of its keys.json, and the family with that variant."""
    config, weights = read(folders.config(case)), folders.weights(case)
    template = abstract_params(config)
    stacked = {
        entry.pattern: np.stack([weights[name] for name in entry.names])
        for entry in names.entries(template, config.family)
    }
    return config, folders.from_hf_tensors(stacked, template, config.family)


def batch_of(golden, prefix=""):
    """What the forward takes; of the generation with the prefix prompt."""
    start = f"{prefix}." if prefix else ""
    taken = {
        key.removeprefix(start): value
        for key, value in golden.items()
        if key.startswith(start) and (prefix or "." not in key)
    }
    batch = {
        key: value for key, value in taken.items() if key not in ("tokens", "logits", "prompt", "greedy")
    }
    batch["images"] = batch.pop("pixel_values")
    return {**batch, "tokens": golden[prefix or "tokens"]}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    config, params = load(case)
    golden = folders.golden(case)
    batch = prepare_batch(batch_of(golden), config)
    logits = jax.jit(forward, static_argnames="config")(params, batch, config)[0]
    assert np.abs(logits - golden["logits"]).max() < 1e-4 * np.abs(golden["logits"]).max()


GENERATED = (
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "paligemma2",
    "gemma3",
    "idefics3",
    "idefics2",
    "mistral3",
    "mllama",
)
"""One of each family but SmolVLM's, which is Idefics3's arithmetic: two programs are compiled for each."""
QUICK = ("llava", "paligemma2", "gemma3", "mllama")
"""What follows images: plainly, after a prefix, within windows, and beside layers that read them. The others
go on as LLaVA does."""


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in GENERATED]
)
def test_greedy_tokens_are_those_of_transformers(case):
    config, params = load(case)
    golden = folders.golden(case)
    made = generate(params, batch_of(golden, "prompt"), config, max_new_tokens=12)
    np.testing.assert_array_equal(made, golden["greedy"])


def test_rows_of_different_lengths_go_on_as_alone():
    """Of Mllama: what follows a text sees the images that the text's own last token sees."""
    config, params = load("mllama")
    golden = folders.golden("mllama")
    short, long = batch_of(golden, "prompt"), {k: v[1:] for k, v in batch_of(golden).items()}
    missing = long["tokens"].shape[1] - short["tokens"].shape[1]
    wider = lambda x: np.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])
    for key in ("tokens", "cross_attention_mask"):
        short[key] = wider(short[key])
    batch = {key: np.concatenate([short[key], long[key]]) for key in long}
    batch["segment_ids"] = np.ones_like(batch["tokens"])
    batch["segment_ids"][0, -missing:] = 0
    made = generate(params, batch, config, max_new_tokens=6)
    np.testing.assert_array_equal(made[0], golden["greedy"][0, :6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": np.zeros((1, 1, 3, 3, 16, 16))},
            r"images are \(1, 1, 3.*the model takes \('B', 'images', 2",
        ),
        ({"aspect_ratio_ids": np.array([[4]])}, "are beyond the 3 ratios"),
        ({"aspect_ratio_ids": np.array([[0]])}, r"texts have \[1\] tokens of images, there are \[0\] images"),
        ({"aspect_ratio_mask": np.ones((1, 1, 3))}, r"aspect_ratio_mask must be \(1, 1, 2\) beside these"),
        ({"aspect_ratio_mask": None}, r"aspect_ratio_mask must be \(1, 1, 2\) beside these images, is None"),
        ({"cross_attention_mask": np.ones((1, 3, 1, 2))}, r"cross_attention_mask must be \(1, 8, 1, 2\)"),
    ],
)
def test_images_of_mllama_that_do_not_fit(change, message):
    batch = batch_of(folders.golden("mllama"), "prompt") | change
    batch = {key: value for key, value in batch.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        prepare_batch(batch, read(folders.config("mllama")))


@pytest.mark.parametrize("sizes", [[(16, 6)], [(16, 32)], [(0, 8)], [(16, 8), (16, 8)]])
def test_images_of_mistral_3_that_do_not_fit(sizes):
    batch = batch_of(folders.golden("mistral3"), "prompt") | {"image_sizes": np.array(sizes)}
    with pytest.raises(ValueError, match="each must be made of tokens of 8 pixels a side, and lie within"):
        prepare_batch(batch, read(folders.config("mistral3")))


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_comes_back_bit_for_bit(case):
    config, params = load(case)
    weights, back = folders.weights(case), dict(names.host_tensors(params, config.family))
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        assert (back[name].shape, back[name].tobytes()) == (value.shape, value.tobytes()), name
    patterns = [entry.pattern for entry in names.entries(params, config.family)]
    assert len(set(patterns)) == len(patterns)


def test_every_family_has_a_case():
    assert {folders.config(case)["model_type"] for case in CASES} == set(FAMILIES)
    assert {folders.config(case)["model_type"] for case in GENERATED} == set(FAMILIES) - {"smolvlm"}


@pytest.mark.parametrize("case", CASES)
def test_configs_of_both_versions_mean_the_same_and_come_back(case):
    config = read(folders.config(case))
    assert read(folders.config(case, version=4)) == config
    written = families.find(config.family).write_config(config)
    assert read(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize("case", CASES)
def test_every_layout_in_the_wild_is_that_of_a_variant(case):
    config = read(folders.config(case))
    template = abstract_params(config)
    variants = {
        variant: {
            name: entry.shape(template)
            for entry in names.entries(template, f"{config.family}/{variant}".rstrip("/"))
            for name in entry.names
        }
        for variant in ("", *families.find(config.family).variants)
    }
    keys = {
        name: tuple(shape) for name, shape, _ in json.loads((folders.GOLDEN / case / "keys.json").read_text())
    }
    assert keys in variants.values()
    for layout in folders.layouts(case):
        assert set(layout) <= {"name", "rename", "transformers"}, layout["name"]
        renamed = {}
        for name, shape in keys.items():
            for pattern, replacement in layout["rename"]:
                name = re.sub(pattern, replacement, name)
            renamed[name] = shape
        assert renamed in variants.values(), layout["name"]


def test_layers_of_mllama_are_numbered_around_those_that_read_the_images():
    config = read(folders.config("mllama"))
    assert config.family == "mllama+llama@1,3"
    found = {entry.path: entry for entry in names.entries(abstract_params(config), config.family)}
    query = found["layers", "attention", "query"]
    assert query.names == tuple(f"language_model.model.layers.{i}.self_attn.q_proj.weight" for i in (0, 2))
    assert query.layers == (0, 1)  # as in the Llama that an expert is
    cross = found["projector", "cross_layers", "attention", "query"]
    assert cross.names == tuple(f"language_model.model.layers.{i}.cross_attn.q_proj.weight" for i in (1, 3))
    assert (query.is_language, cross.is_language) == (True, False)
    template = abstract_params(config)
    rows = template["embedding"]["table"].shape[0]
    assert rows == template["head"]["table"].shape[1] + 8
    with pytest.raises(UserError, match="holds 2 layers, the family names 1"):
        names.entries(template, "mllama+llama@1")


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("llava", {"vision_feature_layer": "last"}, "vision_feature_layer must be a whole number or a list"),
        ("llava", {"vision_feature_layer": 9}, "9 is no hidden state of 3 layers"),
        ("llava", {"vision_feature_select_strategy": "cls"}, "must be default or full, is 'cls'"),
        ("llava", {"new_projector": 2}, "new_projector 2 is not known to the family llava"),
        (
            "llava",
            {"vision_config": {"model_type": "pixtral"}},
            "vision_config.model_type 'pixtral' is not supp",
        ),
        ("llava", {"vision_config": 3}, "vision_config must be a group of keys, is 3"),
        (
            "llava",
            {"text_config": {"model_type": "mamba"}},
            "text_config.model_type|'mamba' is not supported",
        ),
        ("llava", {"image_token_index": 10**6}, "image_token 1000000 is outside the vocabulary"),
        ("llava_next", {"image_grid_pinpoints": [[3]]}, "must be a list of heights and widths"),
        ("llava_onevision", {"vision_aspect_ratio": "pad"}, "must be anyres_max_ and a number of tiles"),
        ("internvl", {"downsample_ratio": 0.4}, "must be one over a whole number"),
        ("internvl", {"vision_feature_layer": [1, 2]}, "InternVL reads one layer"),
        ("paligemma", {"projection_dim": 5}, "projection_dim 5 is not supported"),
        ("gemma3", {"text_config": {"model_type": "llama"}}, "supported: gemma3_text"),
        ("mllama", {"tie_word_embeddings": True}, "the embedding has more rows than the head"),
        (
            "mllama",
            {"vision_config": {"num_hidden_layers": 9}},
            "intermediate_layers_indices .* there are 9 l",
        ),
        (
            "mistral3",
            {"vision_config": {"rope_theta": 5.0}},
            "rope_theta 5.0 is not supported: .* base of 10000",
        ),
        ("mistral3", {"vision_config": {"rope_parameters": {"rope_type": "yarn"}}}, "images are axial"),
        ("idefics2", {"perceiver_config": {"hidden_act": "relu"}}, "hidden_act 'relu' is not supported"),
    ],
)
def test_configs_that_are_wrong_or_not_known(case, change, message):
    with pytest.raises(UserError, match=message) as error:
        read(folders.config(case) | change)
    assert "\n" not in str(error.value)


def test_the_epsilon_of_a_perceiver_counts_where_it_has_the_width_of_the_text():
    """As in transformers, which takes those of the text where the perceiver_config is of another width."""
    told = folders.config("idefics2")
    assert read(told).vision.resampler.norm_eps == 1e-6
    told["perceiver_config"] = {**told["perceiver_config"], "rms_norm_eps": 3e-4}
    assert read(told).vision.resampler.norm_eps == 3e-4
    del told["perceiver_config"]["hidden_size"]
    told["text_config"] = {**told["text_config"], "rms_norm_eps": 2e-5}
    assert read(told).vision.resampler.norm_eps == 2e-5


@pytest.mark.parametrize(
    ("top", "inner", "version", "expected"),
    [
        (None, None, "5.0", True),
        (None, False, "5.0", False),
        (False, None, "4.49", False),
        (False, True, "5.1.0", False),
        (False, True, "4.49.0", True),
        (True, False, "4.49.0", False),
    ],
)
def test_the_flag_of_a_tied_head_at_either_level(top, inner, version, expected):
    config = folders.config("gemma3") | {"transformers_version": version}
    config["text_config"] = {k: v for k, v in config["text_config"].items() if k != "tie_word_embeddings"}
    config.pop("tie_word_embeddings", None)
    if top is not None:
        config["tie_word_embeddings"] = top
    if inner is not None:
        config["text_config"]["tie_word_embeddings"] = inner
    assert read(config).tie_embeddings == expected


ORIGINAL = {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "image_aspect_ratio": "pad",
}


def test_llava_as_its_authors_wrote_it():
    config = read(ORIGINAL)
    assert config.family == "llava+llama/original"
    assert (config.vision.num_layers, config.vision.feature_layers) == (24, (-2,))
    hf = {
        "model_type": "llava",
        "vocab_size": 32000,
        "text_config": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        "image_token_index": 0,
    }
    assert read(hf).vision == config.vision
    found = {name for row in families.rows_of(config.family) for name in [row.name]}
    assert {
        "model.mm_projector.0.weight",
        "model.layers.{i}.mlp.up_proj.weight",
        "lm_head.weight",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.{i}.mlp.fc1.bias",
    } <= found
    tiled = ORIGINAL | {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[336, 672], [1008, 336]]}
    assert read(tiled).family == "llava_next+llama/original"
    assert read(tiled).vision.grid == ((672, 336), (336, 1008))  # theirs are widths and heights
    many = ORIGINAL | {
        "model_type": "llava_qwen",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": "(1x1),...,(6x6)",
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
    }
    assert read(many).family == "llava_onevision+qwen2/original"
    assert len(read(many).vision.grid) == 36
    with pytest.raises(UserError, match="mm_vision_tower 'eva' is not supported: known: openai/clip"):
        read(ORIGINAL | {"mm_vision_tower": "eva"})
