"""More cases of language models: mixtures with shared experts, models with factors, and what came after."""

from language import BASE, STACKED_EXPERTS, TIED_HEAD_WRITTEN, case

MOE = BASE | dict(
    num_hidden_layers=3, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, pad_token_id=0
)
ROUTED = MOE | dict(
    num_key_value_heads=4,
    n_routed_experts=6,
    num_experts_per_tok=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    routed_scaling_factor=1.7,
    n_group=2,
    topk_group=1,
    norm_topk_prob=True,
)
del ROUTED["num_experts"]
LATENT = dict(kv_lora_rank=14, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10, topk_group=2)
GROWN = dict(
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=0.8,
)


def second_token(layer: int) -> dict:
    """The layer after the last one, which predicts a second token; its number is that of public models."""
    name, width = f"model.layers.{layer}", 32
    extra = [
        [f"{name}.eh_proj.weight", [width, 2 * width], "F32"],
        [f"{name}.enorm.weight", [width], "F32"],
        [f"{name}.shared_head.head.weight", [131, width], "F32"],
        [f"{name}.self_attn.o_proj.weight", [width, width], "F32"],
        [f"{name}.mlp.experts.0.up_proj.weight", [20, width], "F32"],
    ]
    return {"name": "with the layer that predicts a second token", "rename": [], "extra": extra}


