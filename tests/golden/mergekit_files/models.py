"""Small models for files of mergekit, made alike in every environment: their numbers follow from names.

`write(place)` makes models/FAMILY_DTYPE/{base,a,b,c} and adapters there. Needs NumPy alone.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

WIDTH, MLP, LAYERS, ROWS = 8, 12, 4, 32
NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrst", "ab", "cd", "ef", "abcd"]
"""The tokens of the usual vocabulary; rows beyond them only fill up."""
MERGES = [["a", "b"], ["c", "d"], ["e", "f"], ["ab", "cd"]]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def draw(*key):
    """Normal numbers that depend on the key alone."""
    *words, shape = key
    seed = int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(seed)).normal(size=shape)


def stored(values, dtype):
    """The bytes of float32 numbers in a dtype, rounded to nearest, ties to even."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype != "bf16":
        return values.astype(np.float16 if dtype == "f16" else np.float32).tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def save(tensors, path, dtype="f32"):
    """A safetensors file."""
    header, parts, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, values in tensors.items():
        parts.append(stored(values, dtype))
        span = [end, end + len(parts[-1])]
        header[name] = {"dtype": dtype.upper(), "shape": list(values.shape), "data_offsets": span}
        end = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def llama(layers, rows, tied, bias=False, norms=("input", "post_attention")):
    shapes = {"model.embed_tokens.weight": (rows, WIDTH)}
    for i in range(layers):
        start = f"model.layers.{i}."
        shapes |= {f"{start}{n}_layernorm.weight": (WIDTH,) for n in norms}
        shapes |= {f"{start}mlp.{n}_proj.weight": (MLP, WIDTH) for n in ("gate", "up")}
        shapes[f"{start}mlp.down_proj.weight"] = (WIDTH, MLP)
        shapes |= {f"{start}self_attn.{n}_proj.weight": (WIDTH, WIDTH) for n in "qo"}
        shapes |= {f"{start}self_attn.{n}_proj.weight": (WIDTH // 2, WIDTH) for n in "kv"}
        if bias:
            shapes |= {f"{start}self_attn.{n}_proj.bias": (WIDTH // (1 if n == "q" else 2),) for n in "qkv"}
    shapes["model.norm.weight"] = (WIDTH,)
    if not tied:
        shapes["lm_head.weight"] = (rows, WIDTH)
    return shapes


def phi3(layers, rows, tied):
    shapes = {}
    for name, shape in llama(layers, rows, tied).items():
        if ".mlp.gate_proj" in name:
            shapes[name.replace("gate_proj", "gate_up_proj")] = (2 * MLP, WIDTH)
        elif ".self_attn.q_proj" in name:
            shapes[name.replace("q_proj", "qkv_proj")] = (2 * WIDTH, WIDTH)
        elif not any(part in name for part in (".up_proj", ".k_proj", ".v_proj")):
            shapes[name] = shape
    return shapes


def mixtral(layers, rows, tied):
    shapes = {}
    for name, shape in llama(layers, rows, tied).items():
        if ".mlp." not in name:
            shapes[name] = shape
        elif "down_proj" in name:
            start = name.partition("mlp.")[0] + "block_sparse_moe."
            shapes[f"{start}gate.weight"] = (2, WIDTH)
            for expert in range(2):
                shapes |= {f"{start}experts.{expert}.{n}.weight": (MLP, WIDTH) for n in ("w1", "w3")}
                shapes[f"{start}experts.{expert}.w2.weight"] = (WIDTH, MLP)
    return shapes


def gpt2(layers, rows, tied):
    shapes = {"transformer.wte.weight": (rows, WIDTH), "transformer.wpe.weight": (64, WIDTH)}
    for i in range(layers):
        start = f"transformer.h.{i}."
        shapes |= {f"{start}ln_{n}.{part}": (WIDTH,) for n in (1, 2) for part in ("weight", "bias")}
        for name, size in (("attn.c_attn", (WIDTH, 3 * WIDTH)), ("attn.c_proj", (WIDTH, WIDTH))):
            shapes |= {f"{start}{name}.weight": size, f"{start}{name}.bias": size[1:]}
        for name, size in (("mlp.c_fc", (WIDTH, 4 * WIDTH)), ("mlp.c_proj", (4 * WIDTH, WIDTH))):
            shapes |= {f"{start}{name}.weight": size, f"{start}{name}.bias": size[1:]}
    return shapes | {"transformer.ln_f.weight": (WIDTH,), "transformer.ln_f.bias": (WIDTH,)}


def gemma2(layers, rows, tied):
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    return llama(layers, rows, tied, norms=norms)


def qwen2(layers, rows, tied):
    return llama(layers, rows, tied, bias=True)


SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (llama, "LlamaForCausalLM", {}),
    "mistral": (llama, "MistralForCausalLM", {"sliding_window": None, "head_dim": 4}),
    "qwen2": (qwen2, "Qwen2ForCausalLM", {"use_sliding_window": False}),
    "phi3": (phi3, "Phi3ForCausalLM", {"pad_token_id": 0, "original_max_position_embeddings": 64}),
    "mixtral": (mixtral, "MixtralForCausalLM", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "gemma2": (
        gemma2,
        "Gemma2ForCausalLM",
        {"head_dim": 4, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 4}
        | {"sliding_window": 16, "pad_token_id": 0},
    ),
    "gpt2": (gpt2, "GPT2LMHeadModel", {}),
}


def config(family, dtype, rows, tied, layers=LAYERS, **more):
    _, architecture, extra = FAMILIES[family]
    sizes = {**SIZES, "num_hidden_layers": layers}
    if family == "gpt2":
        sizes = {"n_embd": WIDTH, "n_head": 2, "n_layer": layers, "n_positions": 64, "n_inner": 4 * WIDTH}
        sizes |= {
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    said = {"architectures": [architecture], "model_type": family, **sizes, "vocab_size": rows}
    return {**said, "tie_word_embeddings": tied, "torch_dtype": NAMES[dtype], **extra, **more}


def tokenizer(extra=(), special=(), plain=None):
    """tokenizer.json: byte pairs over a few letters, with further tokens of a model's own."""
    words = list(WORDS if plain is None else plain)
    vocabulary = {word: i for i, word in enumerate((*words, *extra))}
    added = [
        {"id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for i, word in enumerate(words[:3])
    ]
    for i, word in enumerate(special):
        added.append(
            {
                "id": len(vocabulary) + i,
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
            }
            | {"normalized": False, "special": True}
        )
    merges = [pair for pair in MERGES if "".join(pair) in vocabulary]
    merges += [[word[:-1], word[-1]] for word in extra]
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {**model, "vocab": vocabulary, "merges": merges},
    }  # fmt: skip


def write_model(
    folder, family, dtype, seed, *, rows=ROWS, tied=False, layers=LAYERS, words=None, template=None, **more
):
    """A model whose numbers are those of the family's base and something small of its own."""
    shapes = FAMILIES[family][0](layers, rows, tied)
    tensors = {}
    for name, shape in shapes.items():
        values = draw(family, name, shape) + (0.1 * draw(family, seed, name, shape) if seed else 0)
        tensors[name] = values
    folder.mkdir(parents=True)
    save(tensors, folder / "model.safetensors", dtype)
    (folder / "config.json").write_text(
        json.dumps(config(family, dtype, rows, tied, layers, **more), indent=2)
    )
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    if template is not None:
        said["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(words or tokenizer(), indent=1))
    return folder


def write_adapter(folder, seed, layers=LAYERS):
    """A LoRA adapter for queries and down projections."""
    folder.mkdir(parents=True)
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none"}
    said |= {"target_modules": ["q_proj", "down_proj"], "base_model_name_or_path": "", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(said | {"fan_in_fan_out": False}))
    tensors = {}
    for i in range(layers):
        for module, (out, into) in {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "mlp.down_proj": (WIDTH, MLP),
        }.items():
            name = f"base_model.model.model.layers.{i}.{module}.lora_"
            tensors[f"{name}A.weight"] = 0.1 * draw("lora", seed, name, "A", (2, into))
            tensors[f"{name}B.weight"] = 0.1 * draw("lora", seed, name, "B", (out, 2))
    save(tensors, folder / "adapter_model.safetensors")


def write(place):
    """All models, below `place`."""
    models = Path(place) / "models"
    seeds = dict(zip(("base", "a", "b", "c"), range(4), strict=True))
    for family, dtype in (
        ("llama", "f32"), ("llama", "bf16"), ("llama", "f16"), ("mistral", "bf16"), ("mistral", "f32"),
        ("qwen2", "bf16"), ("phi3", "f32"), ("mixtral", "f32"), ("gpt2", "f32"), ("gemma2", "f32"),
    ):  # fmt: skip
        tied = family in ("gpt2", "gemma2")
        for name, seed in seeds.items():
            template = TEMPLATE if name in ("a", "b") else None
            write_model(
                models / f"{family}_{dtype}" / name, family, dtype, seed, tied=tied, template=template
            )
    for name, seed in seeds.items():
        write_model(models / "tied_bf16" / name, "llama", "bf16", seed, tied=True)
        write_model(models / "deep_bf16" / name, "mistral", "bf16", seed, layers=6)
    for dtype in ("f32", "bf16"):
        for name, (extra, special) in VOCABULARIES.items():
            write_model(
                models / f"words_{dtype}" / name,
                "llama",
                dtype,
                seeds[name],
                rows=len(WORDS) + len(extra) + len(special),
                words=tokenizer(extra, special),
            )
    write_model(models / "padded_f32" / "base", "llama", "f32", 0, rows=64, words=tokenizer())
    for name, seed in (("x", 1), ("y", 2)):
        write_adapter(Path(place) / "adapters" / name, seed)


VOCABULARIES = {
    "base": ((), ()),
    "a": (("gh",), ("<|im_start|>", "<|im_end|>")),
    "b": ((), ("<|im_end|>", "<|tool|>")),
    "c": (("ij", "kl"), ()),
}


if __name__ == "__main__":
    write(sys.argv[1])
