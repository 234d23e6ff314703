"""Keys of config.json that do not change what a model computes, whatever the family.

A key is read by its family, inert by a list below, or refused. Sources: the fields of transformers' base
class (PreTrainedConfig of 4.46.3, 4.57.6 and 5.24.0; `tests/golden/config_fields.json` has them and those of
every supported class), and public checkpoints, whose trainers and converters left the rest.
"""

import re
from collections.abc import Mapping
from typing import Any

_WORDS = """
    architectures auto_map auto_class base_model_name_or_path model_type name_or_path model_name
    transformers_version transformers_weights tokenizer_class prefix finetuning_task task_specific_params
    problem_type id2label label2id num_labels torch_dtype dtype torchscript use_bfloat16 tf_legacy_loss

    bos_token bos_token_id eos_token eos_token_id eod_token_id pad_token pad_token_id unk_token unk_token_id
    sep_token sep_token_id cls_token_id mask_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id image_token_id video_token_id audio_token_id vision_start_token_id
    vision_end_token_id vision_token_id model_max_length tokenizer_model_max_length tokenizer_padding_side
    max_sequence_length seq_length n_ctx

    suppress_tokens begin_suppress_tokens bad_words_ids max_length min_length max_new_tokens do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_return_sequences exponential_decay_length_penalty remove_invalid_values use_cache
    cache_implementation cache_config return_dict return_dict_in_generate use_return_dict
    output_attentions output_hidden_states output_past output_scores output_router_logits
    chunk_size_feed_forward is_decoder tie_encoder_decoder cross_attention_hidden_size

    attention_dropout attn_pdrop dropout embd_pdrop embedding_dropout embed_dropout hidden_dropout
    hidden_dropout_prob attention_probs_dropout_prob attention_dropout_prob classifier_dropout ffn_dropout
    activation_dropout resid_pdrop residual_dropout layerdrop init_std summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj initializer_range
    initializer_factor router_aux_loss_coef aux_loss_alpha seq_aux router_jitter_noise router_z_loss_coef
    z_loss gradient_checkpointing use_reentrant_checkpointing neftune_noise_alpha use_unpadded_input seed
    pretraining_tp reorder_and_upcast_attn

    quantization_config experts_implementation attn_implementation use_memory_efficient_attention
    use_memorry_efficient_attention use_liger_kernel use_xformers use_fused_rms_norm use_fused_swiglu
    use_triton transformers.js_config sagemaker is_llama_config is_qwen2_config is_starcoder2_config
    ep_size trust_remote_code max_window_layers

    pixel_shuffle_factor perceiver_config
"""
# The last line: text models of Idefics3 and SmolVLM repeat what their wrapper says or has not.
_IGNORED = frozenset(_WORDS.split())

_PATTERNS = re.compile(
    "|".join(
        (
            r"_.*",  # private to a library
            r"(un)?freeze_.*|tune_.*|.*_lr|(q)?lora_.*|peft_.*|fsdp_.*|deepspeed_?.*",  # training
            r"mergekit_.*|unsloth_.*|axolotl_.*|llamafactory_.*",  # who made it
            r"(use_)?flash_?att(entio)?n(_\w+)?|(use_)?sdpa(_\w+)?",  # which kernel computes attention
        )
    )
)

# Keys that are no matter as long as they say this.
_INERT: Mapping[str, tuple[Any, ...]] = {
    "activation": ("swiglu", "silu"),  # beside hidden_act, which counts (Falcon3)
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attn_bias": (False,),
    "bias": (False,),
    "clip_qkv": (None,),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "multi_query": (False,),
    "num_nextn_predict_layers": (0,),
    "partial_rotary_factor": (1, 1.0),
    "pruned_heads": ({},),
    "qk_layer_norms": (False,),
    "qkv_bias": (False,),
    "rope_interleaved": (False,),
    "shared_expert_intermediate_size": (0,),
    "shared_intermediate_size": (0,),
    "shared_input_output_embedding": (False,),
    "use_bidirectional_attention": (False,),
    "use_dynamic_ntk": (False,),
    "use_logn_attn": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_resampler": (False,),
    "use_sliding_window": (False,),
    "use_stable_embedding": (False,),
    "weight_tying": (False,),
}

NOT_APPLIED: Mapping[str, str] = {
    "dual_chunk_attention_config": "attention is over the whole text at once, as in transformers",
    "rope_interleaved": "rotary pairs are (i, i + half), as in transformers",
    "attn_factor": "yarn's factor on cosines and sines is attention_factor, or follows from factor",
}
"""Keys that mean something to their authors' programs and that transformers does not read (5.24.0): the model
loads as it does there, and says so."""


def is_inert(key: str, value: Any) -> bool:
    """Whether a key that no family read changes nothing."""
    allowed = any(type(value) is type(ok) and value == ok for ok in _INERT.get(key, ()))
    return value is None or allowed or key in _IGNORED or _PATTERNS.fullmatch(key) is not None