LIST = [
    case(
        "qwen2_moe",
        "Qwen2Moe",
        MOE | {"shared_expert_intermediate_size": 28, "mlp_only_layers": [0], "norm_topk_prob": False},
        "layer 0 is dense; a shared expert, wider than the others, behind a sigmoid; weights of the chosen "
        "experts as the softmax over all left them; biases on queries, keys and values",
        layouts=[STACKED_EXPERTS],
    ),
    case(
        "qwen2_moe_window",
        "Qwen2Moe",
        MOE
        | {
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 12,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 3,
            "tie_word_embeddings": True,
        },
        "layers 0 and 2 in a window of 8, layers 1 and 3 full; no biases; tied",
        layouts=[TIED_HEAD_WRITTEN],
    ),
    case(
        "olmoe",
        "Olmoe",
        BASE | {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 20},
        "norms over all query heads, and over the fewer key heads, together; weights not normalised",
        layouts=[STACKED_EXPERTS],
    ),
    case(
        "granite",
        "Granite",
        BASE
        | {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.21,
            "residual_multiplier": 0.42,
            "logits_scaling": 0.15,
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
        "factors on embeddings, scores, what layers add, and logits; none of them 1; biases; tied",
        embedding=0.05,
        layouts=[TIED_HEAD_WRITTEN],
    ),
    case(
        "granitemoe",
        "GraniteMoe",
        BASE
        | {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.25,
            "logits_scaling": 0.5,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "intermediate_size": 20,
            "tie_word_embeddings": False,
        },
        "experts of a layer in one tensor; a softmax over the chosen ones alone; Granite's factors",
        embedding=0.05,
    ),
    case(
        "seed_oss",
        "SeedOss",
        BASE | {"head_dim": 10, "residual_dropout": 0.1},
        "biases on queries, keys and values, none on the output; head_dim 10",
    ),
    case(
        "seed_oss_bias",
        "SeedOss",
        BASE | {"head_dim": 10, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
        "a bias on the output and none on queries, keys and values; biases in the MLP",
    ),
    case(
        "ministral",
        "Ministral",
        BASE
        | {
            "num_hidden_layers": 4,
            "head_dim": 10,
            "sliding_window": 9,
            "layer_types": ["full_attention", *["sliding_attention"] * 3],
        },
        "layer 0 full, then three in a window of 9; head_dim 10 is not width / heads",
    ),
    case(
        "cohere",
        "Cohere",
        BASE | {"logit_scale": 0.7, "layer_norm_eps": 1e-3, "pad_token_id": 0},
        "LayerNorm without a bias; attention and MLP in parallel, one norm; neighbours turn; scaled logits",
        layouts=[TIED_HEAD_WRITTEN],
    ),
    case(
        "cohere_qk_norm",
        "Cohere",
        BASE
        | {
            "num_hidden_layers": 3,
            "logit_scale": 0.5,
            "use_qk_norm": True,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
        },
        "a norm with a scale of its own for each head of queries and of keys; biases; untied",
    ),
    case(
        "cohere2",
        "Cohere2",
        BASE | {"num_hidden_layers": 5, "logit_scale": 0.25, "sliding_window": 8, "pad_token_id": 0},
        "three layers in a window of 8 with positions, then a full one without, then one that slides",
        layouts=[TIED_HEAD_WRITTEN],
    ),
    case(
        "exaone4",
        "Exaone4",
        BASE
        | {
            "num_hidden_layers": 4,
            "head_dim": 12,
            "sliding_window": 8,
            "sliding_window_pattern": 3,
            "rope_theta": 500.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        "norms after attention and MLP, none before; norms on each head; layer 2 full, without positions",
    ),
    case(
        "exaone4_full",
        "Exaone4",
        BASE
        | {
            "head_dim": 12,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 2,
            "tie_word_embeddings": True,
        },
        "the small one: all layers full, with positions; tied",
        layouts=[TIED_HEAD_WRITTEN],
    ),
    case(
        "gpt_oss",
        "GptOss",
        BASE
        | {
            "num_hidden_layers": 3,
            "head_dim": 12,
            "sliding_window": 8,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "intermediate_size": 20,
            "swiglu_limit": 1.2,
            "tie_word_embeddings": False,
            "rope_theta": 500.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
        },
        "attention sinks; layers 0 and 2 in a window of 8, layer 1 full; biases everywhere, in experts too, "
        "whose gates and ups stand in turns and are clamped; a softmax over the chosen; yarn not rounded",
    ),
    case(
        "glm4_moe",
        "Glm4Moe",
        ROUTED | {"num_key_value_heads": 2, "head_dim": 12, "attention_bias": True, "use_qk_norm": True},
        "half of each head turns; layer 0 dense; a sigmoid, a choice in the better of two groups by numbers "
        "of its own, a shared expert, a factor; biases on queries, keys and values; norms on each head",
        layouts=[STACKED_EXPERTS, second_token(46)],
    ),
    case(
        "deepseek_v3",
        "DeepseekV3",
        ROUTED | LATENT | {"q_lora_rank": 20, "rope_scaling": GROWN},
        "latent attention, queries from a latent too; 8 + 4 dimensions of keys, 10 of values; yarn that "
        "scales the scores; neighbours turn; layer 0 dense, then experts in groups",
        layouts=[STACKED_EXPERTS, second_token(61)],
    ),
    case(
        "deepseek_v3_halves",
        "DeepseekV3",
        ROUTED
        | LATENT
        | {
            "q_lora_rank": None,
            "rope_interleave": False,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
        },
        "queries from the stream; halves turn; one group; weights not normalised; plain positions",
    ),
    case(
        "deepseek_v2",
        "DeepseekV2",
        ROUTED
        | LATENT
        | {
            "q_lora_rank": None,
            "rope_scaling": GROWN | {"mscale": 0.707, "mscale_all_dim": 0.707},
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
        },
        "V2-Lite: queries from the stream, a softmax over all experts, two shared ones",
        layouts=[STACKED_EXPERTS],
    ),
    case(
        "deepseek_v2_groups",
        "DeepseekV2",
        ROUTED
        | LATENT
        | {"q_lora_rank": 20, "topk_method": "group_limited_greedy", "n_group": 3, "norm_topk_prob": False},
        "V2: queries from a latent; a choice in the best two of three groups, by their best expert",
    ),
]
LANGUAGE_MORE = {c.name: c for c in LIST}
