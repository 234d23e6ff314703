"""Our own models: Llama's names where Llama has the tensor, names of our own elsewhere."""

from jaxlab.checkpoints.tensor_table import Row, Rows, in_layers


def _mlp(path: str, name: str) -> Rows:
    return (
        Row(f"{path}.gate", f"{name}.gate_proj.weight", "f d -> d f"),
        Row(f"{path}.gate_bias", f"{name}.gate_proj.bias", "f -> f"),
        Row(f"{path}.up", f"{name}.up_proj.weight", "f d -> d f"),
        Row(f"{path}.up_bias", f"{name}.up_proj.bias", "f -> f"),
        Row(f"{path}.down", f"{name}.down_proj.weight", "d f -> f d"),
        Row(f"{path}.down_bias", f"{name}.down_proj.bias", "d -> d"),
    )


def _compressor(kind: str) -> Rows:
    path, name = f"attention.compress_{kind}", f"self_attn.compress_{kind}"
    return (
        Row(f"{path}.position", f"{name}.position.weight", "l k -> l k"),
        Row(f"{path}.hidden", f"{name}.fc1.weight", "c (l k) -> l k c"),
        Row(f"{path}.hidden_bias", f"{name}.fc1.bias", "c -> c"),
        Row(f"{path}.output", f"{name}.fc2.weight", "k c -> c k"),
        Row(f"{path}.output_bias", f"{name}.fc2.bias", "k -> k"),
        Row(f"{path}.weight", f"{name}.weight", "c (l k) -> l k c"),
        Row(f"{path}.bias", f"{name}.bias", "c -> c"),
    )


# Inside a layer; the same for the decoder and the vision tower.
LAYER: Rows = (
    Row("attention_norm.scale", "input_layernorm.weight", "d -> d"),
    Row("attention_norm.bias", "input_layernorm.bias", "d -> d"),
    Row("attention_post_norm.scale", "attention_post_norm.weight", "d -> d"),
    Row("attention_post_norm.bias", "attention_post_norm.bias", "d -> d"),
    Row("mlp_norm.scale", "post_attention_layernorm.weight", "d -> d"),
    Row("mlp_norm.bias", "post_attention_layernorm.bias", "d -> d"),
    Row("mlp_post_norm.scale", "mlp_post_norm.weight", "d -> d"),
    Row("mlp_post_norm.bias", "mlp_post_norm.bias", "d -> d"),
    Row("attention.query", "self_attn.q_proj.weight", "(h k) d -> d h k"),
    Row("attention.query_bias", "self_attn.q_proj.bias", "(h k) -> h k"),
    Row("attention.key", "self_attn.k_proj.weight", "(h k) d -> d h k"),
    Row("attention.key_bias", "self_attn.k_proj.bias", "(h k) -> h k"),
    Row("attention.value", "self_attn.v_proj.weight", "(h k) d -> d h k"),
    Row("attention.value_bias", "self_attn.v_proj.bias", "(h k) -> h k"),
    Row("attention.output", "self_attn.o_proj.weight", "d (h k) -> h k d"),
    Row("attention.output_bias", "self_attn.o_proj.bias", "d -> d"),
    Row("attention.query_norm.scale", "self_attn.q_norm.weight", "k -> k"),
    Row("attention.query_norm.bias", "self_attn.q_norm.bias", "k -> k"),
    Row("attention.key_norm.scale", "self_attn.k_norm.weight", "k -> k"),
    Row("attention.key_norm.bias", "self_attn.k_norm.bias", "k -> k"),
    Row("attention.sinks", "self_attn.sinks", "h -> h"),
    Row("attention.query_down", "self_attn.q_a_proj.weight", "r d -> d r"),
    Row("attention.query_latent_norm.scale", "self_attn.q_a_layernorm.weight", "r -> r"),
    Row("attention.query_up", "self_attn.q_b_proj.weight", "(h k) r -> r h k"),
    Row("attention.kv_down", "self_attn.kv_a_proj.weight", "r d -> d r"),
    Row("attention.shared_key", "self_attn.shared_k_proj.weight", "k d -> d k"),
    Row("attention.kv_latent_norm.scale", "self_attn.kv_a_layernorm.weight", "r -> r"),
    Row("attention.key_up", "self_attn.k_b_proj.weight", "(h k) r -> r h k"),
    Row("attention.value_up", "self_attn.v_b_proj.weight", "(h k) r -> r h k"),
    *_compressor("key"),
    *_compressor("value"),
    Row("attention.gate.hidden", "self_attn.gate.fc1.weight", "g d -> d g"),
    Row("attention.gate.output", "self_attn.gate.fc2.weight", "(h c) d -> d h c"),
    Row("attention.gate.bias", "self_attn.gate.fc2.bias", "(h c) -> h c"),
    Row("attention.selector.query", "self_attn.selector.q_proj.weight", "(h r) d -> d h r"),
    Row("attention.selector.key", "self_attn.selector.k_proj.weight", "(h r) d -> d h r"),
    Row("attention.indexer.query", "self_attn.indexer.q_proj.weight", "(h r) d -> d h r"),
    Row("attention.indexer.key", "self_attn.indexer.k_proj.weight", "r d -> d r"),
    Row("attention.indexer.weight", "self_attn.indexer.weights_proj.weight", "h d -> d h"),
    *_mlp("mlp", "mlp"),
    Row("moe.router", "mlp.gate.weight", "e d -> d e"),
    Row("moe.router_bias", "mlp.gate.bias", "e -> e"),
    Row("moe.choice_bias", "mlp.gate.e_score_correction_bias", "e -> e"),
    *_mlp("moe", "mlp.experts.{e}"),
    *_mlp("moe.shared", "mlp.shared_experts"),
    Row("moe.shared_gate", "mlp.shared_expert_gate.weight", "d -> d"),
)

ROWS: Rows = (
    Row("embedding.table", "model.embed_tokens.weight", "v d -> v d"),
    Row("position.table", "model.embed_positions.weight", "p d -> p d"),
    *in_layers("dense_layers", "model.layers", LAYER),
    *in_layers("layers", "model.layers", LAYER),
    Row("final_norm.scale", "model.norm.weight", "d -> d"),
    Row("final_norm.bias", "model.norm.bias", "d -> d"),
    Row("head.table", "lm_head.weight", "v d -> d v"),
    Row("head.bias", "lm_head.bias", "v -> v"),
    Row("vision.patch.table", "vision_tower.patch_embedding.weight", "d p -> p d"),
    Row("vision.patch.bias", "vision_tower.patch_embedding.bias", "d -> d"),
    Row("vision.position.table", "vision_tower.position_embedding.weight", "p d -> p d"),
    *in_layers("vision.layers", "vision_tower.layers", LAYER),
    Row("vision.final_norm.scale", "vision_tower.norm.weight", "d -> d"),
    Row("vision.final_norm.bias", "vision_tower.norm.bias", "d -> d"),
    Row("projector.hidden", "multi_modal_projector.linear_1.weight", "d v -> v d"),
    Row("projector.hidden_bias", "multi_modal_projector.linear_1.bias", "d -> d"),
    Row("projector.output", "multi_modal_projector.linear_2.weight", "d v -> v d"),
    Row("projector.output_bias", "multi_modal_projector.linear_2.bias", "d -> d"),
)
