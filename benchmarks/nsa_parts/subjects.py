"""What is timed beside each other: Native Sparse Attention, its branches, dense peers. Needs jax alone."""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from nsa_parts.timing import Subject

from kernels_pallas.nsa import (
    compressed_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from kernels_pallas.nsa.specs.arg_specs import ArgSpec
from kernels_pallas.nsa.specs.synthetic import overlapping_indices

OPERANDS = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
DENSE = ("q", "k_win", "v_win")


def draw(spec: ArgSpec, seed: int = 0) -> dict[str, jax.Array]:
    """Normal numbers for everything that attention takes, and the output's cotangent, made on the device."""
    like = {**spec.shapes(), "d_out": spec.output()}
    keys = dict(zip(like, jax.random.split(jax.random.key(seed), len(like)), strict=True))
    make = jax.jit(lambda keys: {n: jax.random.normal(keys[n], x.shape, x.dtype) for n, x in like.items()})
    return make(keys)


def given(spec: ArgSpec, overlap: float) -> dict[str, jax.Array]:
    return {"indices": jnp.asarray(overlapping_indices(spec, overlap))}


def nsa(spec: ArgSpec, implementation: str) -> Subject:
    """The whole attention. The blocks are chosen, and then those of `indices` are read in their place, so
    that every overlap has its cost and the choice is in all of them."""
    geometry: dict[str, Any] = {
        "block_len": spec.block_len,
        "stride": spec.stride,
        "implementation": implementation,
    }

    def whole(*args):
        operands, indices = args[:-1], args[-1]
        out, branches = nsa_attention(*operands, **spec.sizes, indices=indices, implementation=implementation)
        chosen = select_blocks(*operands[:2], branches.lse, **geometry, **_without_geometry(spec))
        return out, chosen

    return Subject(f"nsa [{implementation}]", whole, OPERANDS, ("indices",))


def nsa_by_itself(spec: ArgSpec, implementation: str) -> Subject:
    """The whole attention with the blocks that it chooses."""

    def whole(*operands):
        return nsa_attention(*operands, **spec.sizes, implementation=implementation)[0], None

    return Subject(f"nsa [{implementation}]", whole, OPERANDS)


def _without_geometry(spec: ArgSpec) -> dict[str, int]:
    return {name: x for name, x in spec.selection_sizes.items() if name not in ("block_len", "stride")}


def branches(spec: ArgSpec, implementation: str) -> list[Subject]:
    """Each branch by itself, and the choice (with the compression whose log-sum-exp it needs)."""
    common: dict[str, Any] = {"implementation": implementation}
    geometry = {"block_len": spec.block_len, "stride": spec.stride, **common}

    def choice(q, k_cmp, v_cmp):
        out, lse = compressed_attention(q, k_cmp, v_cmp, **geometry)
        return out, select_blocks(q, k_cmp, lse, **geometry, **_without_geometry(spec))

    def selection(q, k, v, indices):
        return selected_attention(q, k, v, indices, block_size=spec.block_size, **common), None

    window = functools.partial(window_attention, window=spec.window, **common)
    name = f"[{implementation}]"
    return [
        Subject(
            f"compression {name}",
            functools.partial(compressed_attention, **geometry),
            ("q", "k_cmp", "v_cmp"),
        ),
        Subject(f"compression and choice {name}", choice, ("q", "k_cmp", "v_cmp"), parts=("forward",)),
        Subject(f"selection {name}", selection, ("q", "k_slc", "v_slc"), ("indices",)),
        Subject(f"window {name}", lambda *args: (window(*args), None), DENSE),
    ]


def peers(spec: ArgSpec, dense_up_to: int) -> list[Subject]:
    """Dense causal attention of others, on the queries, keys and values of the window branch."""
    on_gpu = jax.default_backend() == "gpu"
    found = []
    if on_gpu:
        found.append(Subject(cudnn_name(spec), lambda *args: (cudnn(*args), None), DENSE))
    elif spec.length <= dense_up_to:
        found.append(Subject("dense, all scores kept", lambda *args: (kept_scores(*args), None), DENSE))
    if importlib.util.find_spec("tokamax"):
        name = "mosaic_gpu" if on_gpu else "xla_chunked"
        found.append(Subject(f"dense, tokamax {name}", functools.partial(_tokamax, name), DENSE))
    return found


def cudnn_name(spec: ArgSpec) -> str:
    padded = "" if spec.key_dim == spec.value_dim else f" (V padded to {spec.key_dim})"
    return f"dense, cuDNN{padded}"


def cudnn(q, k, v):
    """It takes no other head dim of values than that of keys."""
    padded = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[3] - v.shape[3])))
    out = jax.nn.dot_product_attention(q, k, padded, is_causal=True, implementation="cudnn")
    return out[..., : v.shape[3]]


def kept_scores(q, k, v):
    batch, length, heads, dim = q.shape
    rows = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    scores = jnp.einsum("bthgd,bshd->bhgts", rows, k, preferred_element_type=jnp.float32) * dim**-0.5
    seen = jnp.arange(length)[:, None] >= jnp.arange(length)[None]
    weights = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bhgts,bshd->bthgd", weights, v).reshape(batch, length, heads, v.shape[3])


def _tokamax(name, q, k, v):
    import tokamax

    return tokamax.dot_product_attention(q, k, v, is_causal=True, implementation=name), None
