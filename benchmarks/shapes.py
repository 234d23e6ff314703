"""Shapes of well-known models that several benchmarks compile."""

from jaxlab.models import ModelConfig, RopeConfig

LLAMA_70B = ModelConfig(
    vocab_size=128256,
    width=8192,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    mlp_width=28672,
    max_length=131072,
    norm_eps=1e-5,
    tie_embeddings=False,
    position=RopeConfig(theta=500000.0, scaling="llama3", factor=8.0, original_length=8192),
    compute_dtype="bfloat16",
    family="llama",
)
