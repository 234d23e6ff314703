"""config.json of an output whose layers, rows or head are not those of its first input."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlab.checkpoints import huggingface_form, layer_types, read_hf_config
from jaxlab.errors import UserError
from jaxlab.merging.mergekit.plan import FilePlan, StackedLayer
from jaxlab.merging.plan import Input
from jaxlab.models import ModelConfig

Json = dict[str, Any]
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")
"""Lists with something for each layer."""
_LAYERS = ("mlp_only_layers", "cross_attention_layers")
"""Lists of layers."""


def output_config(planned: FilePlan, inputs: Sequence[Input], rows: int | None) -> tuple[Json, list[str]]:
    """config.json, and what it cannot say of the output.

    Args:
      rows: of the tables, where they are not the first input's.

    Raises:
      UserError: no family can describe the first input.
    """
    text, _ = huggingface_form(inputs[0].model, planned.dtype)
    text = copy.deepcopy(text)
    language = _language(text)
    notes: list[str] = []
    if rows is not None:
        for place in (text, language):
            if "vocab_size" in place or place is language:
                place["vocab_size"] = rows
    if (
        bool(text.get("tie_word_embeddings", language.get("tie_word_embeddings", planned.tied)))
        != planned.tied
    ):
        for place in (text, language):
            if place is text or "tie_word_embeddings" in place:
                place["tie_word_embeddings"] = planned.tied
    if planned.stacked:
        _stack(language, planned.layers, inputs)
        notes += _check(text, planned.layers, inputs)
    return text, notes


def _language(text: Json) -> Json:
    for key in ("text_config", "llm_config"):
        if isinstance(text.get(key), dict):
            return text[key]
    return text


def _stack(language: Json, layers: Sequence[StackedLayer], inputs: Sequence[Input]) -> None:
    """What the config says by layer, as each layer's own model says it."""
    count = inputs[0].model.described.num_layers
    keys = [key for key in _COUNTS if key in language] or [_COUNTS[0]]
    for key in keys:
        language[key] = len(layers)
    own = [_language(source.config) if (source := one.model.source_files) else {} for one in inputs]
    for key in _BY_LAYER:
        if isinstance(language.get(key), list) and len(language[key]) == count:
            language[key] = [_at(own[one.input], key, one.layer, language[key]) for one in layers]
    for key in _LAYERS:
        if isinstance(language.get(key), list):
            language[key] = [
                i for i, one in enumerate(layers) if one.layer in (own[one.input].get(key) or ())
            ]
    if isinstance(language.get("first_k_dense_replace"), int):
        dense = [one.layer < (own[one.input].get("first_k_dense_replace") or 0) for one in layers]
        language["first_k_dense_replace"] = dense.index(False) if False in dense else len(dense)


def _at(said: Mapping[str, Any], key: str, layer: int, otherwise: Sequence[Any]) -> Any:
    values = said.get(key)
    values = values if isinstance(values, list) and layer < len(values) else otherwise
    return values[min(layer, len(values) - 1)]


def _check(text: Json, layers: Sequence[StackedLayer], inputs: Sequence[Input]) -> list[str]:
    """Whether the layers of the output attend as they did where they come from; a family that goes by their
    numbers is told each layer's kind, where it can be told.
    """
    language, described = _language(text), _described(text)
    if isinstance(described, str):
        return [described]
    told = [_kinds(one.model.described) for one in inputs]
    if len(_kinds(described)) != len(layers) or any(one.layer >= len(told[one.input]) for one in layers):
        return []  # other layers stand among those of the language model
    wanted = [told[one.input][one.layer] for one in layers]
    if _kinds(described) != wanted:
        kinds = [kind for kind, _ in wanted]
        try:
            names = {kind: name for one in inputs for kind, name in _words(one.model.described).items()}
            language["layer_types"] = [names[kind] for kind in kinds]
        except (UserError, KeyError):
            pass
        again = _described(text)
        if not isinstance(again, str):
            described = again
        else:
            del language["layer_types"]
    found = _kinds(described)
    for i, (have, want) in enumerate(zip(found, wanted, strict=True)):
        if have != want:
            one = layers[i]
            return [
                f"layer {i} comes from layer {one.layer} of {inputs[one.input].role}, which has "
                f"{_say(want)}; config.json cannot say so, and it gets {_say(have)}"
            ]
    return []


def _described(text: Json) -> ModelConfig | str:
    """The model of a config.json; or why it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said of the inputs already
        try:
            return read_hf_config(text, "config.json")
        except UserError as error:
            return f"the output's {error}"


def _kinds(config: ModelConfig) -> list[tuple[str, bool]]:
    """Of each layer its kind of attention, and whether positions turn there."""
    turns = config.rotary_layers
    return [(kind, bool(turns[i]) if turns else True) for i, kind in enumerate(config.kinds)]


def _words(config: ModelConfig) -> dict[str, str]:
    return dict(zip(config.kinds, layer_types(config), strict=True))


def _say(kind: tuple[str, bool]) -> str:
    return f"{kind[0]} attention" + ("" if kind[1] else " without positions")
