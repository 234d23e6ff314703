"""Keys of config.json: used, inert or refused; real files and every field of transformers' classes."""

import functools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from jaxlab.checkpoints import families, open_model, save_model
from jaxlab.checkpoints.families.inert_keys import is_inert
from jaxlab.errors import UserError, UserNote
from jaxlab.models import MoEConfig, abstract_params, count_params
from tests.checkpoints import folders

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLIC = json.loads((GOLDEN / "public_configs.json").read_text())
FIELDS = json.loads((GOLDEN / "config_fields.json").read_text())
SUPPORTED = {kind for family in families.all_families().values() for kind in family.model_types}
VERSIONS = [(v, t) for v, types in FIELDS.items() for t in types if t in SUPPORTED]
NOTED = {
    "Qwen2.5-7B-Instruct-1M": "dual_chunk_attention_config is not applied",
    "DeepSeek-R1-0528-Qwen3-8B": "rope_scaling.attn_factor is not applied",
}


save = functools.partial(save_model, form="huggingface")


@pytest.mark.parametrize("name", PUBLIC)
def test_public_checkpoints_are_read(name):
    """Each stopped at a key that changes nothing; what transformers leaves out is said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = families.read_config(PUBLIC[name], name)
    notes = [str(w.message) for w in said]
    assert len(notes) == (name in NOTED)
    assert NOTED.get(name, "") in "".join(notes)
    told = PUBLIC[name]
    text = told.get("text_config", told.get("llm_config", told))
    assert (config.width, config.num_layers) == (text["hidden_size"], text["num_hidden_layers"])


SIZES = {
    "OLMoE-1B-7B-0125-Instruct": 6_919_161_856,
    "EXAONE-4.0-32B": 32_003_216_384,
    "gpt-oss-20b": 20_914_757_184,
    "GLM-4.5-Air": 106_852_251_264,
    "DeepSeek-V2-Lite-Chat": 15_706_484_224,
    "DeepSeek-V3": 671_026_419_200,
}
"""Parameters of public models as their authors give them, to the digits that they give; without layers that
predict a second token."""


@pytest.mark.parametrize("name", SIZES)
def test_public_checkpoints_have_their_number_of_parameters(name):
    config = families.read_config(PUBLIC[name], name)
    assert count_params(abstract_params(config)) == SIZES[name]


def test_what_public_checkpoints_mean():
    read = lambda name: families.read_config(PUBLIC[name], name)
    exaone, oss, air, lite = map(
        read, ("EXAONE-4.0-32B", "gpt-oss-20b", "GLM-4.5-Air", "DeepSeek-V2-Lite-Chat")
    )
    assert exaone.kinds[:5] == ("sliding",) * 3 + ("full", "sliding")
    assert exaone.rotary_layers[:5] == (True, True, True, False, True)
    assert (exaone.pre_norms, exaone.post_norms, exaone.qk_norm) == (False, True, "head")
    assert oss.kinds[:2] == ("sliding", "full")
    assert (oss.sliding.window, oss.attention_sinks, oss.rope.truncate) == (128, True, False)
    assert oss.moe is not None
    assert (oss.moe.swiglu_limit, oss.moe.experts_per_token) == (7.0, 4)
    assert (air.rotary_dim, air.key_dim, air.dense_layers, air.qk_norm) == (64, 128, 1, "none")
    # 0.1 * 0.707 * ln(40) + 1, squared, on the scores; cosines and sines stay.
    assert lite.score_scale == pytest.approx(192**-0.5 * 1.2608**2, rel=1e-4)
    assert (lite.rope.attention_factor, lite.rotary_dim, lite.key_dim, lite.value_dim) == (1.0, 64, 192, 128)
    assert read("DeepSeek-V3").moe == MoEConfig(
        num_experts=256,
        experts_per_token=8,
        width=2048,
        shared_width=2048,
        scoring="sigmoid",
        router_dtype="float32",
        choice_bias=True,
        num_groups=8,
        groups_per_token=4,
        group_score="top2",
        scale=2.5,
        first_dense=3,
    )


UNUSABLE = {"deepseek_v2": {"num_experts_per_tok": 6}, "glm4_moe": {"head_dim": 128}}
"""In place of defaults with which transformers' own model does not run, those of a public checkpoint."""


def defaults(version: str, kind: str) -> dict[str, Any]:
    fields = {**FIELDS[version][""], **FIELDS[version][kind], "model_type": kind}
    return {**fields, **UNUSABLE.get(kind, {})}


@pytest.mark.parametrize(("version", "kind"), VERSIONS)
def test_every_field_of_transformers_is_read_at_its_default(version, kind):
    families.read_config(defaults(version, kind), "")


