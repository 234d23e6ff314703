"""The config.json that transformers 4 wrote for a model, from the one that transformers 5 writes."""

from typing import Any

Json = dict[str, Any]
NEW = ("ministral", "exaone4", "gpt_oss")
"""Families that came with `layer_types`."""


def config_of_transformers_4(config: Json) -> Json:
    """The same settings under their older names: those of nearly all checkpoints on the hub."""
    old = {
        key: config_of_transformers_4(v) if isinstance(v, dict) and "model_type" in v else v
        for key, v in config.items()
    }
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    if "transformers_version" in old:
        old["transformers_version"] = "4.49.0"
    if old.get("model_type") in ("qwen2_vl", "qwen2_5_vl"):  # text settings stood at the top
        text = old.pop("text_config")
        old = {**text, **old}
    elif "text_config" in old and "tie_word_embeddings" in old:  # tying was told inside
        old["text_config"]["tie_word_embeddings"] = old["tie_word_embeddings"]
        if old["model_type"] not in ("qwen3_vl", "qwen3_vl_moe"):
            del old["tie_word_embeddings"]
    if old.get("model_type") in ("qwen3_moe", "qwen3_vl_moe_text"):
        old["num_experts"] = old.pop("num_local_experts")
    kinds = old.get("layer_types")
    if old.get("model_type") not in NEW:
        old.pop("layer_types", None)  # older configs leave them to the model's rule
    if kinds and old.get("model_type") == "gemma3_text":
        old["sliding_window_pattern"] = kinds.index("full_attention") + 1
    rope = old.pop("rope_parameters", None)
    if rope is None:
        return old
    if "full_attention" in rope:  # Gemma 3: one base for each kind of layer; OLMo 3: one for both
        if old["model_type"] != "olmo3":
            old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope["rope_type"] == "axial":  # vision towers of Qwen: the base was fixed
        return old
    rope = dict(rope)
    partial = rope.pop("partial_rotary_factor", None)
    if old["model_type"] == "gpt_neox":
        old["rotary_pct"], old["rotary_emb_base"] = partial, rope.pop("rope_theta")
        old["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
        return old
    if partial is not None:
        old["partial_rotary_factor"] = partial
    if "short_factor" in rope:  # Phi-3's group had three keys
        rope["type"] = rope.pop("rope_type")
        del rope["original_max_position_embeddings"]
    if "mrope_section" in rope and "mrope_interleaved" not in rope:
        rope["type"] = rope["rope_type"] = "mrope"
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    return old
