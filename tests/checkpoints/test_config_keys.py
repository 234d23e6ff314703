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


def defaults(version: str, kind: str) -> dict[str, Any]:
    return {**FIELDS[version][""], **FIELDS[version][kind], "model_type": kind}


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
    "max_position_embeddings": "where yarn reaches further",
    "attn_logit_softcapping": "of Gemma 3, which transformers never applies",
}


def test_a_key_that_nobody_knows_is_ignored_on_request_only(tmp_path):
    folder = folders.write(
        tmp_path / "in", {**folders.config("llama2"), "text_scale": 2.0}, folders.weights("llama2")
    )
    with pytest.raises(UserError, match=r"text_scale 2\.0 is not known .* pass --ignore-keys text_scale"):
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
