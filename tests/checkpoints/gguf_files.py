"""GGUF files of the golden cases, written as llama.cpp's converters write them.

What is done to values is said here once more, from the side of the writer; names are those of the package.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize

Json = dict[str, Any]
ARCHITECTURE = {
    "llama": "llama",
    "mixtral": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "qwen2_moe": "qwen2moe",
    "olmoe": "olmoe",
    "granite": "granite",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "exaone4": "exaone4",
    "seed_oss": "seed_oss",
    "gpt_neox": "gptneox",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "phi": "phi2",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
}
"""By model_type of config.json."""
SHIFTED = ("gemma", "gemma2", "gemma3")
PERMUTED = ("llama", "granite", "smollm3")
_F32 = GGMLQuantizationType.F32


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of halves of heads as neighbours."""
    out = np.empty_like(rows)
    size = len(rows) // heads
    for row in range(len(rows)):
        head, at = divmod(row, size)
        half, pair = divmod(at, size // 2)
        out[head * size + 2 * pair + half] = rows[row]
    return out


def converted(config: Json, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a folder (transformers 4's config.json) under llama.cpp's names."""
    arch = ARCHITECTURE[config["model_type"]]
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    names = get_tensor_name_map(next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch), layers)
    found: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    heads = config.get("num_attention_heads", config.get("n_head"))
    for name, values in tensors.items():
        number = re.search(r"(?:experts|layernorm\.norms)\.(\d+)\.", name)
        module = re.sub(r"(\.norms|(?<=\.experts))\.\d+\.", ".", name)
        module, _, kind = module.rpartition(".")
        ours = f"{names.get_name(module)}.{kind}"
        assert not ours.startswith("None"), name
        if arch in PERMUTED and "q_proj" in name:
            values = permuted(values, heads)
        if arch in PERMUTED and "k_proj" in name:
            values = permuted(values, config.get("num_key_value_heads") or heads)
        if arch in SHIFTED and name.endswith("norm.weight"):
            values = values + 1
        if arch == "gpt2" and re.search(r"\.(c_attn|c_proj|c_fc)\.weight", name):
            values = values.T
        if arch == "gptneox" and "query_key_value" in name:
            values = np.concatenate(np.split(values, heads), 0).reshape(heads, 3, -1, *values.shape[1:])
            values = np.concatenate([values[:, i].reshape(-1, *values.shape[3:]) for i in range(3)])
        if number is not None:
            experts.setdefault(ours, {})[int(number[1])] = values
        else:
            found[ours] = values
    found |= {name: np.stack([parts[i] for i in range(len(parts))]) for name, parts in experts.items()}
    rope = config.get("rope_scaling") or {}
    if kind_of(rope) == "llama3":
        found["rope_freqs.weight"] = _llama3_factors(config, rope)
    for kind in ("long", "short") if kind_of(rope) == "longrope" else ():
        found[f"rope_factors_{kind}.weight"] = np.asarray(rope[f"{kind}_factor"], np.float32)
    return {name: np.ascontiguousarray(values) for name, values in found.items()}


def _llama3_factors(config: Json, rope: Json) -> np.ndarray:
    size = config["head_dim"]
    factors = []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (i / size)
        length, low, high = (
            rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(rope["factor"])
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(factors, np.float32)


def metadata(config: Json) -> Json:
    """The keys of an architecture, without its name."""
    if config["model_type"] == "gpt2":
        return {
            "context_length": config["n_positions"],
            "embedding_length": config["n_embd"],
            "block_count": config["n_layer"],
            "feed_forward_length": config["n_inner"],
            "attention.head_count": config["n_head"],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
    found = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config.get("num_key_value_heads") or config["num_attention_heads"],
        "rope.freq_base": config.get("rope_theta") or config["rotary_emb_base"],
    }
    for norm, key in (("rms_norm_eps", "layer_norm_rms_epsilon"), ("layer_norm_eps", "layer_norm_epsilon")):
        if norm in config:
            found[f"attention.{key}"] = config[norm]
    if config.get("head_dim"):
        found |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    part = config.get("partial_rotary_factor", config.get("rotary_pct"))
    if config["model_type"] in ("llama", "mixtral") or part is not None:
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        found |= {"vocab_size": config["vocab_size"], "rope.dimension_count": int(size * (part or 1))}
    for theirs, ours in (
        ("num_local_experts", "expert_count"),
        ("num_experts", "expert_count"),
        ("num_experts_per_tok", "expert_used_count"),
        ("moe_intermediate_size", "expert_feed_forward_length"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("rope_local_base_freq", "rope.freq_base_swa"),
        ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
        ("attention_multiplier", "attention.scale"),
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("logits_scaling", "logit_scale"),
        ("logit_scale", "logit_scale"),
    ):
        if config.get(theirs) is not None:
            found[ours] = config[theirs]
    if config["model_type"].startswith(("gemma", "cohere2", "exaone4", "olmo3", "phi3")) and config.get(
        "sliding_window"
    ):
        found["attention.sliding_window"] = config["sliding_window"]
        if config["model_type"] in ("exaone4", "olmo3"):
            layers = range(config["num_hidden_layers"])
            default = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in layers]
            slides = [kind == "sliding_attention" for kind in config.get("layer_types") or default]
            found["attention.sliding_window_pattern"] = slides
    if "use_parallel_residual" in config:
        found["use_parallel_residual"] = config["use_parallel_residual"]
    rope = config.get("rope_scaling") or {}
    if kind_of(rope) == "longrope":
        original = config["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
        scale = config["max_position_embeddings"] / original
        found["rope.scaling.attn_factor"] = np.sqrt(1 + np.log(scale) / np.log(original)).item()
    if kind_of(rope) in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind_of(rope), "rope.scaling.factor": rope["factor"]}
    if kind_of(rope) == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        if rope.get("attention_factor"):
            found["rope.scaling.yarn_attn_factor"] = rope["attention_factor"]
    return found


def kind_of(rope: Json) -> str | None:
    return rope.get("rope_type", rope.get("type"))


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    """A key with a value of the type that llama.cpp gives it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write(
    path: Path,
    architecture: str,
    keys: Json,
    tensors: Mapping[str, np.ndarray],
    *,
    kind: Callable[[str], GGMLQuantizationType] = lambda name: _F32,
    others: Json | None = None,
) -> Path:
    """A file with these keys of its architecture, and `others` by their whole names."""
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        add(writer, f"{architecture}.{key}", value)
    for key, value in (others or {}).items():
        add(writer, key, value)
    for name, values in tensors.items():
        chosen = kind(name) if values.ndim > 1 else _F32
        writer.add_tensor(name, quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make(path: Path, config: Json, tensors: Mapping[str, np.ndarray], **more: Any) -> Path:
    """The file of a folder's config.json (transformers 4's) and tensors."""
    return write(
        path, ARCHITECTURE[config["model_type"]], metadata(config), converted(config, tensors), **more
    )
