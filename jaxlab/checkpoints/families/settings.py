"""A config.json read key by key: each key is read, ignored by a list, or refused.

What changes the function of a model and is not known must never pass in silence, so `Settings.done` refuses
every key that nobody asked for, unless it is on one of the lists below.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxlab.errors import UserError

# Training, tokens, generation, caches, names, serving: they do not change what the logits are.
_WORDS = """
    architectures auto_map auto_class base_model_name_or_path bos_token bos_token_id eos_token
    eos_token_id pad_token_id pad_token unk_token_id sep_token_id cls_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id image_token_id video_token_id audio_token_id
    vision_start_token_id vision_end_token_id vision_token_id suppress_tokens begin_suppress_tokens
    bad_words_ids attention_dropout attn_pdrop dropout embd_pdrop embedding_dropout hidden_dropout
    hidden_dropout_prob classifier_dropout resid_pdrop summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj problem_type finetuning_task id2label label2id
    num_labels task_specific_params initializer_range initializer_factor router_aux_loss_coef
    router_jitter_noise output_router_logits use_cache cache_implementation gradient_checkpointing
    pretraining_tp torch_dtype dtype use_bfloat16 torchscript transformers_version model_type name_or_path
    return_dict return_dict_in_generate output_attentions output_hidden_states output_scores
    tokenizer_class prefix chunk_size_feed_forward use_return_dict tf_legacy_loss remove_invalid_values
    is_decoder reorder_and_upcast_attn n_ctx max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
    exponential_decay_length_penalty quantization_config mask_token_id transformers_weights
    unsloth_version unsloth_fixed tie_encoder_decoder experts_implementation attn_implementation
"""
_IGNORED = frozenset(_WORDS.split())

# Keys that are no matter as long as they say this.
_INERT: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_bidirectional_attention": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "partial_rotary_factor": (1, 1.0),
    "num_nextn_predict_layers": (0,),
}


class Settings:
    """One level of a config.json; errors name the key and, for an inner level, the keys that lead to it."""

    def __init__(
        self, config: Any, family: str, defaults: Mapping[str, Any] | None = None, within: str = ""
    ) -> None:
        if not isinstance(config, Mapping):
            raise UserError(f"config.json: {within.rstrip('.')} must be a group of keys, is {_shown(config)}")
        self.config = {**(defaults or {}), **config}
        self.given = frozenset(config)
        self.family = family
        self.within = within
        self.read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        """Whether the key is there, with a value."""
        return self.config.get(key) is not None

    def value(self, key: str, default: Any = None) -> Any:
        """Whatever the key holds; `default` where it is absent or null."""
        self.read.add(key)
        found = self.config.get(key)
        return default if found is None else found

    def ignore(self, *keys: str) -> None:
        """Keys of this family that do not matter."""
        self.read |= set(keys)

    def wrong(self, key: str, expected: str) -> UserError:
        return UserError(
            f"config.json: {self.within}{key} must be {expected}, is {_shown(self.config.get(key))}"
        )

    def whole(self, key: str, default: int | None = None, *, least: int = 1, most: int = 1 << 31) -> int:
        """A whole number.

        Raises:
          UserError: there is neither a value nor a default.
        """
        found = self.value(key, default)
        if type(found) is not int or not least <= found <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return found

    def maybe_whole(self, key: str, default: int | None = None) -> int | None:
        """A whole number or null; the default only where the key is absent."""
        self.read.add(key)
        return self.whole(key, default) if self.config.get(key, default) is not None else None

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        found = self.value(key, default)
        if type(found) not in (int, float) or not math.isfinite(found) or found <= 0:
            raise self.wrong(key, "a positive number")
        return float(found)

    def maybe_number(self, key: str) -> float | None:
        self.read.add(key)
        return self.number(key) if key in self else None

    def flag(self, key: str, default: bool = False) -> bool:
        found = self.value(key, default)
        if type(found) is not bool:
            raise self.wrong(key, "true or false")
        return found

    def words(self, key: str) -> list[str] | None:
        found = self.value(key)
        if found is None:
            return None
        if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
            raise self.wrong(key, "a list of words")
        return found

    def word(self, key: str, default: str) -> str:
        found = self.value(key, default)
        if not isinstance(found, str):
            raise self.wrong(key, "a word")
        return found

    def refuse(self, key: str, why: str) -> UserError:
        """An error about a value that is known and not supported."""
        shown = _shown(self.config.get(key))
        return UserError(f"config.json: {self.within}{key} {shown} is not supported: {why}")

    def done(self) -> None:
        """Whether every key was read.

        Raises:
          UserError: one that may matter was not.
        """
        for key in sorted(self.given - self.read):
            value = self.config[key]
            inert = any(type(value) is type(ok) and value == ok for ok in _INERT.get(key, ()))
            if key.startswith("_") or key in _IGNORED or value is None or inert:
                continue
            raise UserError(
                f"config.json: {self.within}{key} {_shown(value)} is not known to the family {self.family}; "
                "take it out if it does not change what the model computes"
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
