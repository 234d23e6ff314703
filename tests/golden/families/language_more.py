"""More cases of language models: mixtures with shared experts, models with factors, and what came after."""

from language import BASE, STACKED_EXPERTS, TIED_HEAD_WRITTEN, case

MOE = BASE | dict(
    num_hidden_layers=3, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, pad_token_id=0
)
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
]
LANGUAGE_MORE = {c.name: c for c in LIST}