OTHER_VALUES: dict[type, tuple[Any, ...]] = {bool: (True, False), int: (2, 3), float: (0.5, 0.25)}


@pytest.mark.parametrize(("version", "kind"), VERSIONS)
def test_no_field_of_transformers_is_passed_over(version, kind):
    """A number or switch at another value changes the model, is refused, or is inert by a list or a family.

    `WITHOUT_EFFECT` holds the last: what a family asks for and does not need, each for a reason.
    """
    base = defaults(version, kind)
    before = families.read_config(base, "")
    for key, value in FIELDS[version][kind].items():
        if is_inert(key, value) and is_inert(key, "another"):
            continue
        changed = [other for other in OTHER_VALUES.get(type(value), ()) if other != value]
        if changed and not any(_matters(base, key, other, before) for other in changed):
            assert key in WITHOUT_EFFECT, key


def _matters(base: dict[str, Any], key: str, value: Any, before: Any) -> bool:
    try:
        return families.read_config({**base, key: value}, "") != before
    except UserError:
        return True


WITHOUT_EFFECT = {
    "use_sliding_window": "where sliding_window is null",
    "max_window_layers": "of models whose layers do not slide",
    "sliding_window": "of models that do not use it",
    "rope_theta": "where rope_parameters says it",
    "rope_local_base_freq": "where rope_parameters says it",
    "sliding_window_pattern": "where layer_types says it",
    "head_dim": "of latent attention, where it is qk_rope_head_dim",
    "num_nextn_predict_layers": "of layers that predict a second token, which transformers leaves out too",
    "qk_head_dim": "of latent attention, the sum of two others",
    "max_position_embeddings": "where yarn reaches further",
    "no_rope_layer_interval": "where no_rope_layers says it",
    "original_max_position_embeddings": "of models whose positions are not stretched",
    "partial_rotary_factor": "of GPT-NeoX, where rotary_pct says it",
    "attn_logit_softcapping": "of Gemma 3, which transformers never applies",
}


def test_a_key_that_nobody_knows_is_ignored_on_request_only(tmp_path):
    folder = folders.write(
        tmp_path / "in", {**folders.config("llama2"), "text_scale": 2.0}, folders.weights("llama2")
    )
    with pytest.raises(
        UserError, match=r"text_scale 2\.0 is not known .* pass --ignore-keys text_scale .*convert"
    ):
        _ = open_model(folder).config
    with pytest.raises(UserError, match=r"--ignore-keys hidden_size: .* or llama reads it"):
        _ = open_model(folder, ignore_keys=("text_scale", "hidden_size")).config
    opened = open_model(folder, ignore_keys=("text_scale",))
    with pytest.warns(UserNote, match="text_scale ignored, as you asked"):
        config = opened.config
    for form in ("huggingface", "orbax"):
        save(tmp_path / form, config, opened.read(), None, form=form, source_files=opened.source_files)
        again = open_model(tmp_path / form)  # the note travels with it
        save(tmp_path / "back", again.config, again.read(), None, source_files=again.source_files)
        written = json.loads((tmp_path / "back/config.json").read_text())
        assert written[families.IGNORED_KEYS] == ["text_scale"]
        with pytest.warns(UserNote, match="text_scale ignored, as you asked"):
            assert open_model(tmp_path / "back").config == config
        shutil.rmtree(tmp_path / "back")


def test_keys_inside_a_text_config_are_named_and_ignored_whole():
    config = PUBLIC["SmolVLM-Instruct"]
    config = {**config, "text_config": {**config["text_config"], "twist": 3}}
    with pytest.raises(UserError, match=r"text_config\.twist 3 is not known"):
        families.read_config(config, "")
    for name in ("text_config.twist", "twist"):
        with pytest.warns(UserNote, match="twist ignored"):
            families.read_config(config, "", ignore_keys=[name])


@pytest.mark.parametrize("value", ["text", [3], {"a": 1}])
def test_a_damaged_note_of_ignored_keys_is_refused(value):
    with pytest.raises(UserError, match="must be a list of keys"):
        families.read_config({**PUBLIC["huggyllama-7b"], families.IGNORED_KEYS: value}, "")


def test_rope_scaling_beside_other_rope_parameters_counts_as_in_transformers():
    config = {**PUBLIC["huggyllama-7b"], "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    other = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    with pytest.warns(UserNote, match="rope_parameters is not applied: rope_scaling stands beside it"):
        both = families.read_config({**config, "rope_parameters": other}, "")
    assert both == families.read_config(config, "")
    alone = families.read_config({**config, "rope_scaling": None, "rope_parameters": other}, "")
    assert (alone.rope.factor, alone.rope.theta) == (4.0, 5e5)
