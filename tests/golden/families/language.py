"""Cases of language models."""

from typing import Any

import numpy as np
import transformers as hf
from case import Case

BASE: dict[str, Any] = dict(
    vocab_size=131,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=44,
    max_position_embeddings=64,
    rope_theta=10000.0,
    bos_token_id=1,
    eos_token_id=2,
)
TIED_HEAD_WRITTEN = {
    "name": "tied head written out",
    "rename": [],
    "copies": {"lm_head.weight": "model.embed_tokens.weight"},
}
BASE_MODEL = {
    "name": "base model only: no head, no prefix",
    "rename": [[r"^model\.", ""]],
    "drop": [r"^lm_head\."],
}
ROTARY_BUFFERS = {
    "name": "rotary buffers, as transformers before 4.32 wrote them",
    "rename": [],
    "extra": [[f"model.layers.{i}.self_attn.rotary_emb.inv_freq", [4], "F32"] for i in range(2)],
}
GPT2_HUB = {
    "name": "hub: no prefix, mask buffers",
    "rename": [[r"^transformer\.", ""]],
    "extra": [[f"h.{i}.attn.bias", [1, 1, 47, 47], "F32"] for i in range(3)],
}
GPT2_MASKED = {
    "name": "mask buffers of old transformers, tied head written out",
    "rename": [],
    "extra": [[f"transformer.h.{i}.attn.bias", [1, 1, 47, 47], "U8"] for i in range(3)]
    + [[f"transformer.h.{i}.attn.masked_bias", [], "F32"] for i in range(3)],
    "copies": {"lm_head.weight": "transformer.wte.weight"},
}
GPTJ_HUB = {
    "name": "hub: mask buffers",
    "rename": [],
    "extra": [[f"transformer.h.{i}.attn.bias", [1, 1, 48, 48], "BOOL"] for i in range(3)]
    + [[f"transformer.h.{i}.attn.masked_bias", [], "F32"] for i in range(3)],
}
NEOX_HUB = {
    "name": "hub: mask and rotary buffers",
    "rename": [],
    "extra": [[f"gpt_neox.layers.{i}.attention.bias", [1, 1, 48, 48], "BOOL"] for i in range(3)]
    + [[f"gpt_neox.layers.{i}.attention.masked_bias", [], "F32"] for i in range(3)]
    + [[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq", [2], "F32"] for i in range(3)],
}
OPT_HUB = {
    "name": "hub: without the prefix, tied head written out",
    "rename": [[r"^model\.", ""]],
    "copies": {"lm_head.weight": "model.decoder.embed_tokens.weight"},
    "extra": [["decoder.version", [1], "F32"]],
    "transformers": False,
}
STACKED_EXPERTS = {
    "name": "experts stacked as transformers 5 has them in memory",
    "rename": [],
    "stack": [
        [r"mlp\.experts\.{e}\.(gate_proj|up_proj)\.weight", "mlp.experts.gate_up_proj"],
        [r"mlp\.experts\.{e}\.down_proj\.weight", "mlp.experts.down_proj"],
    ],
}


def case(
    name: str,
    kind: str,
    settings: dict[str, Any],
    awkward: str,
    *,
    length: int = 29,
    prompt: int = 7,
    **more: Any,
) -> Case:
    """A case of transformers' classes `kind`Config(**settings) and `kind`ForCausalLM."""
    vocabulary = settings["vocab_size"]
    model = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    config = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"

    def tokens(generator: np.random.Generator, rows: int, length: int) -> dict[str, np.ndarray]:
        return {"input_ids": generator.integers(3, vocabulary, (rows, length))}

    return Case(
        name=name,
        model=model,
        config=lambda: getattr(hf, config)(**settings),
        awkward=awkward,
        inputs=lambda generator: tokens(generator, 2, length),
        prompt=lambda generator, long: tokens(generator, 1, 21 if long else prompt),
        **more,
    )


def llama(name: str, awkward: str, settings: dict[str, Any], **more: Any) -> Case:
    return case(name, "Llama", BASE | settings, awkward, **more)


def scaled(name: str, awkward: str, rope: dict[str, Any], **more: Any) -> Case:
    settings = {"max_position_embeddings": 20 if rope["rope_type"] == "dynamic" else 64}
    return llama(name, awkward, settings | {"rope_scaling": rope, "rope_theta": 500.0}, length=37, **more)


GEMMA = dict(
    vocab_size=127,
    hidden_size=32,
    intermediate_size=44,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=64,
)
QWEN3_MOE = BASE | dict(
    head_dim=12, num_hidden_layers=3, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20
)
NEOX = dict(
    vocab_size=113,
    hidden_size=36,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=50,
    max_position_embeddings=48,
    rotary_pct=0.34,
    rotary_emb_base=3000,
    bos_token_id=112,
    eos_token_id=112,
)
PHI: dict[str, Any] = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
LIST = [
    case(
        "gpt2",
        "GPT2",
        dict(
            vocab_size=113,
            n_embd=36,
            n_layer=3,
            n_head=3,
            n_positions=47,
            n_inner=50,
            bos_token_id=112,
            eos_token_id=112,
        ),
        "inner width not 4 x width, learned positions, joined queries, keys and values, tied head",
        layouts=[GPT2_HUB, GPT2_MASKED],
    ),
    case(
        "gptj",
        "GPTJ",
        dict(
            vocab_size=113,
            n_embd=36,
            n_layer=3,
            n_head=3,
            n_positions=48,
            rotary_dim=8,
            n_inner=None,
            bos_token_id=112,
            eos_token_id=112,
        ),
        "rotary over 8 of 12 dimensions, neighbours paired; attention and MLP in parallel; bias on the head",
        layouts=[GPTJ_HUB],
    ),
    llama(
        "llama2",
        "as many key/value heads as heads, odd vocabulary",
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
        layouts=[ROTARY_BUFFERS],
    ),
    llama(
        "llama_tied",
        "tied head, head_dim 10 is not width / heads",
        {"tie_word_embeddings": True, "head_dim": 10},
        layouts=[TIED_HEAD_WRITTEN, BASE_MODEL],
    ),
    llama(
        "llama_bias",
        "biases in attention, its output too, and in the MLP; one key/value head",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    ),
    scaled(
        "llama3",
        "rope scaling llama3; wavelengths in all three ranges",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    scaled("llama_linear", "rope scaling linear", {"rope_type": "linear", "factor": 2.5}),
    scaled(
        "llama_dynamic",
        "rope scaling dynamic, input longer than max_position_embeddings; a prompt "
        "that stays below it (prompt) and one that is already longer (prompt_long: cached keys keep "
        "their old turns)",
        {"rope_type": "dynamic", "factor": 3.0},
        stateful=True,
    ),
    scaled(
        "llama_yarn",
        "rope scaling yarn with its default attention factor",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    scaled(
        "llama_yarn_untruncated",
        "rope scaling yarn, own attention factor and bounds that are not rounded",
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "truncate": False,
            "attention_factor": 0.8,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
        },
    ),
    case(
        "mistral",
        "Mistral",
        BASE | {"sliding_window": 9, "head_dim": 10},
        "sliding window 9 in all layers, shorter than the input and crossed by generation; head_dim 10",
    ),
    case(
        "qwen2",
        "Qwen2",
        BASE | {"tie_word_embeddings": True},
        "tied head; biases on queries, keys and values, none on the output",
        layouts=[TIED_HEAD_WRITTEN],
    ),
    case(
        "qwen2_window",
        "Qwen2",
        BASE
        | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "untied; layer 0 full, layers 1 and 2 in a window of 8",
    ),
    case(
        "qwen2_5",
        "Qwen2",
        BASE
        | {
            "rope_theta": 1000000.0,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "hidden_size": 48,
            "sliding_window": 5,
            "use_sliding_window": False,
        },
        "Qwen2.5: a sliding_window in the config that is not used; untied; rope_theta 1e6",
    ),
    case(
        "qwen3",
        "Qwen3",
        BASE | {"head_dim": 12, "tie_word_embeddings": True},
        "norms on queries and keys, no biases, head_dim 12, tied",
        layouts=[TIED_HEAD_WRITTEN],
    ),
    case(
        "qwen3_bias",
        "Qwen3",
        BASE | {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": False},
        "attention_bias, its output too; untied",
    ),
    case(
        "gemma",
        "Gemma",
        GEMMA | {"num_hidden_layers": 2, "num_key_value_heads": 1},
        "norms 1 + w, embeddings times sqrt(32), tied, head_dim 12, one key/value head",
        centered_norms="norm",
        embedding=0.12,
        layouts=[TIED_HEAD_WRITTEN],
    ),
    case(
        "gemma2",
        "Gemma2",
        GEMMA
        | {
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 2.0,
        },
        "layers 0 and 2 in a window of 8, layer 1 full; four norms a layer; softcaps that "
        "bite; scale 20 ** -0.5",
        centered_norms="norm",
        embedding=0.12,
        layouts=[TIED_HEAD_WRITTEN],
    ),
    case(
        "gemma3_text",
        "Gemma3",
        GEMMA
        | {
            "num_hidden_layers": 7,
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
            },
        },
        "five layers in a window of 8, then a full one, then another; two rope bases, linear scaling in full "
        "layers only; norms on queries and keys with 1 + w",
        centered_norms="norm",
        embedding=0.12,
        layouts=[TIED_HEAD_WRITTEN],
    ),
    case(
        "gpt_neox",
        "GPTNeoX",
        NEOX,
        "query, key and value of each head in a row of one tensor; rotary over 4 of 12 dimensions; attention "
        "and MLP in parallel, each with a norm of its own",
        layouts=[
            NEOX_HUB,
            {"name": "memory: the head under its new name", "rename": [["embed_out", "lm_head"]]},
        ],
    ),
    case(
        "gpt_neox_serial",
        "GPTNeoX",
        NEOX
        | {
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 500.0,
                "partial_rotary_factor": 1.0,
            },
        },
        "attention, then the MLP; no biases in attention; all dimensions turn, stretched; tied head",
        layouts=[
            {
                "name": "tied head written out",
                "rename": [],
                "copies": {"embed_out.weight": "gpt_neox.embed_in.weight"},
            }
        ],
    ),
    case(
        "opt",
        "OPT",
        dict(
            vocab_size=113,
            hidden_size=36,
            num_hidden_layers=3,
            num_attention_heads=3,
            ffn_dim=50,
            max_position_embeddings=47,
            bos_token_id=2,
            eos_token_id=2,
        ),
        "learned positions from the third row on, ReLU, biases, tied head",
        layouts=[OPT_HUB],
        no_effect=r"k_proj\.bias",
    ),
    case(
        "opt_plain",
        "OPT",
        dict(
            vocab_size=113,
            hidden_size=36,
            num_hidden_layers=2,
            num_attention_heads=3,
            ffn_dim=50,
            max_position_embeddings=47,
            enable_bias=False,
            activation_function="gelu",
            tie_word_embeddings=False,
            bos_token_id=2,
            eos_token_id=2,
        ),
        "no biases, GELU, a head of its own",
    ),
    case(
        "olmo2",
        "Olmo2",
        BASE,
        "norms after attention and MLP only, and over all heads of queries and keys, of which there are more "
        "than of keys",
    ),
    case(
        "olmo3",
        "Olmo3",
        BASE
        | {
            "num_hidden_layers": 5,
            "sliding_window": 8,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.2,
            },
        },
        "three layers in a window of 8, then a full one whose positions alone are stretched (yarn)",
    ),
    case(
        "smollm3",
        "SmolLM3",
        BASE
        | {"num_hidden_layers": 6, "tie_word_embeddings": True, "rope_theta": 50000.0, "pad_token_id": 0},
        "layer 3 of six knows no positions; tied head",
        layouts=[TIED_HEAD_WRITTEN],
    ),
    case(
        "smollm3_window",
        "SmolLM3",
        BASE
        | {
            "num_hidden_layers": 3,
            "pad_token_id": 0,
            "no_rope_layers": [0, 1, 1],
            "use_sliding_window": True,
            "sliding_window": 8,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
        "layer 0 knows no positions and slides, as told by a list of layers; biases; untied",
        no_effect=r"layers\.0\.self_attn\.k_proj\.bias",
    ),
    case(
        "phi",
        "Phi",
        PHI,
        "rotary over 4 of 8 dimensions; attention and MLP read one norm; biases, on the head too",
    ),
    case(
        "phi_qk_norm",
        "Phi",
        PHI | {"qk_layernorm": True, "num_key_value_heads": 2, "partial_rotary_factor": 1.0},
        "LayerNorm on queries and keys; two key/value heads; all dimensions turn",
    ),
    case(
        "phi3",
        "Phi3",
        BASE | {"sliding_window": 9, "pad_token_id": 0},
        "queries, keys and values in one tensor, of grouped heads; gate and up in another; a window of 9",
    ),
    case(
        "phi3_longrope",
        "Phi3",
        BASE
        | {
            "hidden_size": 48,
            "pad_token_id": 0,
            "original_max_position_embeddings": 20,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [1.2, 3.0, 5.5],
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
            "tie_word_embeddings": True,
        },
        "rotary over 6 of 12 dimensions with factors for short and long texts; the input is long, a prompt "
        "and what follows short (prompt), another is already long (prompt_long)",
        layouts=[TIED_HEAD_WRITTEN],
        stateful=True,
    ),
    case(
        "stablelm",
        "StableLm",
        BASE | {"hidden_size": 64, "use_qkv_bias": True},
        "LayerNorm, rotary over 4 of 16 dimensions, biases on queries, keys and values only",
    ),
    case(
        "stablelm_parallel",
        "StableLm",
        BASE
        | {
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": True,
        },
        "StableLM 2 12B: attention and MLP read one norm; a norm without bias for each query and key head",
        layouts=[TIED_HEAD_WRITTEN],
    ),
    case(
        "mixtral",
        "Mixtral",
        BASE | {"num_local_experts": 5, "num_experts_per_tok": 2},
        "five experts, two chosen; weights of the chosen ones sum to one",
    ),
    case(
        "mixtral_window",
        "Mixtral",
        BASE | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 8, "head_dim": 10},
        "one expert of three chosen; window of 8",
    ),
    case(
        "qwen3_moe",
        "Qwen3Moe",
        QWEN3_MOE | {"norm_topk_prob": True, "mlp_only_layers": [0]},
        "layer 0 is dense (mlp_only_layers); weights of the chosen experts sum to one",
        layouts=[STACKED_EXPERTS],
    ),
    case(
        "qwen3_moe_raw",
        "Qwen3Moe",
        QWEN3_MOE
        | {
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
        "all layers with experts; weights of the chosen experts not normalised; biases; tied",
        layouts=[TIED_HEAD_WRITTEN, STACKED_EXPERTS],
    ),
    case(
        "qwen3_moe_sparse_step",
        "Qwen3Moe",
        QWEN3_MOE | {"num_hidden_layers": 2, "norm_topk_prob": True, "decoder_sparse_step": 2},
        "decoder_sparse_step 2: layer 0 is dense, layer 1 has experts",
    ),
]
LANGUAGE = {c.name: c for c in LIST}
